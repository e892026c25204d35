"""The solver ladder: programs of bounded skill that really play a task through its tools, and the unbiased pass@k they reach.

`Planner` reads the goal formula (not the prose, not the solution) and carries it out with the slips of a hurried agent: it drops
constraints, overlooks policies and second pages, ignores ties, does not retry. `Searcher` reads only what an agent is shown.
For tasks that a model wrote, the endpoint is the rung (`rorqual.synthesis.general.author`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

from rorqual.synthesis.general.calculus import Action, Arg, Atom, Closure, Path
from rorqual.synthesis.general.domain import Domain
from rorqual.synthesis.general.exact import Unsolvable, cheapest_path
from rorqual.synthesis.general.goals import Ask, Const, Diff, Goal, Pick, Selector, Step, in_order
from rorqual.synthesis.general.surface import parent_column, plural, reader_names
from rorqual.tasks import Task, Verdict, WorldSession
from rorqual.tasks.session import ToolCall

Row = dict[str, Any]
SKILLS = (0.4, 1.0, 1.8)
"""Factors on every rate of slips: three rungs, taken in turn."""


@dataclass(frozen=True)
class Slips:
    """How likely a planner errs, each time it could."""

    atom: float = 0.02
    joined: float = 0.06
    policy: float = 0.25
    tie: float = 0.35
    page: float = 0.07
    direction: float = 0.015
    write: float = 0.015
    retry: float = 0.3
    decoy: float = 0.2
    arithmetic: float = 0.04
    node: float = 0.04
    distractor: float = 0.12
    """To take the second of two rows that are close: only where rows were added near the best one."""


class GaveUp(Exception):
    """The planner can't go on: a call was refused, or nothing is left to choose from."""


Trail = tuple[str, ...]
"""The calls of an attempt from its first change on, as text."""


@dataclass
class Memory:
    """What a world answered before. A world is deterministic from a reset (a gate proves it), so nothing need be played twice."""

    reads: dict[str, ToolCall] = field(default_factory=dict)
    """Calls before any change."""
    steps: dict[Trail, ToolCall] = field(default_factory=dict)
    """The last call of a path."""
    verdicts: dict[tuple[Trail, str | None], Verdict] = field(default_factory=dict)


@dataclass
class Attempt:
    """One play of a task in a session that others used before. What the memory holds is played only where it must be."""

    session: WorldSession
    task: Task
    memory: Memory
    without: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    path: Trail = ()
    _waiting: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _is_reset: bool = False

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """The parsed observation. Raises GaveUp past the task's budget of calls."""
        if len(self.calls) >= self.task.max_calls:
            raise GaveUp("budget")
        made = self._call(name, arguments)
        self.calls.append(made)
        return json.loads(made.observation)

    def _call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        if name == self.without:
            return ToolCall(name, arguments, '{"error": "unknown_tool"}')
        key = f"{name}{sorted(arguments.items())}"
        path = (*self.path, key)
        if not self.path and key in self.memory.reads:
            return self.memory.reads[key]
        if path in self.memory.steps:
            self._waiting.append((name, arguments))
            self.path = path
            return self.memory.steps[path]
        self._play()
        made = self.session.call(name, arguments)
        if self.path or made.changes:
            self.memory.steps[path] = made
            self.path = path
        else:
            self.memory.reads[key] = made
        return made

    def _play(self) -> None:
        """Bring the session to where this attempt is."""
        if not self._is_reset:
            self.session.reset()
            self._is_reset = True
        for name, arguments in self._waiting:
            self.session.call(name, arguments)
        self._waiting.clear()

    def verdict(self, answer: str | None) -> Verdict:
        key = (self.path, answer)
        if key not in self.memory.verdicts:
            self._play()
            delta = self.session.delta() if self.path else []
            self.memory.verdicts[key] = self.session.verify(self.task, delta, answer)
        return self.memory.verdicts[key]


Policy = Callable[[Attempt], str | None]
"""Plays a task and gives back its answer."""


def play(session: WorldSession, task: Task, policy: Policy, memory: Memory, without: str = "") -> Verdict:
    """One attempt, from the initial state to its verdict."""
    attempt = Attempt(session, task, memory, without)
    try:
        answer = policy(attempt)
    except (GaveUp, LookupError, TypeError, ValueError):
        answer = None
    return attempt.verdict(answer)


def pass_at_k(attempts: int, passed: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 if attempts - passed < k else 1.0 - comb(attempts - passed, k) / comb(attempts, k)


@dataclass
class Planner:
    """Carries out a goal with slips. One object is one attempt."""

    domain: Domain
    goal: Goal
    rng: random.Random
    skill: float = 1.0
    slips: Slips = field(default_factory=Slips)
    decoys: Mapping[str, str] = field(default_factory=dict)
    """Action -> a tempting tool that does something else."""
    has_distractors: bool = False

    def __call__(self, attempt: Attempt) -> str | None:
        self.attempt = attempt
        self.read: dict[str, list[Row]] = {}
        bound: dict[str, tuple[str, Any]] = {}
        for i, step in enumerate(self.goal.steps):
            self._step(i, step, bound)
        return self._answer(self.goal.ask, bound) if self.goal.ask else None

    def slipped(self, rate: float) -> bool:
        return self.rng.random() < min(0.95, rate * self.skill)

    def rows(self, table: str) -> list[Row]:
        if table not in self.read:
            self.read[table] = self._read(table)
        return self.read[table]

    def _read(self, table: str) -> list[Row]:
        names = reader_names(self.domain, table)
        style = self.domain.readers[table]
        if style == "keyed":
            return [self._checked(names[1], {table: key}) for key in self._checked(names[0], {})]
        if style != "by_parent":
            return self._pages(names[0], {})
        column = parent_column(self.domain.tables[table])
        return [row for parent in self.rows(column.target) for row in self._pages(names[0], {column.name: parent["id"]})]

    def _pages(self, tool: str, arguments: Row) -> list[Row]:
        rows, page = [], 1
        while page:
            found = self._checked(tool, {**arguments, "page": page})
            rows += found["rows"]
            page = found["next_page"]
            if page and self.slipped(self.slips.page):
                break
        return rows

    def _checked(self, tool: str, arguments: Row) -> Any:
        found = self.attempt.call(tool, arguments)
        if isinstance(found, dict) and "error" in found:
            raise GaveUp(found["error"])
        return found

    def worth(self, table: str, row: Row, path: str) -> Any:
        *hops, last = path.split(".")
        for hop in hops:
            key, table = row[hop], self.domain.tables[table].column(hop).target
            row = next((r for r in self.rows(table) if r["id"] == key), {})
            if not row:
                raise GaveUp("a row that was not read")
        return row[last]

    def holds(self, selector: Selector, row: Row, atom: Atom, bound: dict[str, tuple[str, Any]]) -> bool:
        left = self.worth(selector.table, row, atom.path)
        if atom.minus:
            left -= self.worth(selector.table, row, atom.minus)
        right = atom.value
        if isinstance(right, Arg):
            head, _, rest = right.path.partition(".")
            right = self.worth(selector.table, row, rest) if head == "self" else self._bound(right.path, bound)
        if left is None:
            return False
        return {"==": left == right, "!=": left != right, "in": atom.op == "in" and left in right}.get(
            atom.op, atom.op not in ("==", "!=", "in") and _compare(left, atom.op, right)
        )

    def _bound(self, path: str, bound: dict[str, tuple[str, Any]]) -> Any:
        head = next(name for name in sorted(bound, key=len, reverse=True) if path == name or path.startswith(name + "."))
        table, value = bound[head]
        rest = path.removeprefix(head).lstrip(".")
        if not rest:
            return value
        return self.worth(table, next(r for r in self.rows(table) if r["id"] == value), rest)

    def select(self, selector: Selector, bound: dict[str, tuple[str, Any]]) -> list[Row]:
        minded = [a for a in selector.atoms if not self.slipped(self._rate(a))]
        minded += [a for a in selector.policy if not self.slipped(self.slips.policy)]
        return [row for row in self.rows(selector.table) if all(self.holds(selector, row, a, bound) for a in minded)]

    def _rate(self, atom: Atom) -> float:
        plain = atom.path in ("name", "id") and atom.op == "=="
        return (
            0.002
            if plain
            else self.slips.joined
            if "." in atom.path or atom.minus or isinstance(atom.value, Arg)
            else self.slips.atom
        )

    def pick(self, selector: Selector, bound: dict[str, tuple[str, Any]]) -> Row:
        rows = self.select(selector, bound)
        if not rows:
            raise GaveUp("nothing fits")
        if not selector.order:
            return rows[0]
        if selector.tie and not self.slipped(self.slips.tie):
            rows = sorted(rows, key=lambda row: self.worth(selector.table, row, selector.tie))
        is_max = selector.is_max ^ self.slipped(self.slips.direction)
        rows = sorted(rows, key=lambda row: self.worth(selector.table, row, selector.order), reverse=is_max)
        return rows[1] if len(rows) > 1 and self.has_distractors and self.slipped(self.slips.distractor) else rows[0]

    def _step(self, i: int, step: Step, bound: dict[str, tuple[str, Any]]) -> None:
        action = self.domain.action(step.action)
        local = dict(bound)
        for name, value in in_order(step.args):
            if isinstance(value, Const):
                local[name] = ("", value.value)
            elif isinstance(value, Pick):
                local[name] = (value.selector.table, self.pick(value.selector, local)["id"])
            bound.update({f"step{i}.{name}": local[name]} if name in local else {})
        for arguments in self._arguments(step, action, local):
            self._write(action, arguments)

    def _arguments(self, step: Step, action: Action, local: dict[str, tuple[str, Any]]) -> list[Row]:
        given = {p.name: local[p.name][1] for p in action.params if p.name in local}
        if step.kind == "act":
            return [given]
        if step.kind == "each":
            assert step.each is not None
            return [{**given, step.target: row["id"], **self._diffs(step, row)} for row in self.select(step.each, local)]
        plan = next(p for p in self.domain.plans if p.action == step.action)
        if isinstance(plan, Closure):
            return [{**given, plan.closed.node_param: node} for node in self._closure(plan, local)]
        return [{plan.thing: local[plan.thing][1], plan.edge: edge} for edge in self._path(plan, step, local)]

    def _diffs(self, step: Step, row: Row) -> Row:
        assert step.each is not None
        found = {}
        for name, value in step.args.items():
            if isinstance(value, Diff):
                found[name] = row[value.column] - row[value.minus] + (1 if self.slipped(self.slips.arithmetic) else 0)
        return found

    def _closure(self, plan: Closure, local: dict[str, tuple[str, Any]]) -> list[str]:
        closed = plan.closed
        have = {r[closed.node] for r in self.rows(closed.table) if r[closed.owner] == local[closed.owner_param][1]}
        edges, order = self.rows(closed.edges), []
        waiting = [local[closed.node_param][1]]
        while waiting:
            node = waiting.pop()
            if node in have or self.slipped(self.slips.node):
                continue
            order = [n for n in order if n != node] + [node]
            waiting += [e[closed.target] for e in edges if e[closed.source] == node]
        return order[::-1]

    def _path(self, plan: Path, step: Step, local: dict[str, tuple[str, Any]]) -> list[str]:
        costs = step.cost if not self.slipped(4 * self.slips.direction) else next(c for c in plan.costs if c != step.cost)
        edges = [(e["id"], e[plan.source], e[plan.target], e[costs]) for e in self.rows(plan.edges)]
        edges = [edge for edge in edges if not self.slipped(self.slips.node / 4)]
        table, thing = local[plan.thing]
        start = next(r for r in self.rows(table) if r["id"] == thing)[plan.at]
        try:
            return cheapest_path(edges, start, local["goal"][1])
        except Unsolvable as error:
            raise GaveUp("no way") from error

    def _write(self, action: Action, arguments: Row) -> None:
        if self.slipped(self.slips.write):
            return
        name = action.name
        if name in self.decoys and self.slipped(self.slips.decoy):
            name = self.decoys[name]
        for _ in range(4):
            found = self.attempt.call(name, arguments)
            if not isinstance(found, dict) or found.get("error") != "temporarily_unavailable" or self.slipped(self.slips.retry):
                break
        if isinstance(found, dict) and "error" in found:
            raise GaveUp(found["error"])

    def _answer(self, ask: Ask, bound: dict[str, tuple[str, Any]]) -> str:
        if ask.kind == "value":
            return str(self.worth(ask.selector.table, self.pick(ask.selector, bound), ask.column))
        rows = self.select(ask.selector, bound)
        if self.slipped(self.slips.arithmetic):
            rows = rows[1:]
        if ask.kind == "count":
            return str(len(rows))
        return str({"sum": sum, "max": max, "min": min}[ask.kind](row[ask.column] for row in rows))


def _compare(left: Any, op: str, right: Any) -> bool:
    return {"<=": left <= right, ">=": left >= right, "<": left < right, ">": left > right}[op]


SUPERLATIVE = re.compile(
    r"the (\w[\w ]*?) with the (largest|smallest|latest|earliest) ([\w ]+?)(?: \(|\.|,| over| for| to| on| in| approved|$)"
)


CONSTRAINT = re.compile(r"whose ([\w ]+?) (=|not|<=|>=|<|>) (its [\w ]+?|[\w-]+?)(?= and whose|\)|\.| for | to | on |$)")


@dataclass
class Searcher:
    """Reads the prompt and the tools' schemas only: finds the write tool by its words, rows by superlatives and names."""

    domain: Domain
    rng: random.Random

    def __call__(self, attempt: Attempt) -> str | None:
        prompt = attempt.task.prompt
        rows = self._read_all(attempt)
        tool = self._tool(attempt.task, prompt)
        if tool is None:
            return None
        numbers = [int(n) for n in re.findall(r"(?<![\w-])-?\d+(?![\w-])", prompt)]
        arguments: Row = {}
        for name, schema in tool["parameters"]["properties"].items():
            if schema["type"] == "integer":
                arguments[name] = numbers.pop(0) if numbers else 1
            else:
                arguments[name] = self._key(name, prompt, rows)
        attempt.call(tool["name"], arguments)
        return None

    def _read_all(self, attempt: Attempt) -> dict[str, list[Row]]:
        rows = {}
        for tool in attempt.task.tools:
            function = tool["function"]
            if not function["parameters"]["required"] and function["name"].startswith(("list_", "search_")):
                found = attempt.call(function["name"], {})
                table = next((t for t in self.domain.tables if function["name"].endswith(plural(t))), "")
                rows[table] = found["rows"] if isinstance(found, dict) and "rows" in found else []
        return rows

    def _tool(self, task: Task, prompt: str) -> Mapping[str, Any] | None:
        written = [
            t["function"]
            for t in task.tools
            if not t["function"]["name"].startswith(("list_", "search_", "get_", "count_", "submit"))
        ]
        said = set(re.findall(r"\w+", prompt.lower()))
        return max(written, key=lambda f: len(said & set(re.findall(r"\w+", f["description"].lower()))), default=None)

    def _key(self, param: str, prompt: str, rows: Mapping[str, list[Row]]) -> str:
        for row in rows.get(param, ()):
            if "name" in row and re.search(rf"(?<!\w){re.escape(str(row['name']))}(?!\w)", prompt):
                return row["id"]
        for noun, rank, column in SUPERLATIVE.findall(prompt):
            name = column.strip().replace(" ", "_")
            if noun.replace(" ", "_") == param and rows.get(param) and name in rows[param][0]:
                best = max if rank in ("largest", "latest") else min
                fitting = [row for row in rows[param] if _fits(row, prompt)] or rows[param]
                return best(fitting, key=lambda row: row[name])["id"]
        raise GaveUp("no key")


def _fits(row: Row, prompt: str) -> bool:
    """Whether a row meets the prompt's terse constraints on its own columns; constraints of other forms are overlooked."""
    for left, op, right in CONSTRAINT.findall(prompt):
        columns = [part.strip().replace(" ", "_") for part in left.split(" minus ")]
        other = right.removeprefix("its ").strip().replace(" ", "_")
        if not all(column in row for column in columns) or (right.startswith("its ") and other not in row):
            continue
        value = row[columns[0]] - row[columns[1]] if len(columns) == 2 else row[columns[0]]
        wanted = row[other] if right.startswith("its ") else type(value)(right) if value is not None else right
        holds = {"=": value == wanted, "not": value != wanted}
        if not (holds[op] if op in holds else _compare(value, op, wanted)):
            return False
    return True


@dataclass(frozen=True)
class LadderReport:
    """What the ladder did: attempts and passes by rung."""

    attempts: int
    passed: int
    searcher_passed: int

    @property
    def pass_rate(self) -> float:
        return self.passed / self.attempts

    def measures(self) -> dict[str, float]:
        found = {f"pass@{k}": round(pass_at_k(self.attempts, self.passed, k), 4) for k in (1, 4, 16, 100) if k <= self.attempts}
        found |= {"attempts": float(self.attempts), "searcher_passed": float(self.searcher_passed)}
        return found | ({"pass@100": 1.0} if self.passed else {})


def climb(
    session: WorldSession,
    task: Task,
    planner: Callable[[random.Random, float], Planner],
    searcher: Searcher | None,
    attempts: int,
    most: int,
) -> LadderReport:
    """Play `attempts` times; where none passed, go on to `most` (so pass@100 > 0 is really tried)."""
    memory = Memory()
    done = passed = 0
    while done < attempts or (passed == 0 and done < most):
        policy = planner(random.Random(f"{task.id}/{done}"), SKILLS[done % len(SKILLS)])
        passed += play(session, task, policy, memory).passed
        done += 1
    by_searcher = play(session, task, searcher, memory).passed if searcher else False
    return LadderReport(done, passed, int(by_searcher))
