"""The set-up ladder's last rung: a model behind an endpoint looks around in a sandbox and says how a project's tests run.

What it says is only believed after the tests ran that way; it can neither edit the project nor reach a network.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from rorqual.tasks import TaskError
from rorqual.tasks.code import BASH_TOOL
from rorqual.tasks.language import language, language_of_files

Agent = Callable[[Mapping[str, str], str, str, str], dict[str, Any]]
"""(files, name, version, why the ladder failed) -> a world's payload."""
MAX_TURNS, MAX_OUTPUT = 20, 8000
FIELDS = {
    "path": "the directory that goes on the module path, '.' for the root",
    "sources": "a list: the packages' directories and single modules, as paths from the root",
    "tests": "a list: the test files, as paths from the root",
    "options": "a list: further arguments for the test runner",
    "requires": "a list: packages of the index that the tests need, each name or name==version",
}
FINISH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "finish",
        "description": "Say how the project's tests run.",
        "parameters": {
            "type": "object",
            "properties": {
                name: {"type": "string", "description": text}
                if name == "path"
                else {"type": "array", "items": {"type": "string"}, "description": text}
                for name, text in FIELDS.items()
            },
            "required": ["path", "sources", "tests"],
            "additionalProperties": False,
        },
    },
}


def agent_of(endpoint: str, model: str) -> Agent | None:
    """An agent that asks the endpoint; None where there is none."""
    return _agent(endpoint, model) if endpoint else None


@cache
def _agent(endpoint: str, model: str) -> Agent:
    def agent(files: Mapping[str, str], name: str, version: str, reason: str) -> dict[str, Any]:
        return asyncio.run(_ask(endpoint, model, files, name, version, reason))

    return agent


async def _ask(endpoint: str, model: str, files: Mapping[str, str], name: str, version: str, reason: str) -> dict[str, Any]:
    from rorqual.policy import SamplingParams
    from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

    kind = language_of_files(files)
    speaks = language(kind)
    blank = {
        "files": dict(files),
        "name": name,
        "version": version,
        "language": kind,
        "options": [],
        "requires": [],
        "path": ".",
        "tops": [],
    }
    messages: list[Any] = [{
        "role": "user",
        "content": f"The project {name} is in this directory. Find out how its tests run, with bash, and say so with finish. "
        f"Set-up by rules failed: {reason}",
    }]  # fmt: skip
    async with EndpointPolicy(EndpointConfig(endpoint, model)) as policy:
        with speaks.open_box(files, blank, "bwrap") as box:
            for _ in range(MAX_TURNS):
                reply = (
                    await policy.reply(messages, (BASH_TOOL, FINISH), SamplingParams(max_tokens=2048, temperature=0.0))
                ).message
                messages.append(reply)
                if not (calls := reply.get("tool_calls") or []):
                    break
                for call in calls:
                    given = _arguments(call)
                    if call["function"]["name"] == "finish" and (found := read_set_up(given, files)):
                        return {**blank, **found}
                    text = _bash(box, given) if call["function"]["name"] == "bash" else "finish: expected " + ", ".join(FIELDS)
                    messages.append({"role": "tool", "tool_call_id": call.get("id", ""), "content": text})
    raise TaskError("agent: the endpoint gave no set-up")


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    given = call["function"].get("arguments")
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _bash(box: Any, given: Mapping[str, Any]) -> str:
    if not isinstance(given.get("command"), str):
        return "bash: expected command, a string"
    result = box.run(["/bin/sh", "-c", given["command"]])
    return (result.stdout + result.stderr)[-MAX_OUTPUT:] + f"\n[exit {result.exit_code}]"


def read_set_up(given: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any] | None:
    """What finish was called with, where it names files that are there; else None."""
    lists = {name: given.get(name, []) for name in ("sources", "tests", "options", "requires")}
    if any(not isinstance(v, list) or not all(isinstance(x, str) for x in v) for v in lists.values()):
        return None
    path = given.get("path", ".")
    if not isinstance(path, str) or ".." in path or path.startswith("/") or not lists["sources"]:
        return None
    if any(option.startswith("@") or "://" in option for option in (*lists["options"], *lists["requires"])):
        return None
    if not lists["tests"] or any(test not in files for test in lists["tests"]):
        return None
    tops = [source.rpartition("/")[2].removesuffix(".py").lower() for source in lists["sources"]]
    return {**lists, "path": path, "tops": sorted(tops)}
