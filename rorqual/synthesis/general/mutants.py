"""Mutants of a gold run: each must fail, or be proven equivalent by leaving the same final state and answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.synthesis.general.exact import facts_key
from rorqual.tasks import Task, WorldSession
from rorqual.tasks.session import Solved, ToolCall

Call = tuple[str, dict[str, Any]]
Keys = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""table -> key -> row, initially."""


@dataclass(frozen=True)
class Mutant:
    """A changed run: what was changed, the calls, the answer."""

    change: str
    calls: tuple[Call, ...]
    answer: str | None


@dataclass(frozen=True)
class MutationReport:
    killed: int
    equivalent: int
    survivors: tuple[str, ...]
    """Neither killed nor proven equivalent."""
    invalid: int = 0

    @property
    def score(self) -> float:
        """Killed over those not proven equivalent; 1 where there are none."""
        counted = self.killed + len(self.survivors)
        return self.killed / counted if counted else 1.0


def writes_of(calls: Sequence[ToolCall]) -> list[Call]:
    return [(call.name, call.arguments) for call in calls if call.changes]


def mutants(gold: Solved, task: Task, keys: Keys, rng: random.Random, most: int = 48) -> list[Mutant]:
    """Deletions of each write, perturbations of each of its arguments, repeats, extra calls, and wrong answers."""
    writes = writes_of(gold.calls)
    schemas = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in task.tools}
    made: list[Mutant] = []
    for i, (name, arguments) in enumerate(writes):
        made.append(Mutant(f"without {name} #{i}", (*writes[:i], *writes[i + 1 :]), gold.answer))
        for argument, value in arguments.items():
            for other in perturbed(value, schemas.get(name, {}).get(argument, {}), keys, rng):
                changed = (name, {**arguments, argument: other})
                made.append(Mutant(f"{name} #{i}: {argument}={other!r}", (*writes[:i], changed, *writes[i + 1 :]), gold.answer))
    if writes:
        made.append(Mutant("the last write again", (*writes, writes[-1]), gold.answer))
        made.append(Mutant("nothing but the answer", (), gold.answer))
        made.append(Mutant("the first write only, perturbed twice", tuple(writes[:1]) * 2, gold.answer))
    made += [Mutant(f"answer {a!r}", tuple(writes), a) for a in wrong_answers(gold.answer)]
    made += [Mutant(f"and also {call[0]}", (*writes, call), gold.answer) for call in extra_calls(task, keys, rng)]
    head, rest = made[: len(writes) and 1], made[len(writes) and 1 :]
    return head + (rest if len(made) <= most else rng.sample(rest, most - len(head)))


def perturbed(value: Any, schema: Mapping[str, Any], keys: Keys, rng: random.Random) -> list[Any]:
    """Other values of the same sort: keys of the same table, neighbours of a number, other choices."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1]
    if "enum" in schema:
        return [v for v in schema["enum"] if v != value][:2]
    if isinstance(value, list):
        return [value[:-1], value[1:]] if value else []
    for rows in keys.values():
        if value in rows:
            others = [key for key in rows if key != value]
            return rng.sample(others, min(2, len(others)))
    return [str(value) + "x"]


def wrong_answers(answer: str | None) -> list[str | None]:
    if answer is None:
        return []
    try:
        near: list[str | None] = [str(int(answer) + 1), str(int(answer) - 1)]
    except ValueError:
        near = [answer[:-1] or "x", answer + "x"]
    return [*near, None, ""]


def extra_calls(task: Task, keys: Keys, rng: random.Random, count: int = 4) -> list[Call]:
    """Calls that the task did not ask for, of arguments that look right: the frame condition must refuse what they change."""
    made = []
    tools = [t["function"] for t in task.tools if t["function"]["parameters"]["required"]]
    for function in rng.sample(tools, min(count, len(tools))):
        arguments = {}
        for name, schema in function["parameters"]["properties"].items():
            table = next((t for t in keys if t == name), None)
            drawn = rng.choice(sorted(keys[table])) if table and keys[table] else "x"
            arguments[name] = rng.randint(1, 4) if schema["type"] == "integer" else drawn
        made.append((function["name"], arguments))
    return made


def judge_mutants(session: WorldSession, task: Task, gold: Solved, made: Sequence[Mutant], keys: Keys) -> MutationReport:
    """Play each mutant from a reset, and judge it."""
    gold_facts = facts_key(gold.delta, keys)
    killed = equivalent = invalid = 0
    survivors = []
    for mutant in made:
        replay = session.replay(mutant.calls)
        verdict = session.verify(task, replay.delta, mutant.answer)
        if verdict.passed and facts_key(replay.delta, keys) == gold_facts and mutant.answer == gold.answer:
            equivalent += 1
        elif verdict.passed:
            survivors.append(mutant.change)
        else:
            killed += 1
            invalid += not verdict.is_valid
    return MutationReport(killed, equivalent, tuple(survivors), invalid)
