"""Programs that answer a question with the tools alone, each in another way. They see what an agent sees, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from rorqual.tasks.retrieval import Browser
from rorqual.tasks.retrieval.retriever import query_words

BUDGET = 12
"""Pages that an answerer may open."""


def _clauses(question: str) -> list[str]:
    """The question's parts."""
    inside = question.partition(":")[2].rpartition("?")[0] or question
    return [part.strip() for part in re.split(r";|\(|\)", inside) if part.strip()]


def _urls(browser: Browser, query: str, topn: int) -> list[str]:
    return [document.url for document in browser.links(query, topn)]


def one_query(browser: Browser, question: str) -> str | None:
    """The first hit of the question itself."""
    return next(iter(_urls(browser, question, 1)), None)


def votes(browser: Browser, question: str) -> str | None:
    """One query a clause; documents are ranked by the sum of their reciprocal places."""
    score: Counter[str] = Counter()
    for clause in _clauses(question):
        for place, url in enumerate(_urls(browser, clause, 30), 1):
            score[url] += 1000 // place
    return min(score, key=lambda url: (-score[url], url)) if score else None


def reader(browser: Browser, question: str) -> str | None:
    """Opens the best hits of the whole question and takes the page that says most of its words."""
    wanted = set(query_words(question))
    score: dict[str, int] = {}
    for url in _urls(browser, question, BUDGET):
        page = browser.observe("open", {"id": url, "view_source": True}).lower()
        score[url] = sum(word in page for word in wanted)
    return min(score, key=lambda url: (-score[url], url)) if score else None


def two_hops(browser: Browser, question: str) -> str | None:
    """Finds what the most telling clause describes, then looks for entries that mention it."""
    clauses = sorted(_clauses(question), key=len, reverse=True)
    first = next(iter(_urls(browser, clauses[0], 1)), None) if clauses else None
    if first is None:
        return None
    found = _urls(browser, f"{first.rpartition('/')[2]} {' '.join(clauses[1:])}", 2)
    return next((url for url in found if url != first), None)


ANSWERERS: dict[str, Callable[[Browser, str], str | None]] = {
    "one_query": one_query,
    "votes": votes,
    "reader": reader,
    "two_hops": two_hops,
}


def candidates(browser: Browser, question: str) -> dict[str, str]:
    """answerer -> the name it says; empty where it found nothing."""
    said = {name: answer(browser, question) for name, answer in ANSWERERS.items()}
    return {name: url.rpartition("/")[2] if url else "" for name, url in said.items()}
