"""BrowseComp-style questions over a local corpus: an agent searches, opens and reads, and gives a short answer.

A directory holds `corpus.jsonl` (rows {id, title, text}) and `questions.jsonl` (rows {id, question, answer}). The tools are
search, open and find, over SQLite's full-text index (BM25) in memory. Answers are compared as words, or as mathematics.
`made` writes such a directory from a seed: chains of facts about invented people, each fact in a document of its own.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.evals import mathematics
from rorqual.evals.benchmark import Benchmark, Options, Protocol, Suite, row_suite
from rorqual.evals.source import Defect, RowError, need, rows
from rorqual.evals.text import Score
from rorqual.tasks import Task
from rorqual.tasks.episode import Opening
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, failed

TEMPLATE = (
    "Answer the question with the tools, which search a collection of documents. "
    "When you know the answer, give it within \\boxed{{}}.\nQuestion: {question}"
)


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    kinds = {key: {"type": "string", "description": text} for key, text in properties.items()}
    parameters = {"type": "object", "properties": kinds, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool("search", "The documents that fit a query best: ids, titles and the beginnings of their texts.", query="words"),
    _tool("open", "The whole text of a document.", id="a document's id"),
    _tool("find", "The lines of a document that hold a phrase.", id="a document's id", pattern="what to look for"),
)


class Corpus:
    """Documents and their index. Read-only once built; used from several threads, one connection for all, one query at a time."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute("CREATE VIRTUAL TABLE documents USING fts5(id UNINDEXED, title, text, tokenize='porter')")
        values = ((str(each["id"]), str(each["title"]), str(each["text"])) for each in documents)
        self._db.executemany("INSERT INTO documents VALUES (?, ?, ?)", values)
        self._db.commit()

    def search(self, query: str, count: int = 5) -> list[tuple[str, str, str]]:
        """(id, title, first characters), best first; any word of the query may match. Ties by the order of the corpus."""
        words = re.findall(r"\w+", query)
        if not words:
            return []
        select = "SELECT id, title, substr(text, 1, 200) FROM documents WHERE documents MATCH ?"
        select += " ORDER BY bm25(documents), rowid LIMIT ?"
        with self._lock:
            return self._db.execute(select, (" OR ".join(f'"{word}"' for word in words), count)).fetchall()

    def text(self, identity: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT title || char(10) || text FROM documents WHERE id = ?", (identity,)).fetchone()
        return row[0] if row else None


class BrowseEpisode:
    """One attempt at one question; the corpus is shared."""

    is_over = False

    def __init__(self, task: Task, corpus: Corpus, score: Score = mathematics.score):
        self.task, self.corpus, self.score = task, corpus, score

    def reset(self) -> Opening:
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        try:
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
            return self._answer(name, {key: str(value) for key, value in given.items()})
        except (ValueError, AttributeError, KeyError) as error:
            return f"error: {name} can't be called so ({type(error).__name__}: {error})"

    def _answer(self, name: str, given: Mapping[str, str]) -> str:
        if name == "search":
            found = self.corpus.search(given["query"])
            return "\n".join(f"【{identity}†{title}】 {text}" for identity, title, text in found) or "nothing was found"
        if name not in ("open", "find"):
            return f"error: there is no tool {name}"
        text = self.corpus.text(given["id"])
        if text is None:
            return f"error: there is no document {given['id']}"
        if name == "open":
            return text
        lines = [line for line in text.splitlines() if given["pattern"].lower() in line.lower()]
        return "\n".join(lines) or "no line holds it"

    def finish(self, text: str | None = None) -> Verdict:
        return failed("unfinished") if text is None else self.score(self.task, text)

    def close(self) -> None:
        pass


def load(benchmark: Benchmark, options: Options) -> Suite:
    root = Path(options.data) if options.data else None
    if root is None or not (root / "corpus.jsonl").is_file() or not (root / "questions.jsonl").is_file():
        raise UserError(f"{benchmark.name}: --data names a directory with corpus.jsonl and questions.jsonl")
    documents, defects = [], []
    for where, row in rows([root / "corpus.jsonl"]):
        if isinstance(row, Defect) or not all(row.get(name) for name in ("id", "title", "text")):
            defects.append(row if isinstance(row, Defect) else Defect(where, "a document lacks id, title or text"))
        else:
            documents.append(row)
    corpus, version = Corpus(documents), digest(documents)

    def read(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
        question, gold = str(need(row, "question")), str(need(row, "answer"))
        if not isinstance(row.get("id"), str):
            raise RowError("lacks the field id")
        payload = {"question": question, "gold": gold, "corpus": version}
        payload |= {"reference": f"\\boxed{{{gold}}}", "corrupted": "\\boxed{nobody at all}"}
        return Task(
            row["id"], "browse", protocol.messages(question), TOOLS, payload=payload, tags={"hops": str(row.get("hops", ""))}
        )

    score = options.judge.score if options.judge else mathematics.score

    def opened(task: Task) -> BrowseEpisode:
        return BrowseEpisode(task, corpus, score)

    suite = row_suite(benchmark, options, read, opened, [root / "questions.jsonl"])  # type: ignore[arg-type]
    return Suite(suite.tasks, suite.open_episode, (*defects, *suite.defects))


SYLLABLES = ("ba", "ke", "li", "mo", "su", "na", "ro", "ti", "du", "fe", "gi", "ha", "ju", "pa", "we", "zo")
RELATIONS = ("teacher", "publisher", "neighbour", "rival", "patron", "physician")
FILLER = ("The roads there were mended in spring.", "Many letters of those years are lost.", "The harvest was good.",
          "Visitors praised the gardens.", "A fire took part of the archive.", "The bells were cast anew.")  # fmt: skip


def made(directory: Path, people: int, questions: int, seed: int = 0, hops: tuple[int, int] = (2, 6), filler: int = 6) -> None:
    """Write a corpus of invented people, one document each, and questions that follow chains of relations among them.

    Every person has one of each relation, so the answer is unique; no document names a relation of another document.
    As in BrowseComp, an answer is hard to find and easy to check: the question tells how the name begins and ends.
    """
    draw = random.Random(f"browse/{seed}")
    names: list[str] = []
    while len(names) < people:
        name = " ".join("".join(draw.choices(SYLLABLES, k=3)).capitalize() for _ in range(2))
        if name not in names:
            names.append(name)
    links = {name: {relation: draw.choice([n for n in names if n != name]) for relation in RELATIONS} for name in names}
    directory.mkdir(parents=True, exist_ok=True)
    documents = []
    for number, name in enumerate(names):
        facts = [f"The {relation} of {name} was {other}." for relation, other in links[name].items()]
        lines = [*facts, *draw.choices(FILLER, k=filler)]
        draw.shuffle(lines)
        documents.append({"id": f"d{number}", "title": name, "text": "\n".join(lines)})
    asked = []
    for number in range(questions):
        start, chain = draw.choice(names), draw.choices(RELATIONS, k=draw.randint(*hops))
        answer = start
        for relation in chain:
            answer = links[answer][relation]
        phrase = " of ".join(f"the {relation}" for relation in reversed(chain))
        hint = f"(The name begins with {answer[:2]} and ends with {answer[-2:]}.)"
        question = f"Who was {phrase} of {start}? {hint}"
        asked.append({"id": f"q{number}", "question": question, "answer": answer, "hops": len(chain)})
    for file, values in (("corpus.jsonl", documents), ("questions.jsonl", asked)):
        (directory / file).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
