"""The constructor: a program that starts at a rare entity, browses with the tools, and gathers facts with their places."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

from rorqual.synthesis.search import SearchConfig
from rorqual.synthesis.search.relations import HIDDEN, LINKS, Clause, Relations, facts_of_line, name_of
from rorqual.tasks.retrieval import Browser

MAX_INNER, MAX_FACTS = 2, 40
_NUMBERED = re.compile(r"^L(\d+): (.*)$", re.MULTILINE)


@dataclass
class Fact:
    """A fact as it was seen: on which line of which page."""

    field: str
    value: str
    url: str
    line: int
    text: str

    def evidence(self) -> dict[str, Any]:
        return {"url": self.url, "line": self.line, "text": self.text}


@dataclass
class Found:
    """What exploring gave: clauses to choose from, each with the places that prove it."""

    clauses: list[tuple[Clause, list[dict[str, Any]]]] = field(default_factory=list)
    calls: int = 0


def explore(browser: Browser, relations: Relations, entity: int, config: SearchConfig, rng: random.Random) -> Found:
    """Open the entity's page, and the pages it refers to down to `depth`, `breadth` at each."""
    found = Found()
    _visit(browser, relations, relations.documents[entity].title, entity, config, rng, found, config.depth)
    return found


def _visit(
    browser: Browser, relations: Relations, query: str, number: int, config: SearchConfig, rng: random.Random, found: Found,
    depth: int,
) -> list[Fact]:  # fmt: skip
    document = relations.documents[number]
    browser.links(query)
    shown = browser.observe("open", {"id": document.url, "view_source": True})
    found.calls += 2
    facts = _read(shown, document.url)
    usable = [f for f in facts if _is_usable(f, name_of(document), relations, config)]
    found_here: list[tuple[Clause, list[dict[str, Any]]]] = [
        ({"field": f.field, "value": f.value}, [f.evidence()]) for f in usable
    ]
    hops = [f for f in facts if f.field in LINKS and f.value in relations.number] if depth else []
    for hop in rng.sample(hops, min(config.breadth, len(hops))):
        inner = Found()
        _visit(browser, relations, hop.value, relations.number[hop.value], config, rng, inner, depth - 1)
        found.calls += inner.calls
        chosen = rng.sample(inner.clauses, min(MAX_INNER, len(inner.clauses)))
        if chosen:
            proof = [hop.evidence(), *(e for _, places in chosen for e in places)]
            found_here.append(({"field": hop.field, "of": [clause for clause, _ in chosen]}, proof))
    found.clauses = found_here
    return facts


def _read(shown: str, url: str) -> list[Fact]:
    facts = []
    for line, text in _NUMBERED.findall(shown):
        facts += [Fact(field, value, url, int(line), text) for field, value in facts_of_line(text)]
    return facts[: 10 * MAX_FACTS]


def _is_usable(fact: Fact, name: str, relations: Relations, config: SearchConfig) -> bool:
    """Not the entity's name or a part of it, not hidden, and shared by enough others to give nothing away."""
    if fact.field in HIDDEN or any(
        part in fact.value.lower() for part in [name.lower(), *name.lower().split("-")] if len(part) > 2
    ):
        return False
    return len(relations.holders.get((fact.field, fact.value), ())) >= config.common


def choose(
    found: Found, relations: Relations, config: SearchConfig, rng: random.Random
) -> list[tuple[Clause, list[dict[str, Any]]]]:
    """Clauses, each of which narrows the answers, until there is one answer; empty where that can't be reached."""
    hops = [c for c in found.clauses if "of" in c[0]]
    plain = [c for c in found.clauses if "of" not in c[0]]
    rng.shuffle(hops)
    rng.shuffle(plain)
    chosen, left = [], None
    for clause in [*hops[:1], *plain, *hops[1:]]:
        holding = relations.holding(clause[0])
        narrowed = holding if left is None else left & holding
        if left is None or len(narrowed) < len(left):
            chosen, left = [*chosen, clause], narrowed
        if len(chosen) > config.most_clauses:
            return []
        if len(left) == 1 and len(chosen) >= config.least_clauses:
            return chosen
    return []
