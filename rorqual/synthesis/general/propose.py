"""Proposes goals over a populated world: simple ones first. Each is solved exactly before anything else looks at it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rorqual.synthesis.general.calculus import Action, Arg, Atom, Closure, Column, Param, Path
from rorqual.synthesis.general.domain import Domain, clause_atoms
from rorqual.synthesis.general.exact import Exact, Solution, Unsolvable
from rorqual.synthesis.general.goals import Ask, Const, Diff, Goal, Pick, Selector, Step

ORDERED = ("int", "date")


@dataclass
class Proposer:
    """Draws goals and parts of goals at random; what it gives back has a unique solution in which every constraint matters."""

    domain: Domain
    exact: Exact
    rng: random.Random

    def propose(self, tries: int = 60) -> tuple[Goal, Solution] | None:
        """A simple goal of a kind drawn at random, with its solution; None where none was found."""
        for _ in range(tries):
            kind = self.rng.choice(self.kinds())
            try:
                goal = getattr(self, f"propose_{kind}")()
                return goal, self.exact.solve(goal)
            except (Unsolvable, LookupError):
                continue
        return None

    def kinds(self) -> list[str]:
        kinds = ["act", "act", "each", "each", "each", "find", "aggregate"]
        if self.domain.plan.is_compact:
            return ["act", "act", "act", "find"]
        kinds += ["plan", "plan", "plan"] if self.domain.plans else []
        return kinds + (["reconcile"] if self.corrections() else [])

    def corrections(self) -> list[Action]:
        """Actions that can square a counted column with a derived one."""
        return [a for a in self.domain.actions if any(p.low == -60 for p in a.params)]

    def single_actions(self, is_bulk: bool = False) -> list[Action]:
        found = [a for a in self.domain.actions if a not in self.corrections()]
        return [a for a in found if a.is_bulk] if is_bulk else found

    def propose_act(self) -> Goal:
        action = self.rng.choice(self.single_actions())
        args = self.arguments(action)
        if not any(isinstance(v, Pick) and v.selector.order for v in args.values()):
            raise LookupError("nothing to choose")
        return Goal("choose_best", (Step("act", action.name, args),), clauses=self.enforced(action.name))

    def arguments(self, action: Action) -> dict[str, Any]:
        """Constants for numbers; for rows a pick each, those first that others depend on."""
        args: dict[str, Any] = {p.name: Const(self.number(p)) for p in action.params if p.kind == "int"}
        for param in self.by_dependency(action):
            args[param.name] = self.pick(action, param, args)
        return args

    def number(self, param: Param) -> int:
        return self.rng.randint(param.low, param.high)

    def by_dependency(self, action: Action) -> list[Param]:
        def depends(param: Param) -> int:
            return sum(
                isinstance(g.atom.value, Arg) and not g.atom.value.path.startswith(param.name + ".") and "." in g.atom.value.path
                for g in action.guards
                if g.param == param.name
            )

        return sorted(action.refs, key=depends)

    def pick(self, action: Action, param: Param, args: dict[str, Any]) -> Pick:
        table = self.domain.tables[param.target]
        if table.is_entity:
            return Pick(self.by_name(param.target))
        selector = Selector(param.target, self.needs(action, param, args), policy=self.policy(action, param.name))
        if len(action.refs) == 1 and self.rng.random() < 0.5:
            extra = self.sampled_atom(param.target)
            selector = replace(selector, atoms=(*selector.atoms, extra)) if extra else selector
        return Pick(self.ordered(selector))

    def by_name(self, table: str) -> Selector:
        names = [row[0] for row in self.exact.db.execute(f'SELECT name FROM "{table}" ORDER BY id')]
        return Selector(table, (Atom("name", "==", self.rng.choice(names)),))

    def ordered(self, selector: Selector) -> Selector:
        columns = [c for c in self.domain.tables[selector.table].columns if c.kind in ORDERED]
        return replace(selector, order=self.rng.choice(columns).name, is_max=self.rng.random() < 0.5)

    def needs(self, action: Action, param: Param, args: dict[str, Any]) -> tuple[Atom, ...]:
        """What must hold of a row for the action to take it, as atoms over the row."""
        atoms = []
        for move in action.moves:
            if move.param == param.name:
                one = len(move.origins) == 1
                atoms.append(Atom(move.column, "==" if one else "in", move.origins[0] if one else move.origins))
        for guard in action.guards:
            if guard.param == param.name:
                atoms.append(self._as_row_atom(guard.atom, param.name, args))
        return tuple(atoms)

    def _as_row_atom(self, atom: Atom, param: str, args: dict[str, Any]) -> Atom:
        value = atom.value
        if isinstance(value, Arg):
            head, _, rest = value.path.partition(".")
            given = args.get(head)
            value = Arg(f"self.{rest}") if head == param else given.value if isinstance(given, Const) else value
        return Atom(_tail(atom.path), atom.op, value, _tail(atom.minus))

    def policy(self, action: Action, param: str) -> tuple[Atom, ...]:
        """The atoms of enforced clauses: the tools would refuse anything else."""
        indices = self.enforced(action.name)
        domain = replace(self.domain, clauses=tuple(self.domain.clauses[i] for i in indices))
        return clause_atoms(domain, action.name, param)

    def enforced(self, action: str) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.domain.clauses) if c.is_enforced and c.action == action)

    def sampled_atom(self, table: str, is_join: bool = False) -> Atom | None:
        """A constraint that about a third to two thirds of the rows satisfy, on a column or over one reference."""
        paths = self.join_paths(table) if is_join else [(c.name, c) for c in self.domain.tables[table].columns]
        paths = [(path, c) for path, c in paths if c.kind in ("int", "enum", "date")]
        if not paths:
            return None
        path, column = self.rng.choice(paths)
        table_of, last = self.domain.follow(table, path)
        values = [
            row[0] for row in self.exact.db.execute(f'SELECT "{column.name}" FROM "{table_of}" ORDER BY 1') if row[0] is not None
        ]
        assert last is not None
        return self._atom_of(path, column, values)

    def _atom_of(self, path: str, column: Column, values: list[Any]) -> Atom:
        if column.kind == "enum":
            return Atom(path, self.rng.choice(("==", "!=")), self.rng.choice(values))
        cut = values[int(len(values) * self.rng.uniform(0.3, 0.7))]
        return Atom(path, self.rng.choice(("<=", ">=")), cut)

    def join_paths(self, table: str) -> list[tuple[str, Column]]:
        found = []
        for column in self.domain.tables[table].columns:
            if column.kind == "ref" and not column.null_in:
                found += [(f"{column.name}.{c.name}", c) for c in self.domain.tables[column.target].columns]
        return found

    def propose_each(self) -> Goal:
        action = self.rng.choice(self.single_actions(is_bulk=True))
        target = action.refs[0]
        if self.domain.tables[target.target].is_entity:
            raise LookupError("a set of entities")
        args: dict[str, Any] = {p.name: Const(self.number(p)) for p in action.params if p.kind == "int"}
        selector = Selector(target.target, self.needs(action, target, args), policy=self.policy(action, target.name))
        for _ in range(self.rng.randint(1, 2)):
            extra = self.sampled_atom(target.target)
            selector = replace(selector, atoms=(*selector.atoms, extra)) if extra else selector
        for param in action.refs[1:]:
            args[param.name] = self._fixed(action, param, args)
        kind = "migrate" if action.puts and len(action.refs) > 1 else "repair" if action.moves else "satisfy_all"
        step = Step("each", action.name, args, target=target.name, each=selector)
        return Goal(kind, (step,), clauses=self.enforced(action.name))

    def _fixed(self, action: Action, param: Param, args: dict[str, Any]) -> Pick:
        """One row for all: its needs may not depend on the row in hand."""
        if self.domain.tables[param.target].is_entity:
            return Pick(self.by_name(param.target))
        atoms = [a for a in self.needs(action, param, args) if not isinstance(a.value, Arg) or a.value.path.startswith("self.")]
        return Pick(self.ordered(Selector(param.target, tuple(atoms), policy=self.policy(action, param.name))))

    def propose_reconcile(self) -> Goal:
        action = self.rng.choice(self.corrections())
        target, derived = action.refs[0], action.adjusts[0].column
        atoms = (Atom("counted", "!=", 0, minus=derived),)
        extra = self.sampled_atom(target.target, is_join=self.rng.random() < 0.5)
        selector = Selector(target.target, (*atoms, extra) if extra else atoms, policy=self.policy(action, target.name))
        number = next(p.name for p in action.params if p.kind == "int")
        step = Step("each", action.name, {number: Diff("counted", derived)}, target=target.name, each=selector)
        return Goal("reconcile", (step,), clauses=self.enforced(action.name))

    def propose_plan(self) -> Goal:
        plan = self.rng.choice(self.domain.plans)
        action = self.domain.action(plan.action)
        clauses = self.enforced(action.name)
        if isinstance(plan, Closure):
            owner, node = action.param(plan.closed.owner_param), action.param(plan.closed.node_param)
            args = {owner.name: self._any_row(owner.target), node.name: self._any_row(node.target)}
            return Goal("plan", (Step("closure", action.name, args),), clauses=clauses)
        return Goal("plan", (self._path_step(plan, action),), clauses=clauses)

    def _path_step(self, plan: Path, action: Action) -> Step:
        needs = self.needs(action, action.param(plan.thing), {})
        thing = self.ordered(Selector(action.param(plan.thing).target, needs))
        node = self.domain.tables[plan.edges].column(plan.target).target
        args = {plan.thing: Pick(thing), "goal": Pick(self.by_name(node))}
        return Step("path", action.name, args, cost=self.rng.choice(plan.costs))

    def _any_row(self, table: str) -> Pick:
        if self.domain.tables[table].is_entity:
            return Pick(self.by_name(table))
        extra = self.sampled_atom(table, is_join=self.rng.random() < 0.5)
        return Pick(self.ordered(Selector(table, (extra,) if extra else ())))

    def propose_find(self) -> Goal:
        selector = self._constrained(self.rng.choice(self._tables()), self.rng.randint(1, 2))
        columns = [c.name for c in self.domain.tables[selector.table].columns if c.kind in ("int", "date", "label")]
        names = [path for path, column in self.join_paths(selector.table) if column.kind == "label"]
        selector = self.ordered(selector)
        asked = [c for c in [*columns, *names] if c != selector.order]
        return Goal("find", (), Ask("value", selector, self.rng.choice(asked)))

    def propose_aggregate(self) -> Goal:
        selector = self._constrained(self.rng.choice(self._tables()), self.rng.randint(1, 2))
        numbers = [c.name for c in self.domain.tables[selector.table].columns if c.kind == "int"]
        kind = self.rng.choice(("count", "sum", "sum", "max", "min")) if numbers else "count"
        return Goal("aggregate", (), Ask(kind, selector, self.rng.choice(numbers) if kind != "count" else ""))

    def _tables(self) -> list[str]:
        return [name for name, t in self.domain.tables.items() if not t.is_entity and any(c.kind in ORDERED for c in t.columns)]

    def _constrained(self, table: str, count: int) -> Selector:
        atoms = [self.sampled_atom(table, is_join=self.rng.random() < 0.4) for _ in range(count)]
        return Selector(table, tuple(dict.fromkeys(a for a in atoms if a)))


def every_atom_matters(exact: Exact, goal: Goal, solution: Solution, without: Callable[[Goal], list[Goal]]) -> bool:
    """Dropping any one constraint changes what must be done or answered (or leaves no unique solution)."""
    for weaker in without(goal):
        try:
            other = exact.solve(weaker)
        except Unsolvable:
            continue
        if (other.calls, other.answer) == (solution.calls, solution.answer):
            return False
    return True


def _tail(path: str) -> str:
    return path.partition(".")[2]
