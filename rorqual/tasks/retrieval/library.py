"""A corpus with its index, kept in the user's cache under the corpus's digest and opened once per process."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from pathlib import Path

from rorqual.tasks.retrieval.corpora import read_corpus
from rorqual.tasks.retrieval.document import Document, corpus_digest
from rorqual.tasks.retrieval.retriever import Hit, Retriever, build_index, open_retriever
from rorqual.tasks.task import TaskError

MOST_RECALLED = 300_000
"""Queries whose hits are kept."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rorqual" / "retrieval"


@cache
def documents(corpus: str) -> tuple[Document, ...]:
    """The corpus as this machine has it."""
    return tuple(read_corpus(corpus))


@cache
def library(corpus: str, backend: str = "fts5", digest: str = "") -> Retriever:
    """The index of a corpus; built on first use. Raises TaskError where the machine's corpus is not the one asked for."""
    found = corpus_digest(documents(corpus))
    if digest and found != digest:
        raise TaskError(
            f"corpus {corpus}: this machine's differs from the one that the tasks were made from; make them anew here"
        )
    folder = cache_folder() / f"{found[:24]}-{backend}"
    if folder.exists():
        return open_retriever(folder, backend)
    try:
        return build_index(documents(corpus), folder, backend)
    except OSError:
        if folder.exists():  # another process was first
            return open_retriever(folder, backend)
        raise


@cache
def in_memory(corpus: str, digest: str = "") -> Retriever:
    """The FTS5 index of a corpus with its postings in memory: the same answers, sooner, for whoever asks thousands of times."""
    from rorqual.tasks.retrieval.ranking import MemoryRetriever

    library(corpus, "fts5", digest)  # builds it where it is not there yet
    folder = cache_folder() / f"{corpus_digest(documents(corpus))[:24]}-fts5"
    return MemoryRetriever(folder)


class Recalled:
    """An index of a corpus whose documents stand in memory; a query that was asked before is not asked again."""

    def __init__(self, index: Retriever, found: tuple[Document, ...]):
        self.digest, self._found = index.digest, found
        self._place = {document.url: document for document in found}
        self._rank = lru_cache(MOST_RECALLED)(lambda query, topn: tuple(index.rank(query, topn)))
        self.close = index.close

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        return list(self._rank(query, topn))

    def search(self, query: str, topn: int = 10) -> list[Hit]:
        return [Hit(number, self._found[number - 1], score) for number, score in self._rank(query, topn)]

    def get(self, url: str) -> Document | None:
        return self._place.get(url)

    def __len__(self) -> int:
        return len(self._found)


@cache
def recalled(corpus: str, backend: str, digest: str = "") -> Recalled:
    """The same answers as `library` gives, for makers of tasks: they ask thousands of queries, many of them again."""
    index = in_memory(corpus, digest) if backend == "fts5" else library(corpus, backend, digest)
    return Recalled(index, documents(corpus))
