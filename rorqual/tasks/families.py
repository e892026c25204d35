"""How each family of tasks is opened and proves itself: a dictionary, filled on demand.

A family is two functions over frozen data. To add one, write them in a module of this room and name it here; the makers of
its tasks, with all their gates, are named likewise in `rorqual.synthesis.FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from rorqual.tasks.episode import Episode
from rorqual.tasks.task import GateResult, Task, TaskError, World


@dataclass(frozen=True)
class Family:
    """What the rest of the system must know of a kind of task."""

    name: str
    open: Callable[[Task, World | None, str], Episode]
    """(task, its world, isolation) -> an episode. isolation: "inline" or a back end of `rorqual.sandbox`."""
    validate: Callable[[Task, World | None, str], list[GateResult]]
    """Proves the task without a model: at least that doing nothing fails and that the gold solution passes."""


FAMILIES: dict[str, str] = {
    "general": "rorqual.tasks.general:FAMILY",
    "code": "rorqual.tasks.code:FAMILY",
    "search": "rorqual.tasks.search:FAMILY",
    "interpreter": "rorqual.tasks.interpreter:FAMILY",
    "maths": "rorqual.tasks.textual:MATHS",
    "logic": "rorqual.tasks.textual:LOGIC",
    "programming": "rorqual.tasks.textual:PROGRAMMING",
    "writing": "rorqual.tasks.textual:WRITING",
    "proof": "rorqual.tasks.proof_tasks:FAMILY",
}
"""name -> "module:attribute" of its Family."""


def family(name: str) -> Family:
    """A family by name. Raises TaskError where there is none."""
    if name not in FAMILIES:
        raise TaskError(f"there is no family of tasks {name!r}; there are {', '.join(sorted(FAMILIES))}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def open_episode(task: Task, world: World | None = None, isolation: str = "bwrap") -> Episode:
    """An episode of the task; close it."""
    return family(task.family).open(task, world, isolation)


def validate(task: Task, world: World | None = None, isolation: str = "bwrap") -> list[GateResult]:
    """The task's proof of itself, without a model. `rorqual validate` re-runs every gate of its family instead."""
    return family(task.family).validate(task, world, isolation)
