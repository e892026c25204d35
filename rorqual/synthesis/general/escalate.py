"""Escalation operators: each makes a draft harder. What an operator gives back is solved and measured before it counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rorqual.synthesis.general.calculus import KEY, Atom
from rorqual.synthesis.general.domain import clause_atoms, prefix
from rorqual.synthesis.general.exact import Solution, is_named
from rorqual.synthesis.general.goals import Ask, Goal, Pick, Selector, Step
from rorqual.synthesis.general.propose import ORDERED, Proposer
from rorqual.synthesis.general.surface import action_source, reader_names, reader_source, words
from rorqual.tasks import digest


@dataclass(frozen=True)
class Draft:
    """A task in the making."""

    goal: Goal
    solution: Solution
    added_tools: Mapping[str, str] = ()  # type: ignore[assignment]
    """Tool -> Python source, in addition to the world's or in place of one."""
    added_rows: Mapping[str, list[list[Any]]] = ()  # type: ignore[assignment]
    rules: tuple[str, ...] = ()
    """Lines of the policy besides the world's clauses."""
    decoys: Mapping[str, str] = ()  # type: ignore[assignment]
    operators: tuple[str, ...] = ()
    pass_rates: tuple[float, ...] = ()

    def with_tool(self, name: str, source: str) -> Draft:
        return replace(self, added_tools={**dict(self.added_tools), name: source})


Operator = Callable[[Draft, Proposer, random.Random], "Draft | None"]


def primary(goal: Goal) -> Selector | None:
    """The selector that the goal turns on: a set, or the first pick that is made by order."""
    if not goal.steps:
        return goal.ask.selector if goal.ask else None
    for step in goal.steps:
        if step.each:
            return step.each
        for value in step.args.values():
            if isinstance(value, Pick) and value.selector.order:
                return value.selector
    return None


def with_selector(goal: Goal, old: Selector, new: Selector) -> Goal:
    """The goal with one selector exchanged wherever it stands."""

    def changed(step: Step) -> Step:
        args = {n: Pick(new) if isinstance(v, Pick) and v.selector == old else v for n, v in step.args.items()}
        return replace(step, args=args, each=new if step.each == old else step.each)

    ask = replace(goal.ask, selector=new) if goal.ask and goal.ask.selector == old else goal.ask
    return replace(goal, steps=tuple(changed(step) for step in goal.steps), ask=ask)


def _add_atom(draft: Draft, proposer: Proposer, is_join: bool) -> Draft | None:
    selector = primary(draft.goal)
    if selector is None or len(selector.atoms) > 4:
        return None
    atom = proposer.sampled_atom(selector.table, is_join)
    if atom is None or atom.path in {a.path for a in selector.atoms}:
        return None
    return replace(draft, goal=with_selector(draft.goal, selector, replace(selector, atoms=(*selector.atoms, atom))))


def constrain(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """Another constraint that changes the outcome."""
    return _add_atom(draft, proposer, is_join=False)


def join(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A constraint on another table, over a reference."""
    return _add_atom(draft, proposer, is_join=True)


def describe(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A row that was named is described instead."""
    for step in draft.goal.steps:
        for value in step.args.values():
            if isinstance(value, Pick) and is_named(value.selector) and not value.selector.order:
                new = _description(value.selector, proposer, rng)
                return replace(draft, goal=with_selector(draft.goal, value.selector, new)) if new else None
    return None


def _description(selector: Selector, proposer: Proposer, rng: random.Random) -> Selector | None:
    """Kind and rank by measure that single out the same row."""
    kind, measure = (c.name for c in proposer.domain.tables[selector.table].columns if c.kind in ("enum", "int"))
    key = proposer.exact.pick(selector, {})
    value = proposer.exact.worth(f"it.{kind}", {"it": (selector.table, key)})
    for atoms in ((Atom(kind, "==", value),), ()):
        for is_max in (True, False):
            new = Selector(selector.table, atoms, order=measure, is_max=is_max)
            if proposer.exact.select(new, {})[:1] == [key]:
                return new
    return None


def tie_break(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """An order in which several rows come first, and a second one that decides."""
    selector = primary(draft.goal)
    if selector is None or not selector.order or selector.tie or (draft.goal.ask and draft.goal.ask.kind != "value"):
        return None
    columns = [c.name for c in proposer.domain.tables[selector.table].columns if c.kind in ORDERED]
    for order in rng.sample(columns, len(columns)):
        new = replace(selector, order=order)
        ranks = [proposer.exact._rank(new, key) for key in proposer.exact.select(new, {})] if _is_free(new) else []
        if len(ranks) > 1 and ranks[0] == ranks[1]:
            tie = rng.choice([c for c in columns if c != order] or [order])
            return replace(draft, goal=with_selector(draft.goal, selector, replace(new, tie=tie)))
    return None


def _is_free(selector: Selector) -> bool:
    """Depends on no other choice of the goal."""
    return all(atom.is_constant or atom.value.path.startswith("self.") for atom in selector.all_atoms)


def distract(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """Rows next to the best one that look better and break one constraint."""
    selector = primary(draft.goal)
    if selector is None or not selector.order or draft.added_rows or not _is_free(selector) or "." in selector.order:
        return None
    domain, table = proposer.domain, proposer.domain.tables[selector.table]
    breakable = [
        a
        for a in selector.atoms
        if a.is_constant and "." not in a.path and not a.minus and isinstance(a.value, str) and a.op == "=="
    ]
    if not breakable or (table.name, selector.order) in domain.derived_columns or table.column(selector.order).kind != "int":
        return None
    key = proposer.exact.pick(selector, {})
    atom = rng.choice(breakable)
    others = [v for v in table.column(atom.path).values if v != atom.value]
    if not others:
        return None
    row = proposer.exact.db.execute(f'SELECT * FROM "{table.name}" WHERE id = ?', (key,)).fetchone()
    names = [KEY, *(c.name for c in table.columns)]
    made = []
    for i in (1, 2):
        values = dict(zip(names, row, strict=True))
        values[KEY] = f"{prefix(table.name)}{digest([key, i], 5).upper()}"
        values[atom.path] = rng.choice(others)
        values[selector.order] += i if selector.is_max else -i
        for derived in domain.derived:
            if derived.table == table.name:
                values[derived.column] = values[derived.base] if derived.base else 0
            if derived.child == table.name and (not derived.states or values[derived.state] in derived.states):
                return None
        made.append([values[name] for name in names])
    return replace(draft, added_rows={**dict(draft.added_rows), table.name: made})


def bind_policy(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A clause of the policy, which the prompt does not repeat, rules out what would otherwise be chosen."""
    domain, goal = proposer.domain, draft.goal
    for i, clause in enumerate(domain.clauses):
        if i in goal.clauses or clause.is_enforced:
            continue
        for step in goal.steps:
            if step.action != clause.action:
                continue
            param = clause.atom.path.partition(".")[0]
            atoms = clause_atoms(replace(domain, clauses=(clause,)), clause.action, param)
            pick = step.args.get(param)
            selector = pick.selector if isinstance(pick, Pick) else step.each if step.target == param else None
            if selector and not is_named(selector):
                new = replace(selector, policy=selector.policy + atoms)
                return replace(draft, goal=replace(with_selector(goal, selector, new), clauses=(*goal.clauses, i)))
    return None


def paginate(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A table that could be read at once comes in short pages."""
    selector = primary(draft.goal)
    domain = proposer.domain
    if selector is None or domain.readers[selector.table] in ("keyed", "by_parent"):
        return None
    (name,) = reader_names(domain, selector.table)
    size = 4 if domain.plan.is_compact else 6
    if name in draft.added_tools or domain.plan.page_len <= size:
        return None
    return draft.with_tool(name, reader_source(domain, selector.table, size))


def make_flaky(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """The write tool is busy the first time."""
    if not draft.goal.steps or draft.goal.steps[0].action in draft.added_tools:
        return None
    domain, name = proposer.domain, draft.goal.steps[0].action
    enforced = [c for c in domain.clauses if c.action == name and c.is_enforced]
    source = action_source(domain, domain.action(name), enforced=enforced, is_flaky=True).replace(
        f'_is_busy("{name}")', f'_is_busy("{name}!")'
    )
    busy = {"_busy": [*dict(draft.added_rows).get("_busy", []), [f"{name}!", 1]]}
    return replace(draft.with_tool(name, source), added_rows={**dict(draft.added_rows), **busy})


def compete(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A second deed of the same sort, which must not take the row that the first one took."""
    goal = draft.goal
    if goal.kind != "choose_best" or len(goal.steps) != 1:
        return None
    step = goal.steps[0]
    action = proposer.domain.action(step.action)
    args = proposer.arguments(action)
    for name, value in step.args.items():
        if isinstance(value, Pick) and value.selector.order:
            other = replace(value.selector, atoms=(*value.selector.atoms, Atom("id", "!=", _arg(f"step0.{name}"))))
            return replace(draft, goal=replace(goal, steps=(step, replace(step, args={**args, name: Pick(other)}))))
    return None


def _arg(path: str) -> Any:
    from rorqual.synthesis.general.calculus import Arg

    return Arg(path)


def lay_trap(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """A tool with a tempting name does the deed and something irreversible besides."""
    if not draft.goal.steps or draft.decoys or rng.random() < 0.6:  # else nearly every task would have one: it always works
        return None
    domain = proposer.domain
    action = domain.action(draft.goal.steps[0].action)
    target = action.refs[0]
    column = next(
        (
            c.name
            for c in domain.tables[target.target].columns
            if c.kind == "int" and (target.target, c.name) not in domain.derived_columns
        ),
        None,
    )
    if column is None:
        return None
    name = f"quick_{action.name}"
    source = action_source(domain, action, name=name)
    write = f"""    db.execute('UPDATE "{target.target}" SET "{column}" = "{column}" + 1 WHERE id = ?', ({target.name},))\n"""
    head, _, last = source.rpartition("    return ")
    source = f"{head}{write}    return {last}"
    source = source.replace('."""', f', and adds 1 to the {words(column)} of the {words(target.name)}, for good."""', 1)
    return replace(draft.with_tool(name, source), decoys={action.name: name})


def also_report(draft: Draft, proposer: Proposer, rng: random.Random) -> Draft | None:
    """The answer is asked for as well as the deed."""
    goal = draft.goal
    if not goal.steps or goal.ask or proposer.domain.plan.is_compact:
        return None
    asked = proposer.propose_find() if rng.random() < 0.5 else proposer.propose_aggregate()
    assert isinstance(asked.ask, Ask)
    return replace(draft, goal=replace(goal, ask=asked.ask))


OPERATORS: dict[str, Operator] = {
    operator.__name__: operator
    for operator in (
        constrain, join, describe, tie_break, distract, bind_policy, paginate, make_flaky, compete, lay_trap, also_report,
    )
}  # fmt: skip
"""Besides these, a goal that needs a table for which the world has no reader adds the missing tool (`add_missing_tools`)."""
WITHOUT_NEW_SOLUTION = ("describe", "distract", "paginate", "make_flaky", "lay_trap")
"""Operators that may leave the gold calls as they were: they make the same deed harder to find or to do."""


def add_missing_tools(draft: Draft, proposer: Proposer, used: list[str], hidden: tuple[str, ...]) -> Draft:
    """Tool synthesis: a reader for each table that the goal needs and the world's tools do not reach."""
    for table in used:
        if table in hidden and not any(name in draft.added_tools for name in reader_names(proposer.domain, table)):
            draft = draft.with_tool(reader_names(proposer.domain, table)[0], reader_source(proposer.domain, table))
    return draft
