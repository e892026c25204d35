"""Search questions: one answer by two independent readings, none by the single query, the same bytes from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import FieldErrors
from rorqual.synthesis import Request, maker
from rorqual.synthesis.search import SearchConfig
from rorqual.synthesis.search import relations as view
from rorqual.synthesis.search.candidates import make
from rorqual.tasks import Store, TaskError, open_episode
from rorqual.tasks.retrieval import Browser
from rorqual.tasks.retrieval.library import documents, in_memory, library, recalled
from rorqual.tasks.retrieval.retriever import query_words

from .scripted_model import Step, call, scripted_model

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
        found = {view.name_of(documents(corpus)[i]) for i in view.reader(corpus).scan(task.payload["clauses"])}
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
            assert relations.answers(asked) == view.reader(corpus).scan(asked), asked


def test_the_readers_index_loses_no_document_that_states_a_value(corpus: str) -> None:
    found, rng = documents(corpus), random.Random(2)
    for field, value in rng.sample(sorted(view.relations(corpus).holders), 60):
        by_all = {i for i, document in enumerate(found) if view.holds(document.text, field, {value})}
        assert view.reader(corpus).scan([{"field": field, "value": value}]) == by_all, (field, value)


def searcher(body: dict[str, Any]) -> Step:
    """Searches once where it may and then answers; as a judge it marks what was found higher."""
    if body["messages"][0]["role"] == "system":
        return json.dumps({"right": 9 if "found:" in body["messages"][1]["content"] else 2, "short": 5})
    if body.get("tools") and not any(m["role"] == "tool" for m in body["messages"]):
        return [call("search", query="steam")]
    return "found: much.\nAnswer: m001" if "# Search Results" in body["messages"][-1]["content"] else "I do not know."


@pytest.fixture
def endpoint() -> Iterator[str]:
    with scripted_model(searcher) as address:
        yield address


def test_a_model_answers_too_and_prompts_that_search_helps_join(corpus: str, endpoint: str, tmp_path: Path) -> None:
    rubric = [{"name": "right", "text": "is right", "weight": 3}, {"name": "short", "text": "is short"}]
    rows = [{"prompt": "What moves the mills?", "rubric": rubric}, {"prompt": "Name a crane.", "rubric": rubric}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SearchConfig(3, corpus, max_links=3, common=4, endpoint=endpoint, model="m", prompts=str(tmp_path / "prompts.jsonl"))
    helped = make(config, 0)
    assert helped.row and helped.row.is_accepted and abs(helped.row.measures["help"] - 3 / 4 * 0.7) < 1e-9
    assert not open_episode(helped.row.task, helped.world).finish("anything").is_valid  # a judge's matter
    unhelped = make(replace(config, least_help=0.6), 1)
    assert unhelped.row and [g.name for g in unhelped.row.gates if not g.passed] == ["search_helps"]
    asked = next(made for n in range(2, 60) if (made := make(config, n)).row)
    assert asked.row and asked.row.task.payload["candidates"]["endpoint"] == "m001"
    with pytest.raises(FieldErrors, match="endpoint"):
        SearchConfig(prompts="x.jsonl")


def test_the_ranking_in_memory_is_fts5s_own(corpus: str) -> None:
    index, memory = library(corpus, "fts5"), in_memory(corpus)
    for query in queries_of(corpus):
        for topn in (1, 7, 50):
            expected = [(hit.number, round(hit.score, 9)) for hit in index.search(query, topn)]
            assert [(hit.number, round(hit.score, 9)) for hit in memory.search(query, topn)] == expected, query


def queries_of(corpus: str) -> list[str]:
    rng, texts = random.Random(3), [document.text for document in documents(corpus)]
    made = [" ".join(rng.sample(rng.choice(texts).split(), 4)) for _ in range(120)]
    return [*made, "Turnings ÉTEAM of the", "drive::hand m001", "snake_case words", "__ steam", "", "nothere"]


def test_a_union_without_levels_finds_what_the_query_parser_finds(corpus: str) -> None:
    index = library(corpus, "tantivy")
    for query in queries_of(corpus):
        words = query_words(query)
        parsed, _ = index._index.parse_query_lenient(" ".join(words), ["title", "text"], field_boosts={"title": 3.0})
        for topn in (1, 7, 50):
            hits = index._searcher.search(parsed, topn).hits if words else []
            scores = {index._searcher.doc(address)["number"][0]: score for score, address in hits}
            found = index.rank(query, topn)
            assert all(abs(scores.get(number, 0.0) - score) < 1e-4 for number, score in found), query
            assert len(found) == len(scores) and [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_what_is_recalled_is_what_the_index_says(corpus: str) -> None:
    for backend in ("fts5", "tantivy"):
        index, again = library(corpus, backend), recalled(corpus, backend)
        for query in queries_of(corpus) * 2:
            expected = [(hit.number, hit.document) for hit in index.search(query, 7)]
            assert [(hit.number, hit.document) for hit in again.search(query, 7)] == expected, (backend, query)
        assert again.digest == index.digest and len(again) == len(index) == 400
        assert again.get("https://machines.example/m007") == index.get("https://machines.example/m007") is not None


def test_links_are_those_of_the_page_and_a_source_page_is_the_text(corpus: str) -> None:
    browser = Browser(library(corpus, "fts5"))
    links = browser.links("steam water", 5)
    browser.observe("search", {"query": "steam water", "topn": 5})
    assert links == browser.pages[-1].links and len(browser.pages) == 1
    browser.observe("open", {"id": links[0].url, "view_source": True})
    browser.observe("open", {"id": links[0].url})
    browser.observe("open", {"view_source": True})
    assert browser.pages[1].lines == browser.pages[3].lines == links[0].text.split("\n") != browser.pages[2].lines
