"""Search questions over Debian's packages: an exhaustive oracle answers every one, single queries hardly any.

The gates refuse what the question, its clauses' words, or one clause finds at once in either index. Held out from them are
queries of all clauses but one; `any_without_one` says how often the best of those, which nobody can choose, would do. Filter
rates and the split are the run's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rorqual.synthesis import Request, maker
from rorqual.synthesis.search.candidates import clause_words
from rorqual.synthesis.search.relations import name_of, scan
from rorqual.tasks import Store
from rorqual.tasks.retrieval.library import documents, library

SECONDS, QUICK_SECONDS = 420, 120
CORPUS, MOST_SINGLE_QUERY = "debian", 0.1


def main(quick: bool = False) -> dict[str, Any]:
    count = 8 if quick else 30
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "tasks")
        report = dict(maker("search").synthesize(Request(count, store, 11, 1, overrides=["backend=tantivy"])))
        tasks = store.tasks()
    other, found = library(CORPUS, "fts5"), documents(CORPUS)
    right = {"oracle": 0, "question": 0, "words": 0, "without_first": 0, "without_last": 0, "any_without_one": 0}
    for task in tasks:
        clauses, name = task.payload["clauses"], task.payload["check"]["value"]
        words = clause_words(clauses)

        def finds(query: str, name: str = name) -> bool:
            return any(name_of(hit.document) == name for hit in other.search(query, 1))

        right["oracle"] += {name_of(found[i]) for i in scan(found, clauses)} == {name}
        right["question"] += finds(task.payload["question"])
        right["words"] += finds(" ".join(words))
        fewer = [finds(" ".join(words[:i] + words[i + 1 :])) for i in range(len(words))]
        right["without_first"] += fewer[0]
        right["without_last"] += fewer[-1]
        right["any_without_one"] += any(fewer)
    shares = {policy: round(n / len(tasks), 4) for policy, n in right.items()}
    assert shares["oracle"] == 1.0, f"the oracle answers only {shares['oracle']}"
    for policy in ("question", "words", "without_first", "without_last"):
        assert shares[policy] <= MOST_SINGLE_QUERY, f"the single query {policy!r} answers {shares[policy]}"
    return {"answered_by": shares, "synthesis": report}
