"""Task data, frozen and serialisable, apart from all behaviour: what an agent is shown, and what checks it.

A `Task` is one question. A `World` is what several tasks share: a database and tools over it, a corpus, a repository. Both are
plain JSON; the family they name (`rorqual.tasks.families`) knows how to open them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rorqual.errors import UserError

Json = dict[str, Any]


class TaskError(UserError):
    """Task data that can't be read or played: names the task or file, and what is wrong with it."""


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, Unicode kept. Fingerprints and byte identity rest on it."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256 of the canonical text, cut to `length` characters."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Provenance:
    """Where a piece of data came from."""

    source: str
    """A file or command, such as /usr/share/zoneinfo/zone1970.tab."""
    key: str = ""
    """What was taken from it."""
    sha256: str = ""
    """Of what was read, so that another machine can tell whether it holds the same."""
    licence: str = ""


@dataclass(frozen=True)
class World:
    """What several tasks share. `payload` is the family's own and is never shown to an agent."""

    id: str
    family: str
    payload: Json
    fingerprint: str = ""
    """Structure only, names stripped: two worlds that differ in words alone have the same one."""
    mechanisms: tuple[str, ...] = ()
    """What it is made of; splits hold out combinations of them."""
    provenance: tuple[Provenance, ...] = ()

    def to_json(self) -> Json:
        return _to_json(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> World:
        return _from_json(World, value, provenance=_provenance, mechanisms=tuple)


@dataclass(frozen=True)
class Task:
    """One question with its check. `messages` and `tools` are all that an agent sees; `payload` is hidden."""

    id: str
    family: str
    messages: tuple[Json, ...]
    """OpenAI-shaped: an optional system message, then the user's."""
    tools: tuple[Json, ...] = ()
    """OpenAI-shaped function definitions; empty where the answer is text alone."""
    world: str = ""
    """The id of its World in the store; empty where it needs none."""
    payload: Json = field(default_factory=dict)
    """The family's own: solution, verifier, goal, gold answer."""
    tier: int = 0
    """Difficulty, from 0; a family says how it measures it."""
    max_calls: int = 32
    """Tool calls an episode may make."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Such as language, register, surface, skeleton. Used by splits and reports, never by a check."""
    provenance: tuple[Provenance, ...] = ()

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def key(self) -> str:
        """A digest of the whole task: two tasks with one key are the same task."""
        return digest(self.to_json())

    def to_json(self) -> Json:
        return _to_json(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Task:
        return _from_json(Task, value, provenance=_provenance, messages=tuple, tools=tuple)


@dataclass(frozen=True)
class GateResult:
    """What came of one check of a task by execution."""

    name: str
    passed: bool
    detail: str = ""
    """One line for a person; empty where there is nothing to say."""
    measures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> Json:
        return _to_json(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> GateResult:
        return _from_json(GateResult, value)


@dataclass(frozen=True)
class TaskRow:
    """A line of the store: a task, the result of each gate, and what was measured of it (pass@k and the like)."""

    task: Task
    gates: tuple[GateResult, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_accepted(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> Json:
        return {
            "task": self.task.to_json(),
            "gates": [gate.to_json() for gate in self.gates],
            "measures": dict(self.measures),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TaskRow:
        gates = tuple(GateResult.from_json(gate) for gate in value.get("gates", ()))
        return TaskRow(Task.from_json(value["task"]), gates, value.get("measures", {}))


def _to_json(record: Any) -> Json:
    return {f.name: _plain(getattr(record, f.name)) for f in fields(record)}


def _plain(value: Any) -> Any:
    if isinstance(value, Provenance):
        return {f.name: text for f in fields(value) if (text := getattr(value, f.name))}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _provenance(values: Sequence[Mapping[str, str]]) -> tuple[Provenance, ...]:
    return tuple(Provenance(**value) for value in values)


def _from_json(kind: type, value: Mapping[str, Any], **readers: Any) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise TaskError(f"a {kind.__name__} has no field {', '.join(unknown)}; it was written by another version")
    try:
        return kind(**{name: readers.get(name, lambda item: item)(item) for name, item in value.items()})
    except TypeError as error:
        raise TaskError(f"not a {kind.__name__}: {error}") from None
