"""A world's plan (which mechanisms, joined through which shared entities, under which names and surfaces) and its population."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import cached_property
from itertools import combinations

from rorqual.synthesis.general.calculus import (
    KEY,
    Action,
    Arg,
    Atom,
    Clause,
    Closure,
    Column,
    Derived,
    Mechanism,
    Path,
    Table,
    renamed,
)
from rorqual.synthesis.general.corpora import Corpus, Missing, corpus
from rorqual.synthesis.general.mechanisms_more import MECHANISMS
from rorqual.tasks import Provenance, TaskError

Row = dict[str, object]
Rows = dict[str, list[Row]]
FIRST_DAY = date(2025, 1, 1)
MAX_ROWS = 40

ROLE_NOUNS = {
    "site": ("site", "branch", "station", "depot"),
    "party": ("client", "member", "office", "partner"),
    "item": ("item", "article", "subject", "product"),
    "staff": ("operator", "agent", "officer", "clerk"),
}
ROLE_CORPORA = {
    "site": ("zones", "subdivisions", "countries"),
    "party": ("languages", "currencies", "subdivisions", "countries"),
    "item": ("packages", "media_types", "manual_pages", "services", "characters", "elements"),
    "staff": ("scripts", "characters", "languages"),
}
SECOND_CHOICE = {"site": "characters", "party": "characters", "item": "media_types", "staff": "characters"}
"""What stands in for a corpus that this machine lacks, where the plan's first choice is missing; the world says so."""
READERS = ("list", "search", "keyed", "by_parent")
"""How a table is read: whole in pages; by filters in pages; ids and then one by one; or by what it refers to."""


@dataclass(frozen=True)
class Plan:
    """All that is decided before any data is read: a pure function of the seed and the index."""

    seed: int
    index: int
    mechanisms: tuple[tuple[str, tuple[str, ...]], ...]
    """(name, options taken)."""
    nouns: Mapping[str, str]
    verbs: Mapping[str, str]
    corpora: Mapping[str, str]
    readers: Mapping[str, str]
    clauses: tuple[int, ...]
    enforced: tuple[int, ...]
    page_len: int
    counted: tuple[str, ...]
    """Tables with a counting tool."""
    bare_result: bool
    """Write tools answer with the id alone, or with the row."""
    is_compact: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.mechanisms)


def make_plan(seed: int, index: int, compact_share: float = 0.15) -> Plan:
    """The index-th plan of a seed."""
    rng = random.Random(f"plan/{seed}/{index}")
    is_compact = rng.random() < compact_share
    names = _joined_mechanisms(rng, 2 if is_compact else rng.choice((2, 2, 3, 3, 4)))
    chosen = [(name, tuple(o for o in MECHANISMS[name].options if rng.random() < 0.5)) for name in names]
    mechanisms = [MECHANISMS[name].with_options(options) for name, options in chosen]
    tables = [table for mechanism in mechanisms for table in mechanism.tables]
    clauses = [clause for mechanism in mechanisms for clause in mechanism.clauses]
    taken = tuple(i for i in range(len(clauses)) if rng.random() < 0.6)
    return Plan(
        seed, index, tuple(chosen),
        nouns={**{t.name: rng.choice(t.nouns) for t in tables}, **{r: rng.choice(n) for r, n in ROLE_NOUNS.items()}},
        verbs={a.name: rng.choice((a.name, *a.verbs)) for m in mechanisms for a in m.actions},
        corpora=_distinct_corpora(rng),
        readers={t: _reader(rng, is_compact) for t in [*ROLE_NOUNS, *(t.name for t in tables)]},
        clauses=taken,
        enforced=tuple(i for i in taken if rng.random() < 0.3),
        page_len=50 if is_compact else rng.choice((10, 15, 25, 50)),
        counted=tuple(t.name for t in tables if not is_compact and rng.random() < 0.25),
        bare_result=rng.random() < 0.5,
        is_compact=is_compact,
    )  # fmt: skip


def _joined_mechanisms(rng: random.Random, count: int) -> tuple[str, ...]:
    """Mechanisms of which each shares an entity table with one before it."""
    while True:
        names = rng.sample(sorted(MECHANISMS), count)
        if all(any(set(MECHANISMS[a].roles) & set(MECHANISMS[b].roles) for b in names if b != a) for a in names):
            return tuple(sorted(names))


def _distinct_corpora(rng: random.Random) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for role, names in ROLE_CORPORA.items():
        chosen[role] = rng.choice([name for name in names if name not in chosen.values()])
    return chosen


def _reader(rng: random.Random, is_compact: bool) -> str:
    return "list" if is_compact else rng.choices(READERS, (4, 4, 1, 2))[0]


@dataclass(frozen=True)
class Domain:
    """A plan put together: tables, actions, invariants and policies under the world's own names."""

    plan: Plan
    tables: Mapping[str, Table]
    actions: tuple[Action, ...]
    derived: tuple[Derived, ...]
    clauses: tuple[Clause, ...]
    plans: tuple[Path | Closure, ...]
    readers: Mapping[str, str]
    counted: tuple[str, ...]
    themes: tuple[str, ...]
    labels: Mapping[str, str]
    """Entity table -> the name of its corpus."""
    provenance: tuple[Provenance, ...]

    def action(self, name: str) -> Action:
        return next(action for action in self.actions if action.name == name)

    def follow(self, table: str, path: str) -> tuple[str, Column | None]:
        """Where a path from a row of the table ends: (table, column); column None is the row's key."""
        column: Column | None = None
        for part in path.split("."):
            if column is not None:
                table = column.target
            column = None if part == KEY else self.tables[table].column(part)
        return table, column

    @cached_property
    def derived_columns(self) -> frozenset[tuple[str, str]]:
        return frozenset((d.table, d.column) for d in self.derived)

    @property
    def keys(self) -> dict[str, str]:
        return dict.fromkeys(self.tables, KEY)


def make_domain(plan: Plan) -> Domain:
    """Put a plan together. Raises TaskError where neither the planned corpus of a role nor its second choice is to be had."""
    mechanisms = [MECHANISMS[name].with_options(options) for name, options in plan.mechanisms]
    roles = [role for role in ROLE_NOUNS if any(role in m.roles for m in mechanisms)]
    read = {role: _corpus_for(role, plan.corpora[role]) for role in roles}
    entities = {role: _entity_table(role, read[role][0], plan) for role in roles}
    made: list[Mechanism] = [renamed(m, plan.nouns) for m in mechanisms]
    plural = {noun: noun for noun in plan.nouns.values()}
    tables = {
        table.name: table
        for table in [*(renamed(t, plan.nouns) for t in entities.values()), *(t for m in made for t in m.tables)]
    }
    assert all(name in plural for name in tables)
    clauses = [clause for m in made for clause in m.clauses]
    return Domain(
        plan,
        tables={name: _sized(table, plan) for name, table in tables.items()},
        actions=tuple(replace(a, name=plan.verbs[a.name]) for m in made for a in m.actions),
        derived=tuple(d for m in made for d in m.derived),
        clauses=tuple(
            replace(clauses[i], action=plan.verbs[clauses[i].action], is_enforced=i in plan.enforced) for i in plan.clauses
        ),
        plans=tuple(replace(p, action=plan.verbs[p.action]) for m in made for p in m.plans),
        readers={plan.nouns[name]: reader for name, reader in plan.readers.items() if plan.nouns[name] in tables},
        counted=tuple(plan.nouns[name] for name in plan.counted),
        themes=tuple(m.theme for m in mechanisms),
        labels={plan.nouns[role]: read[role][0].name for role in roles},
        provenance=tuple(p for _, found in read.values() for p in found),
    )


def _corpus_for(role: str, name: str) -> tuple[Corpus, list[Provenance]]:
    found = corpus(name)
    if isinstance(found, Corpus):
        return found, [found.provenance]
    second = corpus(SECOND_CHOICE[role])
    if isinstance(second, Missing):
        raise TaskError(f"{role}: {found.reason}; and its second choice, {second.reason}")
    return second, [Provenance(name, f"missing ({found.reason}); {second.name} stands in"), second.provenance]


def _entity_table(role: str, found: Corpus, plan: Plan) -> Table:
    columns = (Column("name", "label"), Column(found.kind, "enum"), Column(found.measure, "int"))
    sizes = {"site": (8, 12), "party": (10, 16), "item": (12, 18), "staff": (6, 10)}
    return Table(role, columns, (5, 6) if plan.is_compact else sizes[role], ROLE_NOUNS[role], is_entity=True)


def _sized(table: Table, plan: Plan) -> Table:
    if not plan.is_compact or table.is_entity:
        return table
    return replace(table, rows=(6, 9))


def populate(domain: Domain, seed: str) -> Rows:
    """Rows for every table that keep every invariant; the same for one seed, under ids that tell nothing."""
    rng = random.Random(f"rows/{seed}")
    rows: Rows = {}
    for name, table in domain.tables.items():
        count = rng.randint(*table.rows)
        rows[name] = _entity_rows(domain, name, rng, count) if table.is_entity else _table_rows(domain, table, rng, count, rows)
        for i, row in enumerate(rows[name]):
            row[KEY] = f"{prefix(name)}{_opaque(seed, name, i)}"
        rows[name] = sorted(({KEY: row[KEY], **row} for row in rows[name]), key=lambda row: str(row[KEY]))
    _settle(domain, rows, rng)
    return rows


def prefix(table: str) -> str:
    return "".join(part[:3] for part in table.split("_"))[:3].upper() + "-"


def _opaque(seed: str, table: str, i: int) -> str:
    return hashlib.sha256(f"{seed}/{table}/{i}".encode()).hexdigest()[:5].upper()


def _entity_rows(domain: Domain, name: str, rng: random.Random, count: int) -> list[Row]:
    found = corpus(domain.labels[name])
    assert isinstance(found, Corpus)
    chosen = rng.sample(found.entities, count)
    return [{"name": label, found.kind: kind, found.measure: measure} for label, kind, measure in chosen]


def _table_rows(domain: Domain, table: Table, rng: random.Random, count: int, rows: Rows) -> list[Row]:
    edges = _edge_columns(domain, table.name)
    made: list[Row] = []
    seen = set()
    for i in range(count * 3):
        row = {column.name: _value(column, rng, rows) for column in table.columns}
        for column in table.columns:
            if column.null_in and row["status"] in column.null_in:
                row[column.name] = None
            if column.copied:
                row[column.name] = _lookup(domain, rows, table.name, row, column.copied)
        if edges:
            _lay_edge(row, edges, rows, table, i)
        key = tuple(row[name] for name in table.is_distinct) or i
        if key not in seen and len(made) < count and not (edges and row[edges[0]] == row[edges[1]]):
            seen.add(key)
            made.append(row)
    return made


def _edge_columns(domain: Domain, table: str) -> tuple[str, str, bool] | None:
    """(source, target, is_acyclic) of a table that holds the edges of a graph."""
    for plan in domain.plans:
        if isinstance(plan, Path) and plan.edges == table:
            return plan.source, plan.target, False
        if isinstance(plan, Closure) and plan.closed.edges == table:
            return plan.closed.source, plan.closed.target, True
    return None


def _lay_edge(row: Row, edges: tuple[str, str, bool], rows: Rows, table: Table, i: int) -> None:
    """Requirements point at earlier rows, so they have no cycle; the first legs of a network go once round all places."""
    source, target, is_acyclic = edges
    ids = [r[KEY] for r in rows[table.column(target).target]]
    if is_acyclic:
        a, b = ids.index(row[source]), ids.index(row[target])
        row[source], row[target] = ids[max(a, b)], ids[min(a, b)]
    elif i < len(ids):
        row[source], row[target] = ids[i], ids[(i + 1) % len(ids)]


def _value(column: Column, rng: random.Random, rows: Rows) -> object:
    if column.kind == "int":
        return rng.randint(column.low, column.high)
    if column.kind == "enum":
        return rng.choice(column.values)
    if column.kind == "ref":
        return rng.choice(rows[column.target])[KEY]
    if column.kind == "date":
        return (FIRST_DAY + timedelta(days=rng.randrange(360))).isoformat()
    raise ValueError(f"column {column.name}: no values of kind {column.kind}")


def _lookup(domain: Domain, rows: Rows, table: str, row: Row, path: str) -> object:
    parts = path.split(".")
    for part in parts[:-1]:
        table = domain.tables[table].column(part).target
        row = next(r for r in rows[table] if r[KEY] == row[part])
    return row[parts[-1]]


def _settle(domain: Domain, rows: Rows, rng: random.Random) -> None:
    """Compute the derived columns, and lift limits that they break."""
    for derived in domain.derived:
        for row in rows[derived.table]:
            children = [c for c in rows[derived.child] if c[derived.ref] == row[KEY]]
            counted = [c for c in children if not derived.states or c[derived.state] in derived.states]
            total = sum(int(str(c[derived.value])) if derived.value else 1 for c in counted)
            row[derived.column] = total + (int(str(row[derived.base])) if derived.base else 0)
    for table, limit, used in _limits(domain):
        for row in rows[table]:
            if int(str(row[used])) > int(str(row[limit])):
                row[limit] = int(str(row[used])) + rng.randint(0, 2)


def _limits(domain: Domain) -> Iterator[tuple[str, str, str]]:
    """(table, limit column, used column) of guards such as capacity - taken >= seats, and load < limit."""
    for action in domain.actions:
        for guard in action.guards:
            atom, target = guard.atom, next((p.target for p in action.refs if p.name == guard.param), "")
            column = atom.path.partition(".")[2]
            if atom.minus:
                yield target, column, atom.minus.partition(".")[2]
            elif atom.op == "<" and isinstance(atom.value, Arg) and atom.value.path.startswith(guard.param + "."):
                yield target, atom.value.path.partition(".")[2], column


def connected_pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of mechanisms that share an entity table."""
    return [(a, b) for a, b in combinations(names, 2) if set(MECHANISMS[a].roles) & set(MECHANISMS[b].roles)]


def clause_atoms(domain: Domain, action: str, param: str) -> tuple[Atom, ...]:
    """What the policies demand of one parameter of an action, as atoms over its row."""
    found = []
    for clause in domain.clauses:
        head, _, rest = clause.atom.path.partition(".")
        if clause.action == action and head == param:
            found.append(replace(clause.atom, path=rest))
    return tuple(found)
