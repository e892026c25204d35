"""A world opened for play: its host, its judge, and a place for solutions; each in a process of its own where confined.

The payload of a world of tables:

    schema: CREATE TABLE statements; rows: table -> rows; keys: table -> its key column; source: the tools, as Python

A task adds: solution and verifier (Python); where the world's tools did not suffice, added_tools (a list of Python sources, a
function of the same name replaces the world's); and added_rows, which only this task's initial state has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.tasks.box import Box, BoxError, open_host, open_judge
from rorqual.tasks.task import Task, World
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

Delta = list[list[Any]]
"""[table, key, row after or None] for each row that differs from the initial one."""


@dataclass(frozen=True)
class ToolCall:
    """One call with what came of it."""

    name: str
    arguments: dict[str, Any]
    observation: str = ""
    changes: int = 0
    """Rows written."""

    @property
    def pair(self) -> list[Any]:
        return [self.name, self.arguments]

    @property
    def is_error(self) -> bool:
        return self.observation.startswith('{"error"')


@dataclass(frozen=True)
class Replay:
    """Calls run from the initial state, and the state they left."""

    calls: tuple[ToolCall, ...]
    delta: Delta


@dataclass(frozen=True)
class Solved:
    """A run of a solution function."""

    calls: tuple[ToolCall, ...]
    delta: Delta
    returned: Any = None
    failure: str = ""

    @property
    def answer(self) -> str | None:
        return as_answer(self.returned)


def as_answer(value: Any) -> str | None:
    """What a verifier gets: text as it is, other values as JSON, None as None."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass
class WorldSession:
    """One opened world. Not for two threads at once. A box that died or hung is opened anew by the next `reset`."""

    world: World
    isolation: str = "bwrap"
    timeout_s: float = 10.0
    _boxes: dict[str, Box] = field(default_factory=dict)
    _tools: tuple[dict[str, Any], ...] = ()
    _added_tools: tuple[str, ...] = ()
    _added_rows: dict[str, list[list[Any]]] = field(default_factory=dict)

    def prepare(self, task: Task) -> None:
        """Make the initial state and the tools those of this task."""
        tools, rows = tuple(task.payload.get("added_tools", ())), task.payload.get("added_rows", {})
        if (tools, rows) != (self._added_tools, self._added_rows):
            self._added_tools, self._added_rows = tools, rows
            if "host" in self._boxes:
                self._load_host()
            if "judge" in self._boxes:
                self._load_judge()

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """OpenAI-shaped definitions, the world's and then the added ones."""
        self._host()
        return self._tools

    def reset(self) -> None:
        """The initial state, byte for byte."""
        self._ask("host", {"op": "reset"})

    def digest(self) -> str:
        """SHA-256 of the database's bytes."""
        return self._ask("host", {"op": "digest"})["digest"]

    def call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        """Call one tool. A tool that hangs or kills its process is an observation with an error; the state is then lost."""
        try:
            reply = self._ask("host", {"op": "call", "name": name, "arguments": arguments})
        except BoxError as error:
            text = json.dumps({"error": f"tool_{error.reason}", "message": str(error)[:300]}, ensure_ascii=False)
            return ToolCall(name, arguments, text)
        return ToolCall(name, arguments, reply["observation"], reply["changes"])

    def replay(self, calls: Sequence[Sequence[Any]]) -> Replay:
        """Reset, then make these (name, arguments) calls."""
        reply = self._ask("host", {"op": "replay", "calls": [list(call) for call in calls]})
        done = zip(calls, reply["observations"], reply["changes"], strict=True)
        return Replay(tuple(ToolCall(call[0], call[1], text, n) for call, text, n in done), reply["delta"])

    def delta(self) -> Delta:
        """What differs from the initial state."""
        return self._ask("host", {"op": "delta"})["delta"]

    def initial_rows(self) -> dict[str, list[dict[str, Any]]]:
        """table -> its rows in the initial state."""
        return self._ask("host", {"op": "rows"})["rows"]

    def verify(self, task: Task, delta: Delta, answer: str | None) -> Verdict:
        """Run the task's verification function. Whatever goes wrong with it is INVALID, never a score of 0."""
        try:
            request = {"op": "verify", "source": task.payload["verifier"], "delta": delta, "answer": answer}
            reply = self._ask("judge", request)
        except BoxError as error:
            return invalid(f"verifier: {error.reason}: {error}")
        if "invalid" in reply:
            return invalid(f"verifier: {reply['invalid']}")
        return failed(*reply["reasons"]) if reply["reasons"] else passed()

    def solve(self, source: str, without: str = "") -> Solved:
        """Run a solution function from the initial state in a process without the database; its calls go through here.

        without: the name of a tool that is taken away.
        """
        calls: list[ToolCall] = []

        def call(name: str, arguments: dict[str, Any]) -> Any:
            calls.append(
                ToolCall(name, arguments, '{"error": "unknown_tool"}') if name == without else self.call(name, arguments)
            )
            return _parsed(calls[-1].observation)

        self.reset()
        try:
            reply = self._ask("solver", {"op": "solve", "source": source}, call)
        except BoxError as error:
            reply = {"failure": f"{error.reason}: {error}"}
        return Solved(tuple(calls), self.delta(), reply.get("returned"), reply.get("failure", ""))

    def close(self) -> None:
        for box in self._boxes.values():
            box.close()
        self._boxes.clear()

    def __enter__(self) -> WorldSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _host(self) -> Box:
        if "host" not in self._boxes:
            self._boxes["host"] = open_host(self.isolation)
            self._load_host()
        return self._boxes["host"]

    def _load_host(self) -> None:
        payload = self.world.payload
        rows = {table: [*payload["rows"].get(table, ()), *self._added_rows.get(table, ())] for table in payload["rows"]}
        request = {"op": "load", "schema": payload["schema"], "rows": rows, "keys": payload["keys"]}
        self._tools = tuple(self._ask("host", {**request, "source": [payload["source"], *self._added_tools]})["tools"])

    def _judge(self) -> Box:
        if "judge" not in self._boxes:
            self._boxes["judge"] = open_judge(self.isolation)
            self._load_judge()
        return self._boxes["judge"]

    def _load_judge(self) -> None:
        rows = self.initial_rows()
        self._ask("judge", {"op": "load", "rows": rows, "keys": self.world.payload["keys"]})

    def _box(self, name: str) -> Box:
        if name == "host":
            return self._host()
        if name == "judge":
            return self._judge()
        if name not in self._boxes:
            self._boxes[name] = open_judge(self.isolation)
        return self._boxes[name]

    def _ask(self, name: str, request: dict[str, Any], call: Any = None) -> dict[str, Any]:
        box = self._boxes[name] if request["op"] == "load" else self._box(name)
        try:
            return box.ask(request, self.timeout_s, call)
        except BoxError as error:
            if error.reason != "failure":
                self._boxes.pop(name).close()
            raise


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
