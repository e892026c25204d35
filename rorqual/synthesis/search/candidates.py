"""Candidates of the search family: built, answered, verified; each gate's result is stored."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rorqual.synthesis.line import Made, refused
from rorqual.synthesis.search import SearchConfig, helpful
from rorqual.synthesis.search.answerers import ANSWERERS
from rorqual.synthesis.search.answerers import candidates as answer_all
from rorqual.synthesis.search.constructor import Found, choose, explore
from rorqual.synthesis.search.model import answer_by_model
from rorqual.synthesis.search.relations import Clause, holds, name_of, reader, relations
from rorqual.synthesis.search.wording import write
from rorqual.tasks import GateResult, Provenance, Task, TaskError, TaskRow, World, digest
from rorqual.tasks.answer import ANSWER_LINE, check_answer
from rorqual.tasks.retrieval import CORPORA, Browser, library
from rorqual.tasks.retrieval.library import documents, recalled
from rorqual.tasks.search import SEARCH_TOOLS

MAX_CALLS = 64
Chosen = list[tuple[Clause, list[dict[str, Any]]]]


@cache
def world_of(config: SearchConfig) -> World:
    """The corpus as this machine has it, by digest: its documents are never stored."""
    index = library(config.corpus, config.backend)
    payload = {"corpus": config.corpus, "backend": config.backend, "digest": index.digest}
    known = CORPORA.get(config.corpus)
    source = Provenance(
        known.source if known else config.corpus, f"{len(index)} documents", index.digest, known.licence if known else ""
    )
    return World(f"corpus-{digest(payload)}", "search", payload, digest(config.corpus), (config.corpus,), (source,))


def make(config: SearchConfig, number: int) -> Made:
    """The number-th candidate; prompts of a file come first."""
    if config.prompts and number < len(helpful.rows(config.prompts)):
        return helpful.make(config, number, world_of(config))
    rng = random.Random(f"{config.seed}/search/{number}")
    view, world = relations(config.corpus), world_of(config)
    entity = rng.choice(view.rare(config.max_links))
    index = recalled(config.corpus, config.backend, world.payload["digest"])
    found = explore(Browser(index), view, entity, config, rng)
    name, language = name_of(view.documents[entity]), config.languages[number % len(config.languages)]
    chosen, question = _choose(config, found, world, name, language, rng)
    if not chosen:
        return refused("unique", "no choice of the facts found singles the entity out")
    clauses = [clause for clause, _ in chosen]
    said = answer_all(Browser(index), question)
    if config.endpoint:
        said["endpoint"] = answer_by_model(Browser(index), question, config.endpoint, config.model)
    right = _right(said, name)
    tags = {
        "source": config.corpus, "language": language, "split": "easier" if right else "hard",
        "kind": "chain" if any("of" in c for c in clauses) else "conjunction", "depth": str(_depth(clauses)),
    }  # fmt: skip
    payload = {
        "check": {"kind": "exact", "value": name, "aliases": [view.documents[entity].url]},
        "clauses": clauses, "evidence": [piece for _, places in chosen for piece in places], "candidates": said,
        "question": question, "rarity": view.links[name], "explored_calls": found.calls,
    }  # fmt: skip
    messages = ({"role": "user", "content": f"{question}\n\n{ANSWER_LINE}"},)
    task = Task(
        f"search-{number}-{digest([question, name], 8)}", "search", messages, SEARCH_TOOLS, world.id, payload,
        len(clauses) + 4 * (not right), MAX_CALLS, tags, world.provenance,
    )  # fmt: skip
    results = gates(task, world, "bwrap", said)
    if right and not config.keep_easier:
        results.append(GateResult("all_candidates_wrong", False, ", ".join(right)))
    measures = {"answerers_right": len(right) / len(said), "clauses": float(len(clauses))}
    return Made(TaskRow(task, tuple(results), measures), world)


def _choose(config: SearchConfig, found: Found, world: World, name: str, language: str, rng: random.Random) -> tuple[Chosen, str]:
    """A choice of clauses with its question that no single query answers; else the last unique one; else nothing."""
    last: tuple[Chosen, str] = ([], "")
    for _ in range(config.tries):
        if chosen := choose(found, relations(config.corpus), config, rng):
            clauses = [clause for clause, _ in chosen]
            last = (chosen, write(clauses, language, rng))
            if _single_query_gate(world, last[1], clauses, name).passed:
                break
    return last


def _right(said: Mapping[str, str], name: str) -> list[str]:
    return sorted(answerer for answerer, value in said.items() if value == name)


def _depth(clauses: Sequence[Clause]) -> int:
    return max((1 + _depth(c["of"]) for c in clauses if "of" in c), default=0)


def gates(task: Task, world: World | None, isolation: str, said: Mapping[str, str] | None = None) -> list[GateResult]:
    """The truth is derived again in two passes, each candidate is checked, and the stored split must be what comes out.

    said: what the answerers said, where they were just asked; else the programs among them are asked again.
    """
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    if task.payload["check"]["kind"] == "rubric":
        return helpful.gates(task)
    payload, corpus = task.payload, world.payload["corpus"]
    index = recalled(corpus, world.payload["backend"], world.payload["digest"])
    check, clauses, found = payload["check"], payload["clauses"], documents(corpus)
    name = check["value"]
    by_relations = {name_of(found[i]) for i in relations(corpus).answers(clauses)}
    by_reading = {name_of(found[i]) for i in reader(corpus).scan(clauses)}
    if said is None:  # a model's answer can't be had again: it stands as it was given
        told = {who: value for who, value in payload["candidates"].items() if who not in ANSWERERS}
        said = answer_all(Browser(index), payload["question"]) | told
    right = _right(said, name)
    idle = check_answer(check, None, isolation)
    return [
        GateResult("silence_fails", not idle.passed),
        GateResult("gold_passes", check_answer(check, f"Answer: {name}", isolation).passed),
        GateResult("unique", by_relations == {name}, f"{len(by_relations)} answers by the relational view"),
        GateResult("oracle_agrees", by_reading == {name}, f"{len(by_reading)} answers by reading every document"),
        _evidence_gate(Browser(index), payload["evidence"]),
        _candidate_gate(index, clauses, said, name, corpus),
        _single_query_gate(world, payload["question"], clauses, name),
        GateResult("split_is_true", task.tags["split"] == ("easier" if right else "hard") and said == payload["candidates"]),
        GateResult("name_unsaid", name.lower() not in payload["question"].lower(), name),
    ]


def clause_words(clauses: Sequence[Clause]) -> list[str]:
    """The words of each clause alone."""
    return [" ".join(clause_words(c["of"])) if "of" in c else c["value"].replace("::", " ") for c in clauses]


def _single_query_gate(world: World, question: str, clauses: Sequence[Clause], name: str) -> GateResult:
    """No first hit of a single query is the answer: the question, the words of all clauses, all but one, one; by either index."""
    words, corpus, digest_ = clause_words(clauses), world.payload["corpus"], world.payload["digest"]
    fewer = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    for backend in dict.fromkeys(("fts5", world.payload["backend"])):
        index = recalled(corpus, backend, digest_)
        for query in (" ".join(words), *fewer, *words, question):
            if any(name_of(hit.document) == name for hit in index.search(query, 1)):
                return GateResult("single_query_fails", False, f"{backend}: {query}"[:200])
    return GateResult("single_query_fails", True)


def _evidence_gate(browser: Browser, evidence: Sequence[Mapping[str, Any]]) -> GateResult:
    """First pass of the verifier: each fact stands on its line, opened with the tools."""
    lost = []
    for piece in evidence:
        page = browser.observe("open", {"id": piece["url"], "view_source": True, "loc": piece["line"], "num_lines": 1})
        if piece["text"] not in page:
            lost.append(f"{piece['url']}:{piece['line']}")
    return GateResult("evidence_stands", not lost, ", ".join(lost)[:200], {"pieces": float(len(evidence))})


def _candidate_gate(index: Any, clauses: Sequence[Clause], said: Mapping[str, str], name: str, corpus: str) -> GateResult:
    """Second pass: each other candidate's page fails at least one clause, so that no wrong answer is right by another reading."""
    view = relations(corpus)
    others = {v: view.documents[view.number[v]].text for v in said.values() if v and v != name}
    doubtful = [value for value, text in others.items() if all(_fulfils(text, clause, view) for clause in clauses)]
    return GateResult("wrong_candidates_refuted", not doubtful, ", ".join(doubtful), {"candidates": float(len(said))})


def _fulfils(text: str, clause: Clause, view: Any) -> bool:
    values = {view.names[i] for i in view.answers(clause["of"])} if "of" in clause else {clause["value"]}
    return holds(text, clause["field"], values)
