"""Search questions over Debian's packages: an exhaustive oracle answers every one, single queries hardly any.

The gates refuse what the question, or the words of all its clauses, all but one, or one find at once in either index. Held out
from them are queries of all clauses but two, and of every second word of the question. Filter rates and the split are this run's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rorqual.synthesis import Request, maker
from rorqual.synthesis.search.candidates import clause_words
from rorqual.synthesis.search.relations import name_of, reader
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
    right = {"oracle": 0, "question": 0, "words": 0, "without_two": 0, "every_second_word": 0}
    for task in tasks:
        clauses, name = task.payload["clauses"], task.payload["check"]["value"]
        words = clause_words(clauses)

        def finds(query: str, name: str = name) -> bool:
            return any(name_of(hit.document) == name for hit in other.search(query, 1))

        right["oracle"] += {name_of(found[i]) for i in reader(CORPUS).scan(clauses)} == {name}
        right["question"] += finds(task.payload["question"])
        right["words"] += finds(" ".join(words))
        right["without_two"] += finds(" ".join(words[2:]))
        right["every_second_word"] += finds(" ".join(task.payload["question"].split()[::2]))
    shares = {policy: round(n / len(tasks), 4) for policy, n in right.items()}
    assert shares["oracle"] == 1.0, f"the oracle answers only {shares['oracle']}"
    for policy in ("question", "words", "without_two", "every_second_word"):
        assert shares[policy] <= MOST_SINGLE_QUERY, f"the single query {policy!r} answers {shares[policy]}"
    return {"answered_by": shares, "synthesis": report}
