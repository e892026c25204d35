"""The compiler: what it makes is exact, deterministic, distinct by structure, and harder where it says so."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import UsageError, UserError
from rorqual.synthesis import Request, maker
from rorqual.synthesis.general import corpora, domain
from rorqual.synthesis.general.compiler import (
    CompilerConfig,
    _overlay,
    _with_tools,
    build_world,
    compile_world,
    planner_for,
)
from rorqual.synthesis.general.domain import make_domain, make_plan, populate
from rorqual.synthesis.general.emit import solution_source, verifier_source
from rorqual.synthesis.general.escalate import Draft
from rorqual.synthesis.general.exact import Exact, cheapest_path, facts_key
from rorqual.synthesis.general.fingerprints import minhash, parts, similarity, weisfeiler_lehman
from rorqual.synthesis.general.gates import COMPACT_CHARS, GATES
from rorqual.synthesis.general.goals import decode, encode, skeleton
from rorqual.synthesis.general.ladder import SKILLS, Memory, pass_at_k, play
from rorqual.synthesis.general.mechanisms_more import MECHANISMS
from rorqual.synthesis.general.pipeline import BARREN_WORLDS, Progress
from rorqual.synthesis.general.propose import Proposer
from rorqual.synthesis.general.surface import settled_readers, tools_source
from rorqual.tasks import Record, Store, Task, TaskRow, World, canonical
from rorqual.tasks.host import Host

INLINE = CompilerConfig(seed=7, isolation="none", attempts=8, most_attempts=100)


def made(config: CompilerConfig, indices: range) -> list[Record]:
    return [record for index in indices for record in compile_world(config, index)]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return made(INLINE, range(12))


@pytest.fixture(scope="module")
def rows(records: list[Record]) -> list[TaskRow]:
    return [TaskRow.from_json(json.loads(json.dumps(r.value))) for r in records if r.kind == "task"]


def test_at_least_twelve_mechanisms_with_tables_actions_and_policies() -> None:
    assert len(MECHANISMS) >= 12
    for mechanism in MECHANISMS.values():
        assert mechanism.tables and mechanism.actions and mechanism.clauses and len(mechanism.options) >= 2
        assert set(mechanism.roles) <= set(domain.ROLE_NOUNS)


def test_every_accepted_task_holds_the_result_of_every_gate(rows: list[TaskRow]) -> None:
    assert len(rows) > 20
    for row in rows:
        assert [gate.name for gate in row.gates] == list(GATES) and row.is_accepted
        assert 0 < row.measures["pass@1"] <= 1 and row.measures["pass@100"] == 1.0


def test_one_index_gives_the_same_records_again(records: list[Record]) -> None:
    assert made(INLINE, range(3)) == [r for r in records if r.order[0] < 3]


def test_each_escalation_lowered_the_measured_pass_rate(rows: list[TaskRow]) -> None:
    escalated = [row.task.payload for row in rows if row.task.payload["operators"]]
    assert len(escalated) > 5
    for payload in escalated:
        rates = payload["pass_rates"]
        assert len(rates) == len(payload["operators"]) + 1
        assert all(a > b > 0 for a, b in itertools.pairwise(rates))


def test_sql_the_tools_and_the_verifier_agree_on_what_a_goal_means() -> None:
    """Three routes from one formula: calls by SQL, calls by the solution through the tools, predicates over the rows."""
    tried = 0
    for index in range(100, 112):
        built = build_world(INLINE, index)
        keys = {table: {row["id"]: row for row in found} for table, found in built.session.initial_rows().items()}
        proposer = Proposer(built.domain, Exact(built.domain, built.db), random.Random(index))
        for _ in range(3):
            goal, solution = proposer.propose() or pytest.fail("no goal")
            built.session.prepare(_overlay(_with_tools(built, proposer, Draft(goal, solution, {}, {}, (), {}))))
            replay = built.session.replay(solution.calls)
            if any(call.is_error for call in replay.calls):
                continue
            source, verifier = solution_source(built.domain, goal), verifier_source(built.domain, goal)
            solved = built.session.solve(source)
            assert facts_key(solved.delta, keys) == facts_key(replay.delta, keys), goal
            assert (solved.answer, solved.failure) == (solution.answer, "")
            task = Task("t", "general", (), payload={"verifier": verifier})
            assert built.session.verify(task, replay.delta, solution.answer).passed
            assert not built.session.verify(task, [], None).passed
            assert decode(json.loads(json.dumps(encode(goal)))) == goal
            tried += 1
    assert tried > 25


def test_population_keeps_every_invariant_and_ids_tell_nothing() -> None:
    for index in range(20):
        made_domain = make_domain(make_plan(3, index))
        rows = populate(made_domain, f"test/{index}")
        for derived in made_domain.derived:
            for row in rows[derived.table]:
                children = [c for c in rows[derived.child] if c[derived.ref] == row["id"]]
                children = [c for c in children if not derived.states or c[derived.state] in derived.states]
                base = row[derived.base] if derived.base else 0
                assert row[derived.column] == base + sum(c[derived.value] if derived.value else 1 for c in children)  # type: ignore[operator]
        assert populate(made_domain, f"test/{index}") == rows
        assert populate(made_domain, "another") != rows


def structure(plan: domain.Plan) -> dict[str, str]:
    found = make_domain(plan)
    found = replace(found, readers=settled_readers(found))
    payload = {"schema": ["CREATE TABLE _ids (salt TEXT, given INTEGER)"], "rows": {}, "keys": {}}
    return parts(found, Host().op_load(**payload, source=[tools_source(found)])["tools"])


def test_a_fingerprint_sees_structure_and_never_names() -> None:
    for index in range(6):
        plan = make_plan(5, index)
        nouns = {name: f"thing{i}" for i, name in enumerate(plan.nouns)}
        verbs = {name: f"act{i}" for i, name in enumerate(plan.verbs)}
        turned = dict(zip(plan.corpora, ["zones", "languages", "packages", "scripts"], strict=True))
        assert structure(plan) == structure(replace(plan, nouns=nouns, verbs=verbs, corpora=turned))
        assert (
            structure(plan)["schema"]
            != structure(replace(plan, mechanisms=plan.mechanisms[:-1], clauses=(), counted=()))["schema"]
        )


def test_the_graph_hash_is_invariant_under_relabelling_and_sees_one_edge() -> None:
    labels = {"a": "table", "b": "table", "c": "int", "d": "int"}
    edges = [("a", "c", "has"), ("b", "d", "has"), ("a", "b", "refers")]
    names = {"a": "w", "b": "x", "c": "y", "d": "z"}
    other = ({names[n]: v for n, v in labels.items()}, [(names[s], names[t], k) for s, t, k in reversed(edges)])
    assert weisfeiler_lehman((labels, edges)) == weisfeiler_lehman(other)
    assert weisfeiler_lehman((labels, edges)) != weisfeiler_lehman((labels, [*edges[:2], ("b", "a", "sums")]))


def test_goal_skeletons_ignore_constants_and_names(rows: list[TaskRow]) -> None:
    goal = decode(rows[0].task.payload["goal"])
    assert skeleton(goal) == rows[0].task.tags["skeleton"]
    assert len({row.task.tags["skeleton"] for row in rows}) > len(rows) // 2


def test_minhash_estimates_the_overlap_of_word_triples() -> None:
    text = " ".join(f"word{i}" for i in range(200))
    near = text.replace("word100 ", "other ")
    assert similarity(minhash(text), minhash(text)) == 1
    assert similarity(minhash(text), minhash(near)) > 0.85
    assert similarity(minhash(text), minhash(" ".join(f"x{i}" for i in range(200)))) < 0.1


def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass() -> None:
    for n, c, k in [(6, 2, 3), (5, 0, 2), (5, 5, 1), (7, 1, 7)]:
        outcomes = [1] * c + [0] * (n - c)
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_the_ladders_memory_changes_no_verdict(records: list[Record]) -> None:
    world = World.from_json(json.loads(json.dumps(records[0].value["world"])))
    task = Task.from_json(json.loads(json.dumps(next(r for r in records if r.kind == "task").value["task"])))
    built = build_world(INLINE, 0)
    assert built.world == world
    built.session.prepare(task)
    make, shared = planner_for(built.domain, task.payload), Memory()
    for i in range(24):
        policies = [make(random.Random(i), SKILLS[i % 3]) for _ in range(2)]
        assert play(built.session, task, policies[0], shared) == play(built.session, task, policies[1], Memory())


def test_compact_tasks_are_short_and_some_are_solved_from_the_prompt_alone() -> None:
    config = replace(INLINE, compact_share=1.0)
    found = [r.value for r in made(config, range(8)) if r.kind == "task"]
    assert len(found) > 12
    assert all(len(canonical([v["task"]["messages"], v["task"]["tools"]])) <= COMPACT_CHARS for v in found)
    assert sum(v["measures"]["searcher_passed"] for v in found) >= 2


def test_registers_differ_and_provenance_is_stored(rows: list[TaskRow]) -> None:
    assert len({row.task.tags["register"] for row in rows}) >= 3
    assert all(len(p.sha256) == 64 or p.key.startswith("missing") for row in rows for p in row.task.provenance)


def test_a_missing_corpus_is_a_value_and_its_stated_second_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = corpora.corpus("elements")
    assert isinstance(found, corpora.Missing) and "FileNotFoundError" in found.reason
    plan = replace(make_plan(1, 0), corpora={"site": "zones", "party": "languages", "item": "elements", "staff": "scripts"})
    plan = next(replace(make_plan(1, i), corpora=plan.corpora) for i in range(9) if "item" in roles(make_plan(1, i)))
    made_domain = make_domain(plan)
    notes = [p for p in made_domain.provenance if p.source == "elements"]
    assert len(notes) == 1 and "media_types stands in" in notes[0].key
    monkeypatch.setattr(domain, "corpus", lambda name: corpora.Missing(name, "gone"))
    with pytest.raises(UserError, match="second choice"):
        make_domain(plan)


def roles(plan: domain.Plan) -> set[str]:
    return {role for name in plan.names for role in MECHANISMS[name].roles}


def test_dijkstra_refuses_ties_and_matches_enumeration() -> None:
    rng = random.Random(4)
    for _ in range(30):
        edges = [(f"e{i}", *rng.sample("abcdef", 2), rng.randint(1, 50)) for i in range(14)]
        best = _cheapest_by_enumeration(edges, "a", "f")
        try:
            assert sum(e[3] for e in edges if e[0] in cheapest_path(edges, "a", "f")) == best
        except Exception as error:
            assert str(error) in ("none", "tie") and (str(error) == "tie" or best is None)


def _cheapest_by_enumeration(edges: list[tuple[Any, ...]], start: str, goal: str) -> int | None:
    best, stack = None, [(start, 0, {start})]
    while stack:
        node, cost, seen = stack.pop()
        if node == goal:
            best = cost if best is None else min(best, cost)
            continue
        stack += [(t, cost + price, seen | {t}) for _, s, t, price in edges if s == node and t not in seen]
    return best


OVERRIDES = ("isolation=none", "attempts=8")


def synthesize(directory: Path, count: int, workers: int, seed: int = 11) -> Store:
    store = Store(directory)
    maker("general").synthesize(Request(count, store, seed, workers, overrides=OVERRIDES))
    return store


def same_bytes(a: Store, b: Store) -> None:
    for name in ("tasks.jsonl", "worlds.jsonl", "rejected.jsonl", "manifest.json"):
        assert (a.directory / name).read_bytes() == (b.directory / name).read_bytes(), name


def test_one_seed_gives_one_set_whatever_the_workers_and_though_it_was_killed(tmp_path: Path) -> None:
    whole = synthesize(tmp_path / "one", 6, 1)
    same_bytes(whole, synthesize(tmp_path / "three", 6, 3))
    killed = tmp_path / "killed"
    options = [f"--set={override}" for override in OVERRIDES]
    command = [sys.executable, "-m", "rorqual", "synthesize", "--family", "general", "--count", "6", "--out", str(killed)]
    for _ in range(2):
        process = subprocess.Popen(
            [*command, "--seed", "11", "--json", *options], stdout=subprocess.DEVNULL, start_new_session=True
        )
        before, deadline = _count(killed), time.monotonic() + 60
        while _count(killed) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _count(killed) > before, "a kill loses at most the task in hand"
    same_bytes(whole, synthesize(killed, 6, 2))
    grown = synthesize(tmp_path / "one", 8, 2)
    assert len(grown.tasks()) == 8, "a sealed store can grow"
    before = grown.directory.stat().st_mtime_ns
    assert maker("general").synthesize(Request(8, grown, 11, overrides=OVERRIDES))["tasks"] == 8
    assert grown.directory.stat().st_mtime_ns == before, "a finished one is left as it is"


def _count(directory: Path) -> int:
    return len(list(Store(directory).rows())) if Store(directory).exists else 0


def test_a_store_keeps_to_its_settings(tmp_path: Path) -> None:
    synthesize(tmp_path, 2, 1)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        synthesize(tmp_path, 2, 1, seed=12)


def test_a_run_that_can_bring_nothing_ends(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sandbox nonsense: backend"):
        maker("general").synthesize(Request(1, Store(tmp_path), overrides=("isolation=nonsense",)))
    assert Progress(dict.fromkeys(range(BARREN_WORLDS), 0)).is_barren()
    assert not Progress({**dict.fromkeys(range(BARREN_WORLDS), 0), 3: 1}).is_barren()
    assert not Progress(dict.fromkeys(range(1, BARREN_WORLDS + 1), 0)).is_barren()


def test_unknown_families_and_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there are .*general"):
        maker("nonsense")
    with pytest.raises(UserError, match="colour"):
        maker("general").synthesize(Request(1, Store(tmp_path), overrides=("colour=blue",)))


def test_the_commands_make_and_validate_a_store_confined(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "rorqual"]
    out = str(tmp_path / "store")
    options = ["--family", "general", "--count", "2", "--out", out, "--json", "--export", f"parquet={tmp_path / 't.parquet'}"]
    done = subprocess.run([*run, "synthesize", *options], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tasks"] == 2 and (tmp_path / "t.parquet").exists()
    checked = subprocess.run([*run, "validate", out, "--json"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads(checked.stdout)["passed_by_gate"] == dict.fromkeys(GATES, 2)
    path = tmp_path / "store" / "tasks.jsonl"
    path.write_text(path.read_text().replace("reasons = frame(", "return []\\n    reasons = frame("))
    spoiled = subprocess.run([*run, "validate", out], capture_output=True, text=True)
    assert spoiled.returncode == 1 and "initial_fails fails" in spoiled.stdout
