"""Sixty thousand documents are indexed and searched by both built-in back ends on one core: build seconds, size, latency.

The documents are this machine's own (Debian's records, manual pages, codes, docstrings). Both back ends answer the same queries
in turn; a query of a document's title must find that document among the first ten, else nothing is timed.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rorqual.tasks import TaskError
from rorqual.tasks.retrieval import Document, build_index, read_corpus

SECONDS, QUICK_SECONDS = 120, 20
QUERIES = 300
BACKENDS = ("fts5", "tantivy")


def main(quick: bool = False) -> dict[str, Any]:
    documents = _documents(3000, 6000) if quick else _documents(60000, 60000)
    rng = random.Random(0)
    titles = [d for d in rng.sample(documents, QUERIES) if len(d.title.split()) > 1]
    words = [" ".join(rng.sample(d.text.split(), min(6, len(d.text.split())))) for d in titles]
    figures: dict[str, Any] = {
        "documents": len(documents),
        "megabytes_of_text": round(sum(len(d.text) for d in documents) / 1e6, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        indices = {}
        for name in BACKENDS:
            began = time.monotonic()
            indices[name] = build_index(documents, Path(folder) / name, name)
            size = sum(p.stat().st_size for p in (Path(folder) / name).rglob("*"))
            figures[name] = {"build_s": round(time.monotonic() - began, 2), "megabytes": round(size / 1e6, 1)}
        for name, index in indices.items():
            found = sum(d.url in {h.document.url for h in index.search(d.title)} for d in titles)
            figures[name]["title_recall_at_10"] = round(found / len(titles), 3)
            assert found >= 0.9 * len(titles), f"{name}: only {found} of {len(titles)} titles are found"
        taken: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for query in words:
            for name, index in indices.items():
                began = time.perf_counter()
                index.search(query)
                taken[name].append(1000 * (time.perf_counter() - began))
        for name, times in taken.items():
            figures[name] |= {
                "median_ms": round(statistics.median(times), 3),
                "p95_ms": round(sorted(times)[len(times) * 95 // 100], 3),
            }
    figures["median_ratio_fts5_to_tantivy"] = round(figures["fts5"]["median_ms"] / figures["tantivy"]["median_ms"], 2)
    return figures


def _documents(least: int, count: int) -> list[Document]:
    """The first so many that this machine has."""
    found: list[Document] = []
    for name in ("python", "iso", "debian", "manual"):
        if len(found) < count:
            try:
                found += read_corpus(name)
            except TaskError as error:
                print(error)
    assert len(found) >= least, f"this machine has only {len(found)} documents"
    return found[:count]
