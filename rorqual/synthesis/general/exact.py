"""The exact solver: SQL over the real rows. It proves that each optimum exists and is unique, or says why a goal is refused."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.synthesis.general.calculus import Action, Arg, Atom, Closure, Path
from rorqual.synthesis.general.domain import Domain
from rorqual.synthesis.general.goals import Ask, Const, Diff, Goal, Pick, Ref, Selector, Step

Bound = dict[str, tuple[str, Any]]
"""Name -> (table, key) of a row, or ("", value)."""


class Unsolvable(Exception):
    """Why a goal has no unique solution: none, tie, few, many, first, size."""


@dataclass(frozen=True)
class Solution:
    """The calls that a goal amounts to, and the answer."""

    calls: tuple[tuple[str, dict[str, Any]], ...]
    answer: str | None
    picked: tuple[tuple[str, Any], ...]
    """(table, key) of every row that was chosen by constraints, which no prompt may name."""


class Exact:
    """Solves goals over one database. The connection is only read."""

    def __init__(self, domain: Domain, db: sqlite3.Connection):
        self.domain = domain
        self.db = db

    def solve(self, goal: Goal) -> Solution:
        """Raises Unsolvable."""
        bound: Bound = {}
        calls: list[tuple[str, dict[str, Any]]] = []
        picked: list[tuple[str, Any]] = []
        for i, step in enumerate(goal.steps):
            calls += self._step(i, step, bound, picked)
        answer = self.answer(goal.ask, bound, picked) if goal.ask else None
        return Solution(tuple(calls), answer, tuple(picked))

    def _step(self, i: int, step: Step, bound: Bound, picked: list[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        action = self.domain.action(step.action)
        local = dict(bound)
        for name, value in step.args.items():
            if not isinstance(value, Diff):
                local[name] = self._resolve(value, local, picked)
                bound[f"step{i}.{name}"] = local[name]
        if step.kind == "each":
            return [(step.action, self._each_args(step, action, key, local)) for key in self._set(step, local)]
        if step.kind == "closure":
            return self._closure(step, local)
        if step.kind == "path":
            return self._path(step, local)
        return [(step.action, {p.name: local[p.name][1] for p in action.params})]

    def _resolve(self, value: Ref, bound: Bound, picked: list[tuple[str, Any]]) -> tuple[str, Any]:
        if isinstance(value, Const):
            return "", value.value
        assert isinstance(value, Pick)
        key = self.pick(value.selector, bound)
        if not is_named(value.selector):
            picked.append((value.selector.table, key))
        return value.selector.table, key

    def _set(self, step: Step, bound: Bound) -> list[str]:
        assert step.each is not None
        keys = self.select(step.each, bound)
        if not 2 <= len(keys) <= 8:
            raise Unsolvable("size")
        return keys

    def _each_args(self, step: Step, action: Action, key: str, bound: Bound) -> dict[str, Any]:
        assert step.each is not None
        here: Bound = {**bound, "it": (step.each.table, key)}
        args = {}
        for param in action.params:
            value = step.args.get(param.name)
            if param.name == step.target:
                args[param.name] = key
            elif isinstance(value, Diff):
                args[param.name] = self.worth(f"it.{value.column}", here) - self.worth(f"it.{value.minus}", here)
            else:
                args[param.name] = here[param.name][1]
        return args

    def pick(self, selector: Selector, bound: Bound) -> str:
        """The key that comes first alone."""
        keys = self.select(selector, bound)
        if not keys:
            raise Unsolvable("none")
        if not selector.order:
            if len(keys) > 1:
                raise Unsolvable("tie")
            return keys[0]
        if len(keys) > 1 and self._rank(selector, keys[0]) == self._rank(selector, keys[1]):
            raise Unsolvable("tie")
        return keys[0]

    def _rank(self, selector: Selector, key: str) -> tuple[Any, ...]:
        bound: Bound = {"it": (selector.table, key)}
        return tuple(self.worth(f"it.{path}", bound) for path in (selector.order, selector.tie) if path)

    def select(self, selector: Selector, bound: Bound) -> list[str]:
        """The keys of the rows that satisfy every atom, best first, then by key."""
        query = _Query(self.domain, selector.table)
        values: list[Any] = []
        for atom in selector.all_atoms:
            query.where.append(self._condition(query, atom, bound, values))
        if selector.order:
            query.order.append(query.column(selector.order) + (" DESC" if selector.is_max else ""))
        if selector.tie:
            query.order.append(query.column(selector.tie))
        return [row[0] for row in self.db.execute(query.text(), values)]

    def _condition(self, query: _Query, atom: Atom, bound: Bound, values: list[Any]) -> str:
        left = query.column(atom.path)
        if atom.minus:
            left += f" - {query.column(atom.minus)}"
        if isinstance(atom.value, Arg) and atom.value.path.startswith("self."):
            return f"{left} {atom.op} {query.column(atom.value.path.removeprefix('self.'))}"
        value = self.worth(atom.value.path, bound) if isinstance(atom.value, Arg) else atom.value
        if atom.op == "in":
            values.extend(value)
            return f"{left} IN ({','.join('?' * len(value))})"
        values.append(value)
        return f"{left} {atom.op} ?"

    def worth(self, path: str, bound: Bound) -> Any:
        """The value that a path leads to from a bound row."""
        head = next(name for name in sorted(bound, key=len, reverse=True) if path == name or path.startswith(name + "."))
        table, value = bound[head]
        for part in filter(None, path.removeprefix(head).split(".")):
            row = self.db.execute(f'SELECT "{part}" FROM "{table}" WHERE id = ?', (value,)).fetchone()
            column = None if part == "id" else self.domain.tables[table].column(part)
            value, table = row[0], column.target if column else table
        return value

    def _closure(self, step: Step, bound: Bound) -> list[tuple[str, dict[str, Any]]]:
        plan = next(p for p in self.domain.plans if isinstance(p, Closure) and p.action == step.action)
        closed = plan.closed
        (_, owner), (_, node) = bound[closed.owner_param], bound[closed.node_param]
        have = {
            row[0]
            for row in self.db.execute(f'SELECT "{closed.node}" FROM "{closed.table}" WHERE "{closed.owner}" = ?', (owner,))
        }
        owned = f'SELECT "{closed.node}" FROM "{closed.table}" WHERE "{closed.owner}" = ?'
        query = f"""WITH RECURSIVE needed(node, depth) AS (SELECT ?, 0 UNION
            SELECT e."{closed.target}", depth + 1 FROM "{closed.edges}" e JOIN needed ON e."{closed.source}" = needed.node
            WHERE e."{closed.target}" NOT IN ({owned}))
            SELECT node FROM needed GROUP BY node ORDER BY max(depth) DESC, node"""
        nodes = [row[0] for row in self.db.execute(query, (node, owner))]
        if len(nodes) < 2 or node in have:
            raise Unsolvable("size")
        return [(step.action, {closed.owner_param: owner, closed.node_param: n}) for n in nodes]

    def _path(self, step: Step, bound: Bound) -> list[tuple[str, dict[str, Any]]]:
        plan = next(p for p in self.domain.plans if isinstance(p, Path) and p.action == step.action)
        thing = bound[plan.thing][1]
        start, goal = self.worth(f"{plan.thing}.{plan.at}", bound), bound["goal"][1]
        query = f'SELECT id, "{plan.source}", "{plan.target}", "{step.cost}" FROM "{plan.edges}"'
        edges = cheapest_path([tuple(row) for row in self.db.execute(query)], start, goal)
        if len(edges) < 2:
            raise Unsolvable("size")
        return [(step.action, {plan.thing: thing, plan.edge: edge}) for edge in edges]

    def answer(self, ask: Ask, bound: Bound, picked: list[tuple[str, Any]]) -> str:
        if ask.kind == "value":
            key = self.pick(ask.selector, bound)
            picked.append((ask.selector.table, key))
            return str(self.worth(f"it.{ask.column}", {"it": (ask.selector.table, key)}))
        keys = self.select(ask.selector, bound)
        if not len(keys) >= 3:
            raise Unsolvable("few")
        if ask.kind == "count":
            return str(len(keys))
        values = [self.worth(f"it.{ask.column}", {"it": (ask.selector.table, key)}) for key in keys]
        return str({"sum": sum, "max": max, "min": min}[ask.kind](values))


class _Query:
    """One SELECT over a table, joined along references."""

    def __init__(self, domain: Domain, table: str):
        self.domain, self.table = domain, table
        self.joins: dict[str, str] = {}
        self.where: list[str] = []
        self.order: list[str] = []

    def column(self, path: str) -> str:
        *hops, last = path.split(".")
        alias, table, walked = "t", self.table, ""
        for hop in hops:
            walked = f"{walked}_{hop}"
            target = self.domain.tables[table].column(hop).target
            self.joins.setdefault(walked, f'JOIN "{target}" "j{walked}" ON "j{walked}".id = "{alias}"."{hop}"')
            alias, table = f"j{walked}", target
        return f'"{alias}"."{last}"'

    def text(self) -> str:
        where = f" WHERE {' AND '.join(self.where)}" if self.where else ""
        order = ", ".join([*self.order, "t.id"])
        return f'SELECT t.id FROM "{self.table}" t {" ".join(self.joins.values())}{where} ORDER BY {order}'


def cheapest_path(edges: list[tuple[Any, ...]], start: str, goal: str) -> list[str]:
    """The edges' keys of the cheapest path, by Dijkstra. Raises Unsolvable where there is none, or two of one cost."""
    best: dict[str, tuple[int, int]] = {start: (0, 1)}
    via: dict[str, tuple[str, str]] = {}
    heap, done = [(0, start)], set()
    while heap:
        cost, node = heapq.heappop(heap)
        if node in done:
            continue
        done.add(node)
        for key, source, target, price in edges:
            if source != node:
                continue
            known = best.get(target, (10**9, 0))
            if cost + price < known[0]:
                best[target], via[target] = (cost + price, best[node][1]), (key, node)
                heapq.heappush(heap, (cost + price, target))
            elif cost + price == known[0]:
                best[target] = (known[0], known[1] + best[node][1])
    if goal not in via:
        raise Unsolvable("none")
    if best[goal][1] != 1:
        raise Unsolvable("tie")
    found: list[str] = []
    while goal != start:
        key, goal = via[goal]
        found.append(key)
    return found[::-1]


def is_named(selector: Selector) -> bool:
    """The row is given outright, by its name or id."""
    return any(atom.path in ("name", "id") and atom.op == "==" and atom.is_constant for atom in selector.atoms)


def facts_key(delta: list[list[Any]], initial: Mapping[str, Mapping[str, Any]]) -> str:
    """A final state as text, with the ids that were given during play left out: two plays of one effect have one text."""
    lines = []
    for table, key, row in delta:
        is_new = key not in initial[table]
        shown = {k: v for k, v in (row or {}).items() if not (is_new and k == "id")}
        lines.append(repr((table, "" if is_new else key, row is None, sorted(shown.items(), key=lambda pair: pair[0]))))
    return "\n".join(sorted(lines))
