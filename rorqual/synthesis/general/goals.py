"""The goal grammar: what a task asks of the final state and of the answer, as data that is solved exactly.

    Goal   = Step* Ask?
    Step   = act (one call), each (a call for every row of a set), closure (a node and all it requires), path (the cheapest)
    Ref    = Const | Pick (the best row under constraints) | Diff (a difference of two columns of the row in hand)
    Ask    = value of the best row | count | sum | max | min over a set

find and aggregate are an Ask alone; choose-best an act with a Pick; satisfy-all, repair, migrate and reconcile an each whose set
is given by constraints; plan a closure or a path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from rorqual.synthesis.general import calculus, domain
from rorqual.synthesis.general.calculus import Arg, Atom
from rorqual.tasks import Provenance, digest


@dataclass(frozen=True)
class Selector:
    """Rows of a table that satisfy every atom, best first. Policy atoms come from clauses, and stand in no prompt."""

    table: str
    atoms: tuple[Atom, ...] = ()
    order: str = ""
    is_max: bool = False
    tie: str = ""
    """A second order, smallest first."""
    policy: tuple[Atom, ...] = ()

    @property
    def all_atoms(self) -> tuple[Atom, ...]:
        return self.atoms + self.policy


@dataclass(frozen=True)
class Const:
    value: Any


@dataclass(frozen=True)
class Pick:
    """The one row that comes first; it must come first alone."""

    selector: Selector


@dataclass(frozen=True)
class Diff:
    """column - minus of the row in hand."""

    column: str
    minus: str


Ref = Const | Pick | Diff


@dataclass(frozen=True)
class Step:
    kind: str
    """act, each, closure or path."""
    action: str
    args: Mapping[str, Ref]
    """Of each: without the target. Of path: the thing, and `goal`, the node to reach."""
    target: str = ""
    """The parameter that takes each row of `each`."""
    each: Selector | None = None
    cost: str = ""
    """path: the column whose sum is smallest."""


@dataclass(frozen=True)
class Ask:
    kind: str
    """value, count, sum, max or min."""
    selector: Selector
    column: str = ""


@dataclass(frozen=True)
class Goal:
    kind: str
    """find, aggregate, choose_best, satisfy_all, repair, migrate, reconcile or plan; what its first step is."""
    steps: tuple[Step, ...] = ()
    ask: Ask | None = None
    clauses: tuple[int, ...] = ()
    """The world's policy clauses that are in force and told to the agent."""


def selectors(goal: Goal) -> Iterator[Selector]:
    for step in goal.steps:
        if step.each:
            yield step.each
        for value in step.args.values():
            if isinstance(value, Pick):
                yield value.selector
    if goal.ask:
        yield goal.ask.selector


def in_order(args: Mapping[str, Ref]) -> Iterator[tuple[str, Ref]]:
    """A step's arguments, each after those that its selector names; a stored goal's come sorted by name instead."""
    waiting = dict(args)
    while waiting:
        free = (name for name, value in waiting.items() if not _named(value) & (waiting.keys() - {name}))
        name = next(free, next(iter(waiting)))
        yield name, waiting.pop(name)


def _named(value: Ref) -> set[str]:
    """The heads of the paths that an argument is compared with."""
    if not isinstance(value, Pick):
        return set()
    return {atom.value.path.partition(".")[0] for atom in value.selector.all_atoms if isinstance(atom.value, Arg)}


TYPES = {
    name: kind
    for module in (calculus, domain, sys.modules[__name__])
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind)
}


def encode(value: Any) -> Any:
    """Descriptions and goals as JSON; `decode` gives them back."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {f.name: encode(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default}
        return {"~": type(value).__name__, **given}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    given = {name: decode(item) for name, item in value.items() if name != "~"}
    if "~" not in value:
        return given
    return _provenance(given) if value["~"] == "Provenance" else TYPES[value["~"]](**given)


def _provenance(given: dict[str, Any]) -> Provenance:
    return Provenance(**given)


def skeleton(goal: Goal) -> str:
    """A hash of the goal's form: no constants, no names of the world."""
    return digest(_form(encode(goal), {}))


def _form(value: Any, names: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_form(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in ("action", "table", "path", "minus", "order", "tie", "column", "cost", "target"):
            kept[name] = [names.setdefault(part, len(names)) for part in str(item).split(".")]
        elif name == "value" and not isinstance(item, dict):
            kept[name] = type(item).__name__
        elif name == "args":
            kept[name] = [_form(v, names) for v in item.values()]
        else:
            kept[name] = _form(item, names)
    return kept


__all__ = ["Arg", "Ask", "Const", "Diff", "Goal", "Pick", "Ref", "Selector", "Step", "decode", "encode", "selectors", "skeleton"]
