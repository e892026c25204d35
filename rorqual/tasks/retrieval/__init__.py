"""Retrieval: documents of this machine and of files, an index over them, and the three tools that agents browse them with."""

from rorqual.tasks.retrieval.browser import BROWSER_TOOLS, Browser
from rorqual.tasks.retrieval.corpora import CORPORA, read_corpus
from rorqual.tasks.retrieval.document import Document
from rorqual.tasks.retrieval.library import library
from rorqual.tasks.retrieval.retriever import (
    EmbeddingRetriever,
    FtsRetriever,
    Hit,
    Retriever,
    TantivyRetriever,
    build_index,
    open_retriever,
)

__all__ = [
    "BROWSER_TOOLS",
    "CORPORA",
    "Browser",
    "Document",
    "EmbeddingRetriever",
    "FtsRetriever",
    "Hit",
    "Retriever",
    "TantivyRetriever",
    "build_index",
    "library",
    "open_retriever",
    "read_corpus",
]
