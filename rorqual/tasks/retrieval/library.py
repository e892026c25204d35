"""A corpus with its index, kept in the user's cache under the corpus's digest and opened once per process."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from rorqual.tasks.retrieval.corpora import read_corpus
from rorqual.tasks.retrieval.document import Document, corpus_digest
from rorqual.tasks.retrieval.retriever import Retriever, build_index, open_retriever
from rorqual.tasks.task import TaskError


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
