"""All gates of a task, by execution. Each is one function from a trial to a result; a task is kept where every one passes.

They need the stored task and its world only, so `rorqual validate` runs the same functions again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from rorqual.synthesis.general.cheap import panel
from rorqual.synthesis.general.exact import facts_key
from rorqual.synthesis.general.ladder import LadderReport, Memory, play
from rorqual.synthesis.general.mutants import Keys, judge_mutants, mutants, writes_of
from rorqual.tasks import GateResult, Task, World, WorldSession, canonical
from rorqual.tasks.judge import solution_problem
from rorqual.tasks.session import Solved

MUTATION_SCORE = 0.95
COMPACT_CHARS = 1200
"""Of the messages and the tools together: about 300 tokens."""
STRANGE_ANSWERS = (None, "", "NaN", "[1, 2]", '{"a": null}', "-" * 2000, "１２", "0x10", "\u0000", "1e999")
Ladder = Callable[["Trial"], LadderReport]


@dataclass
class Trial:
    """One task under examination. `confined` is a session where the solution has a process of its own."""

    world: World
    task: Task
    session: WorldSession
    confined: WorldSession | None = None
    ladder: Ladder | None = None
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def rng(self) -> random.Random:
        return random.Random(f"gates/{self.task.id}")

    @cached_property
    def gold(self) -> Solved:
        return self.session.solve(self.task.payload["solution"])

    @cached_property
    def keys(self) -> Keys:
        rows = self.session.initial_rows()
        return {table: {row[self.world.payload["keys"][table]]: row for row in found} for table, found in rows.items()}

    @property
    def has_changes(self) -> bool:
        return bool(self.gold.delta)


def solution_allowed(trial: Trial) -> GateResult:
    """The solution calls tools and computes, and does nothing else."""
    problem = solution_problem(trial.task.payload["solution"])
    return GateResult("solution_allowed", problem is None, problem or "")


def tools_shown(trial: Trial) -> GateResult:
    """The agent sees a question, and each tool that the solution calls, as the world has it."""
    shown = {t["function"]["name"]: t for t in trial.task.tools}
    there = {t["function"]["name"]: t for t in trial.session.tools}
    used = {call.name for call in trial.gold.calls}
    wrong = [name for name in sorted(used) if shown.get(name) != there.get(name)]
    return GateResult("tools_shown", bool(trial.task.prompt.strip()) and not wrong, f"not shown: {wrong}" if wrong else "")


def initial_fails(trial: Trial) -> GateResult:
    verdict = trial.session.verify(trial.task, [], None)
    return GateResult(
        "initial_fails", verdict.is_valid and not verdict.passed, "" if not verdict.passed else "the initial state passes"
    )


def noop_fails(trial: Trial) -> GateResult:
    """Reading all that the solution reads, and handing in the answer without the deeds, fails."""
    reads = [call.pair for call in trial.gold.calls if not call.changes]
    delta = trial.session.replay(reads).delta
    tried = ["done", *([trial.gold.answer] if trial.has_changes else [])]
    passed = [answer for answer in tried if trial.session.verify(trial.task, delta, answer).passed]
    return GateResult("noop_fails", not passed and not delta, f"passes with {passed}" if passed else "")


def gold_passes(trial: Trial) -> GateResult:
    verdict = trial.session.verify(trial.task, trial.gold.delta, trial.gold.answer)
    return GateResult(
        "gold_passes", verdict.passed and not trial.gold.failure, trial.gold.failure or "; ".join(verdict.reasons[:3])
    )


def gold_repeats(trial: Trial) -> GateResult:
    """A second run makes the same calls, with the same observations, state and verdict."""
    again = trial.session.solve(trial.task.payload["solution"])
    verdict = trial.session.verify(trial.task, again.delta, again.answer)
    return GateResult("gold_repeats", again == trial.gold and verdict.passed)


def journal_matches(trial: Trial) -> GateResult:
    """The database's changes are those of the logged calls: replaying the log gives the same state, call by call."""
    replay = trial.session.replay([call.pair for call in trial.gold.calls])
    same = [call.changes for call in replay.calls] == [
        call.changes for call in trial.gold.calls
    ] and replay.delta == trial.gold.delta
    return GateResult("journal_matches", same)


def reordered_passes(trial: Trial) -> GateResult:
    """Writes in another order pass wherever that order is possible at all (none is refused) and leaves the same facts."""
    writes = writes_of(trial.gold.calls)
    orders = [writes[::-1], *(trial.rng.sample(writes, len(writes)) for _ in range(2))] if len(writes) > 1 else []
    tried = 0
    for order in orders:
        replay = trial.session.replay(order)
        if any(call.is_error for call in replay.calls) or facts_key(replay.delta, trial.keys) != facts_key(
            trial.gold.delta, trial.keys
        ):
            continue
        tried += 1
        if not trial.session.verify(trial.task, replay.delta, trial.gold.answer).passed:
            return GateResult("reordered_passes", False, "an order that leaves the same facts fails")
    return GateResult("reordered_passes", True, measures={"orders": float(tried)})


def mutants_fail(trial: Trial) -> GateResult:
    made = mutants(trial.gold, trial.task, trial.keys, trial.rng)
    report = judge_mutants(trial.session, trial.task, trial.gold, made, trial.keys)
    holds = report.score >= MUTATION_SCORE and not report.survivors and report.killed > 0
    figures = {"killed": float(report.killed), "equivalent": float(report.equivalent), "score": round(report.score, 4)}
    return GateResult("mutants_fail", holds, "; ".join(report.survivors[:3]), figures)


def foreign_fails(trial: Trial) -> GateResult:
    """The gold runs of other seeds and tasks, brought over to this world's rows, fail (unless they leave the same facts)."""
    gold_facts = facts_key(trial.gold.delta, trial.keys)
    tried = 0
    for foreign in trial.task.payload.get("foreign", ()):
        replay = trial.session.replay(foreign["calls"])
        if facts_key(replay.delta, trial.keys) == gold_facts and foreign["answer"] == trial.gold.answer:
            continue
        tried += 1
        if trial.session.verify(trial.task, replay.delta, foreign["answer"]).passed:
            return GateResult("foreign_fails", False, "a foreign gold run passes")
    return GateResult("foreign_fails", True, measures={"tried": float(tried)})


def cheap_policies_fail(trial: Trial) -> GateResult:
    """Random, first-result, copy-example, single-call, answer-prior and prompt-only policies stay at the floor."""
    memory = Memory()
    for seed in range(2):
        for name, policy in panel(random.Random(f"{trial.task.id}/{seed}")).items():
            if play(trial.session, trial.task, policy, memory).passed:
                return GateResult("cheap_policies_fail", False, f"{name} passes")
    return GateResult("cheap_policies_fail", True)


def nothing_leaks(trial: Trial) -> GateResult:
    """Neither the answer nor the id of a row that must be found stands in what the agent is shown; ids do not count up."""
    shown = canonical([trial.task.messages, trial.task.tools])
    secrets = list(trial.task.payload.get("secrets", ()))
    if trial.gold.answer:
        secrets.append(trial.gold.answer)
    leaked = [s for s in secrets if re.search(rf"(?<![\w.-]){re.escape(str(s))}(?![\w-]|\.\w)", shown)]
    ordered = [table for table, rows in trial.keys.items() if _counts_up(list(rows))]
    detail = f"leaked: {leaked[:3]}" if leaked else f"ids of {ordered} count up" if ordered else ""
    return GateResult("nothing_leaks", not leaked and not ordered, detail)


def _counts_up(keys: list[Any]) -> bool:
    """Whether the numbers at the ends of the ids are consecutive."""
    numbers = [int(found.group()) for key in keys if (found := re.search(r"\d+$", str(key)))]
    return len(numbers) == len(keys) > 3 and sorted(numbers) == list(range(min(numbers), min(numbers) + len(numbers)))


def tools_needed(trial: Trial) -> GateResult:
    """Without any one of its write tools the task can't be done, and without any one of its readers the solution can't do it."""
    used = dict.fromkeys(call.name for call in trial.gold.calls)
    spare = []
    for name in used:
        solved = trial.session.solve(trial.task.payload["solution"], without=name)
        if not solved.failure and trial.session.verify(trial.task, solved.delta, solved.answer).passed:
            spare.append(name)
    return GateResult("tools_needed", not spare, f"not needed: {spare}" if spare else "", {"tools": float(len(used))})


def reset_identical(trial: Trial) -> GateResult:
    trial.session.reset()
    before = trial.session.digest()
    trial.session.replay([call.pair for call in trial.gold.calls])
    trial.session.reset()
    return GateResult("reset_identical", trial.session.digest() == before)


def verifier_total(trial: Trial) -> GateResult:
    """Whatever the answer, the verifier gives a verdict: one that raises is invalid, and so is the task."""
    for answer in STRANGE_ANSWERS:
        for delta in ([], trial.gold.delta):
            verdict = trial.session.verify(trial.task, delta, answer)
            if not verdict.is_valid:
                return GateResult("verifier_total", False, f"{verdict.reasons[0][:120]} (answer {str(answer)[:20]!r})")
    return GateResult("verifier_total", True)


def within_budget(trial: Trial) -> GateResult:
    """The solution keeps within the calls that an agent may make; a compact task within its characters."""
    calls = len(trial.gold.calls)
    size = len(canonical([trial.task.messages, trial.task.tools]))
    holds = calls <= trial.task.max_calls and (trial.task.tags.get("surface") != "compact" or size <= COMPACT_CHARS)
    return GateResult(
        "within_budget",
        holds,
        "" if holds else f"{calls} calls, {size} characters",
        {"calls": float(calls), "chars": float(size)},
    )


def confined_agrees(trial: Trial) -> GateResult:
    """In a sandbox, the solution in a process that holds no database: the same calls, observations, state and answer."""
    if trial.confined is None:
        return GateResult("confined_agrees", True, "the whole trial runs confined")
    trial.confined.prepare(trial.task)
    solved = trial.confined.solve(trial.task.payload["solution"])
    return GateResult("confined_agrees", solved == trial.gold, solved.failure)


def solvable(trial: Trial) -> GateResult:
    """pass@100 > 0, really played by the solver ladder."""
    if trial.ladder is None:
        return GateResult("solvable", True, "no ladder was given; unproven for agents")
    report = trial.ladder(trial)
    trial.measures.update(report.measures())
    return GateResult("solvable", report.passed > 0, "" if report.passed else f"0 of {report.attempts}", report.measures())


def monotone(trial: Trial) -> GateResult:
    """Each escalation lowered the ladder's measured pass rate."""
    rates = trial.task.payload.get("pass_rates", ())
    holds = all(later < earlier for earlier, later in pairwise(rates))
    return GateResult("monotone", holds, "" if holds else f"pass rates {list(rates)}")


GATES: dict[str, Callable[[Trial], GateResult]] = {
    gate.__name__: gate
    for gate in (
        solution_allowed, gold_passes, tools_shown, initial_fails, noop_fails, gold_repeats, journal_matches, reordered_passes,
        verifier_total, within_budget, nothing_leaks, foreign_fails, reset_identical, monotone, mutants_fail, tools_needed,
        cheap_policies_fail, confined_agrees, solvable,
    )
}  # fmt: skip
NEED_NO_GOLD = ("solution_allowed", "initial_fails", "monotone")
"""The others are not run where the solution is refused or fails: there is no gold run to examine."""


def run_gates(trial: Trial, stop_early: bool = True, names: Mapping[str, Any] | tuple[str, ...] = GATES) -> list[GateResult]:
    """The results in order; up to the first failure, unless all are wanted. A gate that raises has failed, by name."""
    trial.session.prepare(trial.task)
    results: list[GateResult] = []
    for name in names:
        if name not in NEED_NO_GOLD and any(not r.passed and r.name in ("solution_allowed", "gold_passes") for r in results):
            continue
        try:
            results.append(GATES[name](trial))
        except Exception as error:
            results.append(GateResult(name, False, f"{type(error).__name__}: {error}"[:300]))
        if stop_early and not results[-1].passed:
            break
    return results
