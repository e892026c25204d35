"""A store as Harbor task directories: task.toml, instruction.md, environment/, tests/, solution/.

In the container the agent has a command, `world`, which lists and calls the tools and notes each call. The grader trusts nothing
that the agent could touch but this list of calls: it replays them over its own copy of world and tools, and runs the verifier
there. A verifier that can't judge leaves no reward and ends with an error.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rorqual.runlog import write_atomically
from rorqual.tasks.store import Store
from rorqual.tasks.task import Task, World, canonical

HERE = Path(__file__).parent
TOML = """schema_version = "1.1"

[task]
name = "rorqual/{id}"
description = {description}

[metadata]
family = "{family}"
tier = {tier}
max_calls = {max_calls}

[agent]
timeout_sec = 900.0

[verifier]
timeout_sec = 120.0

[environment]
build_timeout_sec = 600.0
cpus = 1
memory_mb = 1024
storage_mb = 2048
allow_internet = false
"""
DOCKERFILE = """FROM python:3.12-slim
COPY . /opt/world
RUN ln -s /opt/world/world /usr/local/bin/world && chmod +x /opt/world/world && mkdir -p /var/lib/world
WORKDIR /root
"""
COMMAND = '''#!/usr/bin/env python3
"""world: list the tools. world NAME '{"argument": value}': call one."""
import json, os, sys
HOME = os.environ.get("WORLD_HOME", "/opt/world")
LOG = os.environ.get("WORLD_LOG", "/var/lib/world/calls.jsonl")
sys.path.insert(0, HOME)
from replay import calls_of, open_world, play

world, host = open_world(HOME)
if len(sys.argv) < 2:
    for tool in world["tools"]:
        print(json.dumps(tool["function"], ensure_ascii=False))
    sys.exit(0)
call = [sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "{}"]
observations, _ = play(world, host, [*calls_of(LOG), call])
with open(LOG, "a") as file:
    file.write(json.dumps(call) + "\\n")
print(observations[-1])
'''
REPLAY = '''"""Replays calls over a world from its initial state; the agent's command and the grader have a copy each."""
import json, os
from host import Host, error_text


def open_world(home):
    with open(os.path.join(home, "world.json"), encoding="utf-8") as file:
        world = json.load(file)
    host = Host()
    host.op_load(**world["load"])
    return world, host


def calls_of(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def play(world, host, calls):
    """(observations, the answer that was handed in)"""
    host.op_reset()
    shown = {tool["function"]["name"] for tool in world["tools"]}
    observations, answer, over = [], None, False
    for number, (name, text) in enumerate(calls):
        try:
            arguments = json.loads(text)
        except ValueError:
            arguments = None
        if over or number >= world["max_calls"]:
            observations.append(error_text("over", "the task has ended; no further call counts"))
        elif name not in shown:
            observations.append(error_text("unknown_tool", f"there is no tool {name}"))
        elif not isinstance(arguments, dict):
            observations.append(error_text("invalid_arguments", "arguments must be a JSON object"))
        elif name == "submit":
            answer, over = arguments.get("answer"), True
            observations.append('{"submitted": true}')
        else:
            observations.append(host.op_call(name, arguments)["observation"])
    return observations, answer
'''
GRADE = '''"""Judges the calls that the agent made. Writes 1 or 0; where the verifier can't judge, nothing, and exits with 2."""
import json, os, sys
HOME = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HOME)
from judge import Judge
from replay import calls_of, open_world, play

world, host = open_world(HOME)
_, answer = play(world, host, calls_of(os.environ.get("WORLD_LOG", "/var/lib/world/calls.jsonl")))
judge = Judge(None)
judge.op_load(host.op_rows()["rows"], world["load"]["keys"])
with open(os.path.join(HOME, "verify.py"), encoding="utf-8") as file:
    text = answer if answer is None or isinstance(answer, str) else json.dumps(answer)
    verdict = judge.op_verify(file.read(), host.delta(), text)
if "invalid" in verdict:
    sys.exit(f"invalid: {verdict['invalid']}")
target = os.environ.get("REWARD_FILE", "/logs/verifier/reward.txt")
os.makedirs(os.path.dirname(target), exist_ok=True)
with open(target, "w") as file:
    file.write("0" if verdict["reasons"] else "1")
print(verdict["reasons"] or "passed")
'''
SOLVE = """import json, subprocess, sys


class Tools:
    def __getattr__(self, name):
        def call(**arguments):
            made = subprocess.run(["world", name, json.dumps(arguments)], capture_output=True, text=True, check=True)
            return json.loads(made.stdout)
        return call


answer = solution(Tools())
if answer is not None:
    subprocess.run(["world", "submit", json.dumps({"answer": str(answer)})], check=True)
"""
INSTRUCTION = """{system}{prompt}

The tools are reached by the command `world`: alone it lists them, `world NAME '{{"argument": value}}'` calls one. At most
{max_calls} calls count. Hand in an answer, where one is asked for, with `world submit '{{"answer": "..."}}'`.
"""


def export_harbor(store: Store, path: str | Path) -> None:
    """One directory per task of the general family; tasks of other families are left out, they have exports of their own."""
    worlds = store.worlds()
    for task in store.tasks():
        if task.family == "general":
            write_task(task, worlds[task.world], Path(path) / task.id)


def write_task(task: Task, world: World, directory: Path) -> None:
    """One Harbor task directory."""
    submit = {"type": "function", "function": {"name": "submit", "parameters": {"type": "object", "properties": {"answer": {}}}}}
    names = {tool["function"]["name"] for tool in task.tools}
    tools = [*task.tools, *([] if "submit" in names else [submit])]
    loaded = canonical({"load": _load(task, world), "tools": tools, "max_calls": task.max_calls + 1})
    system = "".join(f"{m['content']}\n\n" for m in task.messages if m["role"] == "system")
    values = {"id": task.id, "family": task.family, "tier": task.tier, "max_calls": task.max_calls}
    texts = {
        "task.toml": TOML.format(description=json.dumps(task.prompt[:200]), **values),
        "instruction.md": INSTRUCTION.format(system=system, prompt=task.prompt, max_calls=task.max_calls),
        "environment/Dockerfile": DOCKERFILE,
        "environment/world": COMMAND,
        "environment/world.json": loaded,
        "environment/replay.py": REPLAY,
        "tests/replay.py": REPLAY,
        "tests/world.json": loaded,
        "tests/grade.py": GRADE,
        "tests/verify.py": task.payload["verifier"],
        "tests/test.sh": '#!/bin/sh\nexec python3 "$(dirname "$0")/grade.py"\n',
        "solution/solve.py": task.payload["solution"] + "\n\n" + SOLVE,
        "solution/solve.sh": '#!/bin/sh\nexec python3 "$(dirname "$0")/solve.py"\n',
    }
    for name, text in texts.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
        target.chmod(0o755 if name.endswith(".sh") or name == "environment/world" else 0o644)
    for place in ("environment", "tests"):
        shutil.copyfile(HERE / "host.py", directory / place / "host.py")
    shutil.copyfile(HERE / "judge.py", directory / "tests" / "judge.py")


def _load(task: Task, world: World) -> dict[str, Any]:
    payload = world.payload
    added = task.payload.get("added_rows", {})
    rows = {table: [*found, *added.get(table, ())] for table, found in payload["rows"].items()}
    source = [payload["source"], *task.payload.get("added_tools", ())]
    return {"schema": payload["schema"], "rows": rows, "keys": payload["keys"], "source": source}
