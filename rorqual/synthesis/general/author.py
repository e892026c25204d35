"""The paper's loop with a model behind any OpenAI-compatible endpoint: it builds the database with bash and search, writes tools,
a simple task, its solution and its verifier, repairs them until every gate passes, then raises the difficulty and repairs again.

Every bound is finite and every end has a name; one author's failure never touches another's work.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from rorqual.errors import require
from rorqual.policy import ChatPolicy, Message, SamplingParams, StopReason
from rorqual.sandbox import SandboxError
from rorqual.synthesis.general.gates import Trial, run_gates
from rorqual.synthesis.general.ladder import LadderReport
from rorqual.synthesis.general.workbench import FILES, Workbench
from rorqual.tasks import GateResult, Record, Task, TaskError, TaskRow, WorldSession, task_record, world_record
from rorqual.tasks.box import BoxError
from rorqual.tasks.episode import SUBMIT, WorldEpisode

CATEGORIES = (
    "trip planning", "clinic appointments", "library loans", "warehouse restocking", "conference rooms", "freight routing",
    "software releases", "museum exhibits", "school timetables", "laboratory samples", "fleet maintenance", "grant applications",
)  # fmt: skip
SYSTEM = """You build worlds for training agents. You have bash, search (real data of this machine) and write_file in a sandbox.
Leave these files in the working directory:
- database.sql: CREATE TABLE and INSERT statements for SQLite, filled with real data that you found. The first column of each
  table is its key; keys must not count up.
- tools.py: the tools as typed Python functions with docstrings. They see `db` (a sqlite3 connection with named rows),
  `new_id(prefix)` and `ToolError(code, message)`. Every public function is a tool.
- task.json: {"prompt": what the user asks, "policy": rules for the agent or "", "asks_answer": whether an answer is handed in}.
- solution.py: one function solution(tools) that calls tools.NAME(argument=...) and computes, nothing else: no import, no
  database. It returns the answer as text, or None.
- verify.py: one function verify(initial, final, answer) over table -> list of rows (dictionaries), before and after. It returns
  the list of reasons for which the attempt fails (empty: it passes). Check also that nothing else changed.
Then call check; repair what it reports until it says that every gate passes, then call submit."""
CHECK_TOOL = {
    "type": "function",
    "function": {
        "name": "check",
        "description": "Run every gate on the files and report what fails.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
DONE_TOOL = {
    "type": "function",
    "function": {
        "name": SUBMIT,
        "description": "Hand in the files; they are checked once more.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
HARDER = (
    "Accepted. Now raise the difficulty: more steps, more constraints, a rule that the prompt does not repeat; add tools if "
    "those there do not suffice. Change the files, check, and submit. The solver's pass rate must fall below {rate}, and stay "
    "above 0."
)


class End(StrEnum):
    """Why an author's work on a level ended."""

    ACCEPTED = "accepted"
    UNAVAILABLE = "endpoint_unavailable"  # it stalled, refused or answered garbage, and did so again when asked again
    STOPPED = "stopped_half_way"  # messages without calls, though it was reminded
    REFUSED = "gates_refused"  # the gates still failed after all repairs
    TURNS = "turns_used_up"
    SANDBOX = "sandbox_unavailable"


@dataclass(frozen=True)
class AuthorConfig:
    """Bounds of one author."""

    max_turns: int = 48
    """Messages of the model for each level."""
    max_checks: int = 10
    """Times that the gates may refuse one level."""
    max_reminders: int = 2
    """For messages without any call."""
    levels: int = 1
    """How often the difficulty is raised."""
    solver_attempts: int = 8
    solver_turns: int = 24
    isolation: str = "bwrap"
    tool_timeout_s: float = 10.0
    """For one call of a tool, a solution or a verifier."""
    max_tokens: int = 8192
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_turns", "max_checks", "solver_attempts", "solver_turns", "max_tokens")
        require(
            self, **{name: (getattr(self, name) >= 1, "at least 1") for name in counts}, levels=(self.levels >= 0, "at least 0")
        )


@dataclass
class Author:
    """One model at one workbench, working on one category."""

    config: AuthorConfig
    policy: ChatPolicy
    index: int
    category: str
    messages: list[Message] = field(default_factory=list)
    problems: list[GateResult] = field(default_factory=list)
    accepted: list[tuple[Task, Any, list[GateResult], dict[str, float]]] = field(default_factory=list)
    checks: int = 0
    rates: tuple[float, ...] = ()

    async def work(self) -> list[Record]:
        """The records of this author: a world and a task for each level that was accepted, and how it ended where it was not."""
        self.messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Category: {self.category}."}]
        try:
            with Workbench(self.config.isolation) as bench:
                for level in range(self.config.levels + 1):
                    end = await self._level(bench, level)
                    if end is not End.ACCEPTED:
                        return self._records(end)
        except (SandboxError, BoxError) as error:
            self.problems = [GateResult("sandbox", False, str(error)[:300])]
            return self._records(End.SANDBOX)
        return self._records(End.ACCEPTED)

    async def _level(self, bench: Workbench, level: int) -> End:
        self.checks, reminders = 0, 0
        for _ in range(self.config.max_turns):
            reply = await self.policy.reply(self.messages, [*bench.tools().tools, CHECK_TOOL, DONE_TOOL], self._sampling())
            if reply.stop_reason is StopReason.UNAVAILABLE:
                self.problems = [GateResult("endpoint", False, str(reply.message.get("failure", ""))[:300])]
                return End.UNAVAILABLE
            self.messages.append(reply.message)
            calls = reply.message.get("tool_calls") or []
            if not calls:
                reminders += 1
                if reminders > self.config.max_reminders:
                    return End.STOPPED
                self.messages.append({"role": "user", "content": f"Go on: write {', '.join(FILES)}, check, submit."})
            for call in calls:
                observation, is_done = await self._call(bench, call, level)
                self.messages.append({"role": "tool", "tool_call_id": str(call.get("id", "")), "content": observation})
                if is_done:
                    self.messages.append({"role": "user", "content": HARDER.format(rate=self.rates[level])})
                    return End.ACCEPTED
            if self.checks >= self.config.max_checks:
                return End.REFUSED
        return End.TURNS

    def _sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.config.max_tokens, temperature=self.config.temperature)

    async def _call(self, bench: Workbench, call: dict[str, Any], level: int) -> tuple[str, bool]:
        """The observation, and whether the level is done. Whatever is wrong with a call is an observation."""
        function = call.get("function") or {}
        name, arguments = str(function.get("name", "")), function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                return f"the arguments are no JSON: {error}", False
        if name not in ("check", SUBMIT):
            return await asyncio.to_thread(bench.tools().observe, name, arguments), False
        results = await self._check(bench, level)
        failed = [f"{r.name}: {r.detail or 'fails'}" for r in results if not r.passed]
        if not failed and name == SUBMIT:
            return "accepted", True
        return "\n".join(["These gates fail:", *failed]) if failed else "Every gate passes. Call submit to hand it in.", False

    async def _check(self, bench: Workbench, level: int) -> list[GateResult]:
        try:
            results = await self._gates(bench, level)
        except TaskError as error:
            results = [GateResult("files", False, str(error)[:500])]
        except BoxError as error:
            results = [GateResult("tools", False, f"tools.py: {error.reason}: {error}"[:500])]
        self.problems = [r for r in results if not r.passed]
        self.checks += bool(self.problems)
        return results

    async def _gates(self, bench: Workbench, level: int) -> list[GateResult]:
        world = await asyncio.to_thread(bench.world)
        with WorldSession(world, self.config.isolation, self.config.tool_timeout_s) as session:
            shown = await asyncio.to_thread(lambda: session.tools)
            tags = {"kind": "authored", "surface": "full", "category": self.category, "made_by": "endpoint", "language": "en"}
            task = bench.task(world, shown, f"{world.id}-{level + 1}", level, tags)
            previous = [{"calls": t.payload["gold_calls"], "answer": t.payload["gold_answer"]} for t, *_ in self.accepted[:level]]
            task = replace(task, payload={**task.payload, "foreign": previous, "pass_rates": list(self.rates[:level])})
            trial = Trial(world, task, session)
            results = await asyncio.to_thread(run_gates, trial)
            if all(r.passed for r in results):
                results[-1], rate = await self._solvable(session, task)
                task = replace(task, payload={**task.payload, "pass_rates": [*self.rates[:level], rate]})
                results.append(self._is_harder(rate, level))
                if all(r.passed for r in results):
                    self._accept(task, world, results, trial, rate, level)
        return results

    def _accept(self, task: Task, world: Any, results: list[GateResult], trial: Trial, rate: float, level: int) -> None:
        gold = {"gold_calls": [c.pair for c in trial.gold.calls if c.changes], "gold_answer": trial.gold.answer}
        task = replace(task, payload={**task.payload, **gold})
        self.accepted = [
            *self.accepted[:level],
            (task, world, results, {"pass@1": rate, "attempts": float(self.config.solver_attempts)}),
        ]
        self.rates = (*self.rates[:level], rate)

    def _is_harder(self, rate: float, level: int) -> GateResult:
        before = self.rates[:level]
        holds = not before or rate < before[-1]
        return GateResult(
            "monotone", holds, "" if holds else f"not measurably harder: the solver's pass rate is {rate}, it was {before[-1]}"
        )

    async def _solvable(self, session: WorldSession, task: Task) -> tuple[GateResult, float]:
        """The solver is the same endpoint, shown the task alone."""
        passed = 0
        for _ in range(self.config.solver_attempts):
            passed += await solve_once(self.policy, WorldEpisode(task, session.world, session=session), self.config)
        report = LadderReport(self.config.solver_attempts, passed, 0)
        result = GateResult("solvable", passed > 0, "" if passed else f"0 of {report.attempts}", report.measures())
        return result, round(report.pass_rate, 4)

    def _records(self, end: End) -> list[Record]:
        records = []
        for level, (task, world, results, measures) in enumerate(self.accepted):
            order = (self.index, level + 1)
            records += [world_record(world, (self.index, level)), task_record(TaskRow(task, tuple(results), measures), order)]
        if end is not End.ACCEPTED:
            detail = "; ".join(f"{r.name}: {r.detail}" for r in self.problems)[:1000]
            value = {"gate": str(end), "detail": detail, "category": self.category, "messages": len(self.messages)}
            records.append(Record("rejected", (self.index, len(self.accepted) + 1, 0), value))
        return records


async def solve_once(policy: ChatPolicy, episode: WorldEpisode, config: AuthorConfig) -> bool:
    """One attempt of a ChatPolicy at a task; whether it passed."""
    opening = await asyncio.to_thread(episode.reset)
    messages: list[Message] = list(opening.messages)
    text = None
    for _ in range(config.solver_turns):
        reply = await policy.reply(
            messages, opening.tools, SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature)
        )
        messages.append(reply.message)
        text = reply.message.get("content")
        calls = reply.message.get("tool_calls") or []
        for call in calls:
            function = call.get("function") or {}
            observation = await asyncio.to_thread(episode.call, str(function.get("name", "")), function.get("arguments") or "{}")
            messages.append({"role": "tool", "tool_call_id": str(call.get("id", "")), "content": observation})
        if not calls or episode.is_over or reply.stop_reason is StopReason.UNAVAILABLE:
            break
    return (await asyncio.to_thread(episode.finish, text)).passed


async def run_authors(
    policy: ChatPolicy,
    config: AuthorConfig,
    indices: Sequence[int],
    at_once: int,
    on_records: Any,
    categories: Sequence[str] = (),
) -> None:
    """Let one author work for each index, some at a time; `on_records(index, records)` gets what came of each."""
    slots = asyncio.Semaphore(at_once)

    async def one(index: int) -> None:
        async with slots:
            category = random.Random(f"{config.seed}/{index}").choice(categories or CATEGORIES)
            try:
                records = await Author(config, policy, index, category).work()
            except Exception as error:  # one author must never take its siblings along
                value = {"gate": "crash", "detail": f"{type(error).__name__}: {error}"[:300], "category": category}
                records = [Record("rejected", (index, 0, 0), value)]
            on_records(index, records)

    await asyncio.gather(*(one(index) for index in indices))
