"""A store as an installable package for verifiers (its v1 interface): a Taskset, one tool server, a reward.

The package carries the store's files and depends on rorqual, which plays and judges. Each call is replayed after those before it,
so the tool server keeps no state but the list of calls, which verifiers carries for each rollout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rorqual.runlog import write_atomically
from rorqual.tasks.store import KINDS, Store

PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "{count} verified agent tasks over {worlds} worlds"
requires-python = ">=3.11"
dependencies = ["rorqual[synthesis]", "verifiers>=0.3"]

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""
PLAY = '''"""Plays and judges the stored tasks; knows nothing of verifiers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from rorqual.tasks import Store, Task, Verdict, open_episode

ISOLATION = "{isolation}"


@cache
def store() -> tuple[dict, dict]:
    found = Store(Path(__file__).parent / "data")
    return {{task.id: task for task in found.tasks()}}, found.worlds()


def tasks() -> list[Task]:
    return list(store()[0].values())


def described(task: Task) -> str:
    """The system message: the task's own, and its tools."""
    own = "\\n".join(message["content"] for message in task.messages if message["role"] == "system")
    tools = "\\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in task.tools)
    return f"{{own}}\\n\\nCall `use` with the name of one of these tools and its arguments as a JSON object:\\n{{tools}}".strip()


def replayed(task_id: str, calls: list, text: str | None = None, judge: bool = False) -> str | Verdict:
    """The last call's observation, or the verdict, after replaying all calls from the initial state."""
    by_id, worlds = store()
    task = by_id[task_id]
    episode = open_episode(task, worlds.get(task.world), ISOLATION)
    try:
        episode.reset()
        observations = [episode.call(name, arguments) for name, arguments in calls]
        return episode.finish(text) if judge else observations[-1]
    finally:
        episode.close()
'''
INIT = '''"""Verified agent tasks."""

from {module}.taskset import WorldTaskset

__all__ = ["WorldTaskset"]
'''
TASKSET = '''"""The taskset, its tool server and its reward."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import verifiers.v1 as vf

from {module}.play import described, replayed, tasks


class CallState(vf.State):
    task_id: str = ""
    calls: list[list[str]] = []


class WorldData(vf.TaskData):
    tier: int = 0
    family: str = ""


class WorldTools(vf.Toolset[vf.ToolsetConfig, CallState]):
    TOOL_PREFIX = None

    @vf.tool
    async def use(self, name: str, arguments: str = "{{}}") -> str:
        """Call one of the task's tools. arguments: a JSON object."""
        calls = [*self.state.calls, [name, arguments]]
        observation = await asyncio.to_thread(replayed, self.state.task_id, calls)
        self.state.calls = calls
        return str(observation)


class WorldTask(vf.Task[WorldData, CallState]):
    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [WorldTools(vf.ToolsetConfig())]

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        trace.state.task_id = self.data.id

    @vf.reward
    async def solved(self, trace: vf.Trace) -> float:
        """1 where the final state and the answer pass. An invalid verdict is an error, never a reward of 0."""
        text = trace.last_reply or None
        verdict = await asyncio.to_thread(replayed, trace.state.task_id, trace.state.calls, text, True)
        if not verdict.is_valid:
            raise RuntimeError(f"invalid verdict: {{verdict.reasons}}")
        return float(verdict.score)


class WorldTaskset(vf.Taskset[WorldTask, vf.TasksetConfig]):
    def load(self) -> Iterable[WorldTask]:
        for task in tasks():
            data = WorldData(id=task.id, prompt=task.prompt, system_prompt=described(task), tier=task.tier, family=task.family)
            yield WorldTask(data, self.config.task)


__all__ = ["WorldTaskset"]
'''


def export_verifiers(store: Store, path: str | Path, isolation: str = "bwrap") -> None:
    """Write the package; `pip install PATH` installs it. The directory's name is the package's."""
    path = Path(path)
    module = path.name.replace("-", "_")
    package = path / module
    data = package / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in (*KINDS.values(), "manifest.json"):
        if (store.directory / name).exists() and name != KINDS["rejected"]:
            shutil.copyfile(store.directory / name, data / name)
    count, worlds = len(store.tasks()), len(store.worlds())
    texts = {
        path / "pyproject.toml": PROJECT.format(name=path.name, module=module, count=count, worlds=worlds),
        package / "play.py": PLAY.format(isolation=isolation),
        package / "taskset.py": TASKSET.format(module=module),
        package / "__init__.py": INIT.format(module=module),
    }
    for target, text in texts.items():
        write_atomically(target, text)
