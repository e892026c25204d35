"""Floor 4: tasks out of models and programs.

A maker of a family is three functions; to add one, write them in a module of this room and name it in FAMILIES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.errors import UsageError
from rorqual.tasks import GateResult, Store, Task, World


@dataclass(frozen=True)
class Request:
    """What a user asked for."""

    count: int
    store: Store
    seed: int = 0
    workers: int = 1
    """Processes, or with Ray the tasks of the cluster at a time (0: one for each of its processors)."""
    endpoint: str | None = None
    """The base URL of an OpenAI-compatible API whose model plays every role; None: programs do."""
    model: str = ""
    """The model's name at the endpoint."""
    overrides: Sequence[str] = ()
    """a.b=c for the family's own config."""
    on_progress: Callable[[int, str], Any] = field(default=lambda done, note: None)
    """(tasks accepted so far, a note)."""
    engine: Literal["local", "ray"] = "local"
    """Whose the workers are (rorqual/workers.py)."""


@dataclass(frozen=True)
class Maker:
    """How a family's tasks are made, and how every gate of a stored one is run again."""

    name: str
    synthesize: Callable[[Request], Mapping[str, Any]]
    """Fills and seals the store, going on where it was left; gives back a report of figures."""
    regate: Callable[[Task, World | None, str], list[GateResult]]
    """(task, its world, isolation) -> the result of every gate."""


FAMILIES: dict[str, str] = {
    "general": "rorqual.synthesis.general:MAKER",
    "code": "rorqual.synthesis.code:MAKER",
    "search": "rorqual.synthesis.search:MAKER",
    "interpreter": "rorqual.synthesis.interpreter:MAKER",
    "maths": "rorqual.synthesis.reasoning:MATHS",
    "logic": "rorqual.synthesis.reasoning:LOGIC",
    "programming": "rorqual.synthesis.reasoning:PROGRAMMING",
    "writing": "rorqual.synthesis.reasoning:WRITING",
    "proof": "rorqual.synthesis.reasoning.derivations:MAKER",
    "primer": "rorqual.synthesis.primers:MAKER",
}
"""name -> "module:attribute" of its Maker."""


def maker(name: str) -> Maker:
    """A maker by name. Raises UsageError where there is none."""
    if name not in FAMILIES:
        raise UsageError(f"--family {name}: there are {', '.join(sorted(FAMILIES))}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
