"""Three retrievers behind one protocol: SQLite's FTS5 (built in), tantivy (an extra), an embedding endpoint.

All keep the documents in one SQLite file; what differs is how a query becomes document numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rorqual.tasks.retrieval.document import Document, corpus_digest
from rorqual.tasks.task import TaskError

DOCUMENTS, TANTIVY, VECTORS = "documents.sqlite", "tantivy", "vectors.f32"
BACKENDS = ("fts5", "tantivy", "embedding")
MAX_QUERY_WORDS, MOST_TERMS = 32, 200_000
WORD = re.compile(r"\w+", re.UNICODE)
STOP_WORDS_TEXT = """
a an and are as at be by for from has have in into is it its not of on or that the this to was what which who whose with
der die das ein eine und von mit ist für le la les un une des du de et est pour qui el los las una y en es para que con
"""
STOP_WORDS = frozenset(STOP_WORDS_TEXT.split())


@dataclass(frozen=True)
class Hit:
    """A document found. `score` is the back end's own, higher is better."""

    number: int
    document: Document
    score: float


class Retriever(Protocol):
    """Finds documents, and gives them by address."""

    digest: str
    """Of the corpus."""

    def search(self, query: str, topn: int = 10) -> list[Hit]:
        """The best documents first; ties go to the lower number. A query without any word finds nothing."""
        ...

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        """Number and score of what `search` finds, in its order."""
        ...

    def get(self, url: str) -> Document | None: ...

    def __len__(self) -> int: ...

    def close(self) -> None: ...


def query_words(query: str) -> list[str]:
    """The words to look for: lower case, each once, stop words left out where others remain."""
    words = list(dict.fromkeys(word.lower() for word in WORD.findall(query)))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MAX_QUERY_WORDS]


def build_index(documents: Iterable[Document], directory: str | os.PathLike, backend: str = "fts5", **settings: Any) -> Retriever:
    """Write an index of the documents (atomically: the directory appears whole) and open it. Numbers follow their order.

    settings: for `embedding`, url and model of an OpenAI-compatible /v1/embeddings. Raises TaskError.
    """
    target = Path(directory)
    if backend not in BACKENDS:
        raise TaskError(f"retriever {backend}: there are {', '.join(BACKENDS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = list(documents)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_documents(kept, scratch / DOCUMENTS, with_words=backend == "fts5")
        if backend == "tantivy":
            _write_tantivy(kept, scratch / TANTIVY)
        if backend == "embedding":
            _write_vectors(kept, scratch / VECTORS, **settings)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return open_retriever(target, backend, **settings)


def open_retriever(directory: str | os.PathLike, backend: str = "fts5", **settings: Any) -> Retriever:
    """An index that `build_index` wrote. Raises TaskError where there is none."""
    if not (Path(directory) / DOCUMENTS).exists():
        raise TaskError(f"{directory}: no index here")
    kinds: dict[str, Any] = {"fts5": FtsRetriever, "tantivy": TantivyRetriever, "embedding": EmbeddingRetriever}
    return kinds[backend](Path(directory), **settings)


def _write_documents(documents: Sequence[Document], path: Path, with_words: bool) -> None:
    db = sqlite3.connect(path)
    db.executescript(
        "PRAGMA journal_mode=off; PRAGMA synchronous=off; CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT);"
        "CREATE TABLE documents(number INTEGER PRIMARY KEY, url TEXT UNIQUE, title TEXT, text TEXT);"
    )
    rows = [(number, d.url, d.title, d.text) for number, d in enumerate(documents, 1)]
    db.executemany("INSERT INTO documents VALUES (?,?,?,?)", rows)
    db.execute("INSERT INTO facts VALUES ('digest', ?)", (corpus_digest(documents),))
    if with_words:
        db.execute(
            "CREATE VIRTUAL TABLE words USING fts5(title, text, content='documents', content_rowid='number', "
            "tokenize='porter unicode61')"
        )
        db.execute("INSERT INTO words(words) VALUES ('rebuild')")
        db.execute("INSERT INTO words(words) VALUES ('optimize')")
    db.commit()
    db.close()


class _Stored:
    """The documents of an index."""

    def __init__(self, directory: Path):
        # One connection per retriever, read-only; episodes call it from worker threads, one at a time.
        self._db = sqlite3.connect(f"file:{directory / DOCUMENTS}?mode=ro", uri=True, check_same_thread=False)
        self.digest: str = self._db.execute("SELECT value FROM facts WHERE name='digest'").fetchone()[0]

    def get(self, url: str) -> Document | None:
        row = self._db.execute("SELECT url, title, text FROM documents WHERE url=?", (url,)).fetchone()
        return Document(*row) if row else None

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM documents").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    def search(self, query: str, topn: int = 10) -> list[Hit]:
        found = []
        for number, score in self.rank(query, topn):
            row = self._db.execute("SELECT url, title, text FROM documents WHERE number=?", (number,)).fetchone()
            found.append(Hit(number, Document(*row), score))
        return found

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        raise NotImplementedError


def _ordered(scored: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))


class FtsRetriever(_Stored):
    """SQLite FTS5: any of the words, ranked by BM25 with titles counted threefold."""

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        words = query_words(query)
        if not words or topn < 1:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        rows = self._db.execute(
            "SELECT rowid, -bm25(words, 3.0, 1.0) AS score FROM words WHERE words MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (match, topn),
        )
        return _ordered(rows.fetchall())


def _write_tantivy(documents: Sequence[Document], path: Path) -> None:
    tantivy = _tantivy()
    path.mkdir()
    index = tantivy.Index(_tantivy_schema(tantivy), path=str(path))
    writer = index.writer(heap_size=64_000_000, num_threads=1)
    for number, document in enumerate(documents, 1):
        writer.add_document(tantivy.Document(number=number, title=document.title, text=document.text))
    writer.commit()
    writer.wait_merging_threads()


def _tantivy_schema(tantivy: Any) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("number", stored=True)
    for name in ("title", "text"):
        builder.add_text_field(name, stored=False, tokenizer_name="en_stem")
    return builder.build()


def _tantivy() -> Any:
    try:
        import tantivy
    except ImportError:
        raise TaskError("retriever tantivy: pip install tantivy, or use fts5, which is built in") from None
    return tantivy


class TantivyRetriever(_Stored):
    """tantivy: the same words and weights, faster."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self._tantivy = _tantivy()
        self._index = self._tantivy.Index.open(str(directory / TANTIVY))
        self._searcher, self._numbers = self._index.searcher(), dict[tuple[int, int], int]()
        self._terms = dict[str, list[Any]]()

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        words = query_words(query)
        if not words or topn < 1:
            return []
        terms = [self._terms_of(word) for word in words]
        if any(len(found) != 1 for found in terms):  # a phrase, or nothing that is indexed: the parser knows what to do
            asked, _ = self._index.parse_query_lenient(" ".join(words), ["title", "text"], field_boosts={"title": 3.0})
        else:  # the same query without levels: only such a union leaves out documents that can't come among the best
            asked = self._tantivy.Query.boolean_query([leaf for found in terms for leaf in found[0]])
        found = self._searcher.search(asked, topn, count=False).hits
        return _ordered((self._number(address), float(score)) for score, address in found)

    def _terms_of(self, word: str) -> list[Any]:
        """For each of the terms that the index makes of a word: its two clauses."""
        if word not in self._terms:
            if len(self._terms) >= MOST_TERMS:
                self._terms.clear()
            query, occur = self._tantivy.Query, self._tantivy.Occur.Should
            schema, terms = self._index.schema, _analyzer(self._tantivy).analyze(word)
            self._terms[word] = [
                [
                    (occur, query.boost_query(query.term_query(schema, "title", term), 3.0)),
                    (occur, query.term_query(schema, "text", term)),
                ]
                for term in terms
            ]
        return self._terms[word]

    def _number(self, address: Any) -> int:
        place = (address.segment_ord, address.doc)
        if place not in self._numbers:
            self._numbers[place] = self._searcher.doc(address)["number"][0]
        return self._numbers[place]


@cache
def _analyzer(tantivy: Any) -> Any:
    """What the index makes of texts under the name en_stem."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.remove_long(40))
    return builder.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.stemmer("english")).build()


def _write_vectors(documents: Sequence[Document], path: Path, url: str, model: str = "", batch: int = 64) -> None:
    with path.open("wb") as file:
        for start in range(0, len(documents), batch):
            texts = [f"{d.title}\n{d.text}"[:8000] for d in documents[start : start + batch]]
            for vector in embed(texts, url, model):
                array("f", vector).tofile(file)


def embed(texts: Sequence[str], url: str, model: str = "", timeout_s: float = 120.0) -> list[list[float]]:
    """One vector of unit length per text, from an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY."""
    import httpx
    import numpy as np

    key = os.environ.get("OPENAI_API_KEY", "")
    address = url.rstrip("/").removesuffix("/v1") + "/v1/embeddings"
    try:
        reply = httpx.post(
            address,
            json={"model": model, "input": list(texts)},
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        reply.raise_for_status()
        rows = sorted(reply.json()["data"], key=lambda row: row["index"])
        vectors = np.asarray([row["embedding"] for row in rows], dtype=np.float32)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        raise TaskError(f"embedding endpoint {address}: {type(error).__name__}: {error}") from None
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        raise TaskError(f"embedding endpoint {address}: expected {len(texts)} finite vectors of one length")
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).tolist()


class EmbeddingRetriever(_Stored):
    """Cosine similarity of embeddings, by exhaustive product."""

    def __init__(self, directory: Path, url: str, model: str = "", batch: int = 64):
        import numpy as np

        super().__init__(directory)
        self._url, self._model = url, model
        self._vectors = np.fromfile(directory / VECTORS, dtype=np.float32).reshape(len(self), -1)  # [documents, E]

    def rank(self, query: str, topn: int = 10) -> list[tuple[int, float]]:
        import numpy as np

        if not query_words(query) or topn < 1:
            return []
        scores = self._vectors @ np.asarray(embed([query], self._url, self._model)[0], dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[:topn]
        return _ordered((int(i) + 1, float(scores[i])) for i in best)
