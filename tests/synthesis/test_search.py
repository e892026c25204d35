"""Search questions: one answer by two independent readings, none by the single query, the same bytes from one seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rorqual.synthesis import Request, maker
from rorqual.synthesis.search import relations as view
from rorqual.tasks import Store, TaskError, open_episode
from rorqual.tasks.retrieval.library import documents

WORDS = "turning grinding lifting heavy light silent copper marble wooden steam water"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Invented machines with sections, keepers, tags and needs."""
    rng, path = random.Random(5), tmp_path_factory.mktemp("corpus") / "machines.jsonl"
    rows = []
    for i in range(400):
        summary = " ".join(
            rng.sample(
                ["turning", "grinding", "lifting", "heavy", "light", "silent", "copper", "marble", "wooden", "steam", "water"], 3
            )
        )
        row = {
            "url": f"https://machines.example/m{i:03}", "title": f"m{i:03}: {summary}", "text": f"Description: {summary}",
            "Section": rng.choice(["mills", "cranes", "pumps", "looms"]), "Maintainer": f"Keeper {rng.randrange(9)} <k@x>",
            "Tag": ", ".join(rng.sample(["drive::steam", "drive::hand", "size::large", "size::small"], 2)),
        }  # fmt: skip
        if i > 5:
            row["Depends"] = ", ".join(f"m{rng.randrange(i):03} (>= 1.{i})" for _ in range(2))
        rows.append(row)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_seed_gives_one_store_whatever_the_workers_and_its_questions_hold(corpus: str, tmp_path: Path) -> None:
    asked = [f"corpus={corpus}", "max_links=3", "common=4"]
    reports = [maker("search").synthesize(Request(12, Store(tmp_path / str(n)), 3, n, overrides=asked)) for n in (1, 2)]
    assert reports[0]["tasks"] == 12 and reports[0]["digest"] == reports[1]["digest"]
    assert (tmp_path / "1/tasks.jsonl").read_bytes() == (tmp_path / "2/tasks.jsonl").read_bytes()
    store = Store(tmp_path / "1")
    worlds = store.worlds()
    for task in store.tasks():
        name = task.payload["check"]["value"]
        found = {view.name_of(documents(corpus)[i]) for i in view.scan(documents(corpus), task.payload["clauses"])}
        assert found == {name} and name not in task.prompt
        assert task.payload["candidates"]["one_query"] != name and len(task.payload["candidates"]) >= 3
        assert (task.tags["split"] == "hard") == (name not in task.payload["candidates"].values())
    task = store.tasks()[0]
    assert all(g.passed for g in maker("search").regate(task, worlds[task.world], "bwrap"))
    task.payload["clauses"].pop()
    assert not all(g.passed for g in maker("search").regate(task, worlds[task.world], "bwrap"))


def test_an_episode_browses_and_judges_and_another_corpus_is_refused(corpus: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    maker("search").synthesize(Request(1, store, 4, overrides=[f"corpus={corpus}", "max_links=3", "common=4"]))
    task = store.tasks()[0]
    world = store.worlds()[task.world]
    episode = open_episode(task, world)
    opening = episode.reset()
    assert [t["function"]["name"] for t in opening.tools] == ["search", "open", "find", "python"]
    assert "# Search Results" in episode.call("search", {"query": "steam"})
    name = task.payload["check"]["value"]
    assert episode.finish(f"It is this.\nAnswer: {name.upper()}.").passed
    assert not episode.finish("Answer: m").passed and not episode.finish(f"Answer: {name} or m001").passed
    episode.close()
    world.payload["digest"] = "0" * 64
    with pytest.raises(TaskError, match="differs"):
        open_episode(task, world)


def test_relations_and_reading_agree_on_random_conjunctions(corpus: str) -> None:
    relations, rng = view.relations(corpus), random.Random(1)
    facts = sorted(relations.holders)
    for _ in range(200):
        inner = [dict(zip(("field", "value"), f, strict=True)) for f in rng.sample(facts, 1)]
        clauses = [dict(zip(("field", "value"), f, strict=True)) for f in rng.sample(facts, 2)]
        for asked in (clauses, clauses[:1], [*clauses[:1], {"field": "Depends", "of": inner}]):
            assert relations.answers(asked) == view.scan(documents(corpus), asked), asked
