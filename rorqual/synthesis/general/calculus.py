"""The typed calculus in which mechanisms are written: tables, derived columns, guards, actions, policy clauses.

Everything is data, so that one description yields the tools (Python source), the exact solution (SQL), the verifier (Python
predicates) and the prose, each by its own route. Names in a description are canonical; a world renames tables and actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

KEY = "id"
Value = Any
"""A constant, or an Arg."""


@dataclass(frozen=True)
class Arg:
    """The value of another parameter (`seats`), or of a column reached from it (`party.tier`)."""

    path: str


@dataclass(frozen=True)
class Atom:
    """A comparison: `path` (or path - minus) of a row, against a value. Paths go over references: `slot.site.region`."""

    path: str
    op: str
    """One of == != <= >= < > in."""
    value: Value
    minus: str = ""

    @property
    def is_constant(self) -> bool:
        return not isinstance(self.value, Arg)


@dataclass(frozen=True)
class Column:
    """A column. kind: label, text, enum, int, date, bool, ref."""

    name: str
    kind: str
    values: tuple[str, ...] = ()
    target: str = ""
    """The table that a ref points at."""
    low: int = 0
    high: int = 0
    null_in: tuple[str, ...] = ()
    """A ref is null while the row's status is one of these."""
    copied: str = ""
    """An int that repeats what this path leads to."""


@dataclass(frozen=True)
class Derived:
    """An invariant: table.column = table.base + sum(sign * child.value) over children that point here in the given states."""

    table: str
    column: str
    child: str
    ref: str
    base: str = ""
    """A column of the table; empty for 0."""
    value: str = ""
    """A column of the child; empty counts children."""
    state: str = ""
    states: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    rows: tuple[int, int] = (16, 28)
    nouns: tuple[str, ...] = ()
    """Singular nouns that a world may call a row by; the first is the plainest."""
    is_entity: bool = False
    is_distinct: tuple[str, ...] = ()
    """Columns that together occur once."""

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)


@dataclass(frozen=True)
class Param:
    """A parameter of an action. kind: ref, int, enum, text."""

    name: str
    kind: str
    target: str = ""
    values: tuple[str, ...] = ()
    low: int = 1
    high: int = 1


@dataclass(frozen=True)
class Guard:
    """An action is refused with `code` unless the atom holds; the atom's path starts at a parameter."""

    atom: Atom
    code: str

    @property
    def param(self) -> str:
        return self.atom.path.partition(".")[0]


@dataclass(frozen=True)
class Absent:
    """Refused where a row with these values is there already: column -> Arg or constant."""

    table: str
    match: Mapping[str, Value]
    code: str = "already_done"


@dataclass(frozen=True)
class Closed:
    """Refused unless for each edge from `node` there is a row in `table` with owner and the edge's target."""

    edges: str
    source: str
    target: str
    table: str
    owner: str
    node: str
    owner_param: str
    node_param: str
    code: str = "requirement_missing"


@dataclass(frozen=True)
class Move:
    """A step of a life cycle: param's `column` goes from one of the states to another."""

    param: str
    column: str
    origins: tuple[str, ...]
    to: str


@dataclass(frozen=True)
class Insert:
    table: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Put:
    """Set a column of a parameter's row to a value."""

    param: str
    column: str
    value: Value


@dataclass(frozen=True)
class Adjust:
    """How the tools keep a derived column: param-path.column += sign * value (a constant or an Arg)."""

    path: str
    column: str
    value: Value
    sign: int = 1


@dataclass(frozen=True)
class Action:
    """A write tool: refused or done whole."""

    name: str
    phrase: str
    """What it does, in the imperative, with {param} for each parameter."""
    params: tuple[Param, ...]
    moves: tuple[Move, ...] = ()
    guards: tuple[Guard, ...] = ()
    absent: tuple[Absent, ...] = ()
    closed: tuple[Closed, ...] = ()
    inserts: tuple[Insert, ...] = ()
    puts: tuple[Put, ...] = ()
    adjusts: tuple[Adjust, ...] = ()
    verbs: tuple[str, ...] = ()
    """Other names a world may give it."""
    is_bulk: bool = True
    """May be asked for every row of a set."""

    def param(self, name: str) -> Param:
        return next(param for param in self.params if param.name == name)

    @property
    def refs(self) -> tuple[Param, ...]:
        return tuple(param for param in self.params if param.kind == "ref")


@dataclass(frozen=True)
class Clause:
    """A policy: an action may only be used where the atom holds. Enforced by the tool, or left to the agent's obedience."""

    action: str
    atom: Atom
    is_enforced: bool = False


@dataclass(frozen=True)
class Path:
    """A plan by the cheapest path: `action(thing, edge)` moves a thing along edges from thing.at to a goal node."""

    action: str
    thing: str
    edge: str
    edges: str
    source: str
    target: str
    at: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class Closure:
    """A plan by requirements: `action(owner, node)` for a node and all it requires that the owner lacks, in order."""

    action: str
    closed: Closed


@dataclass(frozen=True)
class Mechanism:
    """A piece of a domain with semantics of its own. Roles are shared entity tables: site, party, item, staff."""

    name: str
    theme: str
    """What the world is about, for the system message."""
    tables: tuple[Table, ...]
    actions: tuple[Action, ...]
    derived: tuple[Derived, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """name -> what it adds: columns (table -> columns), actions. A world takes a subset."""
    clauses: tuple[Clause, ...] = ()
    plans: tuple[Path | Closure, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        own = {table.name for table in self.tables}
        targets = [column.target for table in self.tables for column in table.columns if column.kind == "ref"]
        return tuple(dict.fromkeys(target for target in targets if target not in own))

    def with_options(self, names: tuple[str, ...]) -> Mechanism:
        """The mechanism with some of its options taken up."""
        made = self
        for name in names:
            option = self.options[name]
            columns = option.get("columns", {})
            tables = tuple(replace(t, columns=t.columns + tuple(columns.get(t.name, ()))) for t in made.tables)
            made = replace(made, tables=tables, actions=made.actions + tuple(option.get("actions", ())))
            made = replace(made, clauses=made.clauses + tuple(option.get("clauses", ())))
        return replace(made, options={})


def ref(name: str, target: str = "", null_in: tuple[str, ...] = ()) -> Column:
    return Column(name, "ref", target=target or name, null_in=null_in)


def number(name: str, low: int, high: int) -> Column:
    return Column(name, "int", low=low, high=high)


def choice(name: str, *values: str) -> Column:
    return Column(name, "enum", values=values)


def day(name: str) -> Column:
    return Column(name, "date")


KEPT = {
    Column: ("kind", "values", "null_in"),
    Param: ("kind", "values"),
    Guard: ("code",),
    Absent: ("code",),
    Closed: ("code",),
    Move: ("origins", "to"),
    Atom: ("op",),
    Derived: ("states",),
    Table: ("nouns",),
    Action: ("name", "verbs"),
    Clause: ("action",),
    Path: ("action",),
    Closure: ("action",),
    Mechanism: ("name", "theme"),
}
"""Fields that hold no names of tables."""
CONSTANTS = {Atom: ("value",), Put: ("value",), Adjust: ("value",)}
"""Fields whose text is a constant, unless it is an Arg."""


def renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A description with its tables, and the columns and parameters called after them, under other names."""
    if isinstance(node, str):
        return ".".join(names.get(part, part) for part in node.split("."))
    if isinstance(node, tuple):
        return tuple(renamed(item, names) for item in node)
    if isinstance(node, Mapping):
        return {renamed(key, names): value if isinstance(value, str) else renamed(value, names) for key, value in node.items()}
    if not is_dataclass(node) or isinstance(node, type):
        return node
    changes = {}
    for f in fields(node):
        value = getattr(node, f.name)
        is_constant = f.name in CONSTANTS.get(type(node), ()) and isinstance(value, str)
        if f.name == "phrase":
            changes[f.name] = _renamed_phrase(value, names)
        elif f.name not in KEPT.get(type(node), ()) and not is_constant:
            changes[f.name] = renamed(value, names)
    return replace(node, **changes)


def _renamed_phrase(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace("{" + old + "}", "{" + new + "}")
    return text
