"""The compiler: from a plan to a world and its tasks, each proven by every gate. One index is one unit of work.

plan -> domain -> rows -> tools -> goal -> exact solution -> solution() and verify() -> escalate, measured -> gates -> record
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rorqual.errors import require
from rorqual.synthesis.general.domain import Domain, Rows, make_domain, make_plan, populate
from rorqual.synthesis.general.emit import Formula, solution_source, verifier_source
from rorqual.synthesis.general.escalate import OPERATORS, WITHOUT_NEW_SOLUTION, Draft, add_missing_tools, primary
from rorqual.synthesis.general.exact import Exact, Solution, Unsolvable
from rorqual.synthesis.general.fingerprints import fingerprint, parts
from rorqual.synthesis.general.gates import Trial, run_gates
from rorqual.synthesis.general.goals import Goal, Selector, decode, encode, selectors, skeleton
from rorqual.synthesis.general.ladder import LadderReport, Planner, Searcher, climb
from rorqual.synthesis.general.propose import Proposer
from rorqual.synthesis.general.prose import REGISTERS, Realiser, system_message
from rorqual.synthesis.general.surface import settled_readers, world_payload
from rorqual.tasks import GateResult, Record, Task, TaskRow, World, WorldSession, digest, task_record, world_record
from rorqual.tasks.episode import SUBMIT_TOOL

FAMILY = "general"


@dataclass(frozen=True)
class CompilerConfig:
    """How worlds and tasks are made."""

    seed: int = 0
    compact_share: float = 0.15
    """Of worlds with short schemas and small tables, for models of a few million parameters."""
    tasks_per_world: float = 2.4178
    """On average; the paper has 4,417 tasks over 1,827 environments."""
    max_level: int = 4
    """Escalations at most; each task draws its own aim from 0 to this."""
    attempts: int = 24
    """Plays of the solver ladder for each measurement."""
    most_attempts: int = 100
    """Where none of them passed: pass@100 is really tried."""
    candidates: int = 4
    """Drafts tried for each task before its place stays empty."""
    isolation: str = "bwrap"
    """Where the solution runs once more, without the database; "none" leaves that gate to `rorqual validate`."""

    def __post_init__(self) -> None:
        require(
            self,
            compact_share=(0 <= self.compact_share <= 1, "in [0, 1]"),
            tasks_per_world=(1 <= self.tasks_per_world <= 8, "in [1, 8]"),
            max_level=(self.max_level >= 0, "at least 0"),
            attempts=(self.attempts >= 4, "at least 4"),
            most_attempts=(self.most_attempts >= self.attempts, "at least attempts"),
            candidates=(self.candidates >= 1, "at least 1"),
        )


@dataclass
class Built:
    """One world, opened, with its exact solver and a twin of another seed."""

    config: CompilerConfig
    index: int
    domain: Domain
    rows: Rows
    hidden: tuple[str, ...]
    world: World
    session: WorldSession
    confined: WorldSession | None = None
    tool_names: frozenset[str] = frozenset()
    """Of the world's own tools."""

    @cached_property
    def db(self) -> sqlite3.Connection:
        return database(self.world.payload)

    @cached_property
    def twin(self) -> tuple[Rows, sqlite3.Connection]:
        """The same domain with the rows of another seed."""
        rows = populate(self.domain, f"twin/{self.config.seed}/{self.index}")
        return rows, database(world_payload(self.domain, rows, "twin"))


def database(payload: dict[str, Any], added_rows: dict[str, list[list[Any]]] | None = None) -> sqlite3.Connection:
    """A connection of the maker's own on a world's initial state."""
    db = sqlite3.connect(":memory:")
    for statement in payload["schema"]:
        db.execute(statement)
    for table in payload["rows"]:
        values = [*payload["rows"][table], *(added_rows or {}).get(table, ())]
        if values:
            db.executemany(f'INSERT INTO "{table}" VALUES ({",".join("?" * len(values[0]))})', values)
    return db


def plan_domain(config: CompilerConfig, index: int) -> tuple[Domain, tuple[str, ...]]:
    """The domain of an index, and the tables for which its tools have no reader."""
    domain = make_domain(make_plan(config.seed, index, config.compact_share))
    domain = replace(domain, readers=settled_readers(domain))
    rng = random.Random(f"hidden/{config.seed}/{index}")
    parents = {c.target for t in domain.tables.values() for c in t.columns if c.kind == "ref"}
    leaves = [name for name in domain.tables if name not in parents and not domain.plan.is_compact]
    return domain, tuple(name for name in leaves if rng.random() < 0.2)


def build_world(config: CompilerConfig, index: int) -> Built:
    """Populate the domain of an index, emit its tools, open it."""
    domain, hidden = plan_domain(config, index)
    seed = f"{config.seed}/{index}"
    rows = populate(domain, seed)
    payload = world_payload(domain, rows, seed, hidden)
    session = WorldSession(World("", FAMILY, payload), "inline")
    tools = session.tools
    payload["domain"] = encode(domain)
    payload["structure"] = parts(domain, tools)
    print_of = fingerprint(domain, tools)
    world = World(f"g-{print_of}", FAMILY, payload, print_of, domain.plan.names, domain.provenance)
    session.world = world
    confined = WorldSession(world, config.isolation) if config.isolation != "none" else None
    names = frozenset(tool["function"]["name"] for tool in tools)
    return Built(config, index, domain, rows, hidden, world, session, confined, names)


def compile_world(config: CompilerConfig, index: int, known: frozenset[tuple[int, ...]] = frozenset()) -> Iterator[Record]:
    """The records of one index, in order; those in `known` are not made again."""
    built = build_world(config, index)
    try:
        yield world_record(built.world, (index,))
        rng = random.Random(f"count/{config.seed}/{index}")
        whole = int(config.tasks_per_world)
        for number in range(whole + (rng.random() < config.tasks_per_world - whole)):
            if (index, number + 1) not in known:
                yield from _compile_task(built, number)
    finally:
        built.session.close()
        if built.confined:
            built.confined.close()


def _compile_task(built: Built, number: int) -> Iterator[Record]:
    """The accepted task of one place, after the candidates that were refused."""
    for candidate in range(built.config.candidates):
        rng = random.Random(f"task/{built.config.seed}/{built.index}/{number}/{candidate}")
        order = (built.index, number + 1, candidate)
        draft = make_draft(built, rng)
        if draft is None:
            yield Record("rejected", order, {"gate": "proposal", "detail": "no goal with a unique solution was found"})
            continue
        task = make_task(built, draft, f"{built.world.id}-{number + 1}", rng)
        trial = Trial(built.world, task, built.session, built.confined, _ladder_of(built, draft))
        results = run_gates(trial)
        if all(result.passed for result in results):
            yield task_record(TaskRow(_tiered(task, trial), tuple(results), trial.measures), (built.index, number + 1))
            return
        failed = results[-1]
        yield Record("rejected", order, {"gate": failed.name, "detail": failed.detail, "goal": draft.goal.kind})


def make_draft(built: Built, rng: random.Random) -> Draft | None:
    """A simple goal, then harder ones while each is measurably harder, up to an aim that the task draws."""
    proposer = Proposer(built.domain, Exact(built.domain, built.db), rng)
    proposed = _first(built, proposer, rng)
    if proposed is None:
        return None
    draft = proposed
    aim = rng.randint(0, 1 if built.domain.plan.is_compact else built.config.max_level)
    names = list(OPERATORS)
    for _ in range(aim):
        rng.shuffle(names)
        harder = next((d for d in (_escalated(built, draft, name, proposer, rng) for name in names) if d), None)
        if harder is None:
            break
        draft = harder
    return draft


def _first(built: Built, proposer: Proposer, rng: random.Random) -> Draft | None:
    for _ in range(8):
        proposed = proposer.propose()
        if proposed is None:
            return None
        draft = Draft(*proposed, {}, {}, (), {})
        if not _is_sound(built, proposer, draft):
            continue
        draft = _with_tools(built, proposer, draft)
        rate = measure(built, draft, rng).pass_rate
        if rate > 0:
            return replace(draft, pass_rates=(round(rate, 4),))
    return None


def _escalated(built: Built, draft: Draft, name: str, proposer: Proposer, rng: random.Random) -> Draft | None:
    """The draft after one operator, where that is solvable, sound, different, and measurably harder."""
    try:
        harder = OPERATORS[name](draft, proposer, rng)
        if harder is None:
            return None
        exact = (
            Exact(built.domain, database(built.world.payload, dict(harder.added_rows))) if harder.added_rows else proposer.exact
        )
        solution = exact.solve(harder.goal)
    except (Unsolvable, LookupError):
        return None
    is_same = (solution.calls, solution.answer) == (draft.solution.calls, draft.solution.answer)
    if is_same and name not in WITHOUT_NEW_SOLUTION:
        return None
    harder = replace(harder, solution=solution, operators=(*draft.operators, name))
    if not _is_sound(built, replace(proposer, exact=exact), harder):
        return None
    harder = _with_tools(built, proposer, harder)
    rate = round(measure(built, harder, rng).pass_rate, 4)
    if not 0 < rate < draft.pass_rates[-1]:
        return None
    return replace(harder, pass_rates=(*draft.pass_rates, rate))


def _is_sound(built: Built, proposer: Proposer, draft: Draft) -> bool:
    """Every constraint of the prompt matters, the choice is no coincidence of few rows, and the tools do it."""
    goal, exact = draft.goal, proposer.exact
    least = 2 if built.domain.plan.is_compact else 3
    selector = primary(goal)
    if selector is not None and selector.order and _is_independent(selector) and len(exact.select(selector, {})) < least:
        return False
    for weaker in _weakened(goal):
        try:
            other = exact.solve(weaker)
        except Unsolvable:
            continue
        if (other.calls, other.answer) == (draft.solution.calls, draft.solution.answer):
            return False
    built.session.prepare(_overlay(draft))
    replay = built.session.replay(draft.solution.calls)
    return all('"temporarily_unavailable"' in call.observation or not call.is_error for call in replay.calls)


def _is_independent(selector: Selector) -> bool:
    return all(atom.is_constant or atom.value.path.startswith("self.") for atom in selector.all_atoms)


def _weakened(goal: Goal) -> Iterator[Goal]:
    """The goal without one of its sampled constraints, for each. What an action needs anyway may go without saying."""
    from rorqual.synthesis.general.escalate import with_selector

    for selector in selectors(goal):
        for i, atom in enumerate(selector.atoms):
            if atom.is_constant and not atom.minus and atom.path not in ("name", "id", "status"):
                yield with_selector(goal, selector, replace(selector, atoms=(*selector.atoms[:i], *selector.atoms[i + 1 :])))


def _overlay(draft: Draft) -> Task:
    payload = {"added_tools": list(dict(draft.added_tools).values()), "added_rows": dict(draft.added_rows)}
    return Task("overlay", FAMILY, (), payload=payload)


def _with_tools(built: Built, proposer: Proposer, draft: Draft) -> Draft:
    return add_missing_tools(draft, proposer, Formula(built.domain, draft.goal).used_tables(), built.hidden)


def make_task(built: Built, draft: Draft, task_id: str, rng: random.Random) -> Task:
    """The task of a draft: prose, shown tools, generated functions, foreign gold runs."""
    built.session.prepare(_overlay(draft))
    register = "terse" if built.domain.plan.is_compact else rng.choice(REGISTERS)
    goal = draft.goal
    prompt = Realiser(built.domain, register).prompt(goal, rng)
    system = (
        [] if built.domain.plan.is_compact else [{"role": "system", "content": system_message(built.domain, goal, draft.rules)}]
    )
    if built.domain.plan.is_compact and goal.clauses:
        prompt += " " + " ".join(Realiser(built.domain, register).clause(built.domain.clauses[i]) for i in goal.clauses)
    tools = shown_tools(built, draft)
    gold_calls = len(built.session.solve(solution_source(built.domain, goal)).calls)
    payload = {
        "solution": solution_source(built.domain, goal),
        "verifier": verifier_source(built.domain, goal),
        "goal": encode(goal),
        "secrets": sorted({key for _, key in draft.solution.picked}),
        "foreign": foreign_runs(built, goal),
        "operators": list(draft.operators),
        "pass_rates": list(draft.pass_rates),
        "decoys": dict(draft.decoys),
        "synthesised_tools": sorted(set(draft.added_tools) - built.tool_names - set(dict(draft.decoys).values())),
        "has_distractors": any(not name.startswith("_") for name in draft.added_rows),
        **_overlay(draft).payload,
    }
    tags = {
        "kind": goal.kind,
        "register": register,
        "skeleton": skeleton(goal),
        "surface": "compact" if built.domain.plan.is_compact else "full",
        "language": "en",
        "made_by": "program",
    }
    messages = (*system, {"role": "user", "content": prompt})
    provenance = built.world.provenance
    return Task(
        task_id,
        FAMILY,
        messages,
        tools,
        built.world.id,
        payload,
        len(draft.operators),
        max(12, 2 * gold_calls + 8),
        tags,
        provenance,
    )


def shown_tools(built: Built, draft: Draft) -> tuple[dict[str, Any], ...]:
    """All tools, and submit where there is an answer; on the compact surface what the goal needs and one write tool more."""
    tools = built.session.tools
    if not built.domain.plan.is_compact:
        return (*tools, SUBMIT_TOOL) if draft.goal.ask else tuple(tools)
    used = {name for table in Formula(built.domain, draft.goal).used_tables() for name in _readers(built, table)}
    used |= {step.action for step in draft.goal.steps} | set(dict(draft.decoys).values())
    others = [a.name for a in built.domain.actions if a.name not in used and len(a.params) == 1]
    return tuple(t for t in tools if t["function"]["name"] in used | set(others[:1]))


def _readers(built: Built, table: str) -> list[str]:
    from rorqual.synthesis.general.surface import reader_names

    return reader_names(built.domain, table)


def foreign_runs(built: Built, goal: Goal) -> list[dict[str, Any]]:
    """The gold run of the same formula over the twin's rows, its ids translated to the rows of the same rank here."""
    rows, db = built.twin
    try:
        solution: Solution = Exact(built.domain, db).solve(goal)
    except (Unsolvable, LookupError):
        return []
    here = {}
    for table, found in rows.items():
        mine = built.rows[table]
        here |= {row["id"]: mine[i % len(mine)]["id"] for i, row in enumerate(found)}
    calls = [[name, {k: here.get(v, v) for k, v in arguments.items()}] for name, arguments in solution.calls]
    return [{"calls": calls, "answer": solution.answer}]


def planner_for(domain: Domain, payload: dict[str, Any]) -> Callable[[random.Random, float], Planner]:
    """Makes planners for a stored task."""
    goal = decode(payload["goal"])

    def make(rng: random.Random, skill: float) -> Planner:
        return Planner(
            domain, goal, rng, skill, decoys=payload.get("decoys", {}), has_distractors=payload.get("has_distractors", False)
        )

    return make


def measure(built: Built, draft: Draft, rng: random.Random) -> LadderReport:
    """The planners' pass rate on a draft."""
    payload = {
        "goal": encode(draft.goal),
        "verifier": verifier_source(built.domain, draft.goal),
        "decoys": dict(draft.decoys),
        "has_distractors": any(not name.startswith("_") for name in draft.added_rows),
        **_overlay(draft).payload,
    }
    task = Task(digest(payload["goal"]), FAMILY, (), payload=payload, max_calls=400)
    built.session.prepare(task)
    return climb(built.session, task, planner_for(built.domain, payload), None, built.config.attempts, built.config.attempts)


def _ladder_of(built: Built, draft: Draft) -> Callable[[Trial], LadderReport]:
    return ladder(built.domain, built.config.attempts, built.config.most_attempts)


def ladder(domain: Domain, attempts: int, most: int) -> Callable[[Trial], LadderReport]:
    """The program rungs, for a task that carries its goal."""

    def run(trial: Trial) -> LadderReport:
        planner = planner_for(domain, trial.task.payload)
        return climb(trial.session, trial.task, planner, Searcher(domain, trial.rng), attempts, most)

    return run


TIERS = (0.85, 0.65, 0.4, 0.2)
"""Pass rates of the ladder at and above which a task is of tier 0, 1, 2, 3; below them, 4."""


def _tiered(task: Task, trial: Trial) -> Task:
    rate = trial.measures["pass@1"]
    return replace(task, tier=next((tier for tier, bound in enumerate(TIERS) if rate >= bound), len(TIERS)))


def regate(task: Task, world: World, session: WorldSession, attempts: int = 24, most: int = 100) -> list[GateResult]:
    """Every gate of a stored task again, from what is stored alone."""
    domain = decode(world.payload["domain"]) if "domain" in world.payload else None
    rungs = ladder(domain, attempts, most) if domain is not None and "goal" in task.payload else None
    return run_gates(Trial(world, task, session, None, rungs), stop_early=False)
