"""The relational view of a corpus: which document fulfils which clause. It alone decides whether a question has one answer.

A document's lines `field: value` are facts; lists are split at commas. A clause is `{"field", "value"}`, or a hop:
`{"field", "of": [clauses]}`, fulfilled by documents whose field names a document that fulfils the inner clauses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cache, lru_cache
from typing import Any

from rorqual.tasks import canonical
from rorqual.tasks.retrieval import Document
from rorqual.tasks.retrieval.library import documents

Clause = Mapping[str, Any]
MOST_HOPS, COMMON = 1000, 400
"""Hops that are kept; and from how many documents on, that may state a clause, what reading it gives is kept."""
LISTS, LINKS = {"Depends", "Tag", "Recommends", "Suggests"}, {"Depends"}
_LINE = re.compile(r"^([A-Za-z][\w ()-]{1,24}): (\S.*)$")
_WORDS, _BEFORE = re.compile(r"\w+"), re.compile(r"[\s(|:](?!:)(?<!::)")
_VERSION = re.compile(r"\s*\(.*?\)|\s*\|.*$|:any$")
HIDDEN = {
    "Package",
    "Version",
    "Source",
    "Installed-Size",
    "Homepage",
    "Recommends",
    "Suggests",
    "Priority",
    "Architecture",
    "name",
}
"""Fields that name the entity, or say too little to ask for."""


def name_of(document: Document) -> str:
    """The last part of its address."""
    return document.url.rpartition("/")[2]


def facts_of_line(line: str) -> list[tuple[str, str]]:
    """(field, value) of one line; descriptions give the words of five letters and more."""
    match = _LINE.match(line)
    if not match:
        return []
    field, value = match.groups()
    if field == "Description":
        return [("word", word) for word in sorted({w.lower() for w in re.findall(r"[A-Za-z]{5,}", value)})]
    if field in LISTS:
        return [(field, _VERSION.sub("", part).strip()) for part in value.split(",") if part.strip()]
    if field == "Maintainer":
        value = value.partition(" <")[0]
    return [(field, value.strip())]


class Relations:
    """(field, value) -> the numbers of the documents that hold it."""

    def __init__(self, found: Sequence[Document]):
        self.documents = found
        self.number = {name_of(d): i for i, d in enumerate(found)}
        self.holders: dict[tuple[str, str], set[int]] = {}
        for i, document in enumerate(found):
            for line in document.text.split("\n"):
                for fact in facts_of_line(line):
                    self.holders.setdefault(fact, set()).add(i)
        self.links = Counter({value: len(ids) for (field, value), ids in self.holders.items() if field in LINKS})
        self.names = [name_of(document) for document in found]
        self._rare: dict[int, list[int]] = {}
        self._hops: dict[str, set[int]] = {}

    def rare(self, max_links: int) -> list[int]:
        """The documents that at most so many others refer to."""
        if max_links not in self._rare:
            numbered = enumerate(self.documents)
            self._rare[max_links] = [i for i, document in numbered if self.links[name_of(document)] <= max_links]
        return self._rare[max_links]

    def answers(self, clauses: Iterable[Clause]) -> set[int]:
        """All documents that fulfil every clause."""
        found: set[int] | None = None
        for clause in clauses:
            holders = self.holding(clause)
            found = holders if found is None else found & holders
        return found or set()

    def holding(self, clause: Clause) -> set[int]:
        """The documents that fulfil a clause; not to be changed."""
        if "of" not in clause:
            return self.holders.get((clause["field"], clause["value"]), set())
        key = canonical(clause)
        if key not in self._hops:
            if len(self._hops) > MOST_HOPS:
                self._hops.clear()
            inner = self.answers(clause["of"])
            found = [self.holders.get((clause["field"], self.names[i]), ()) for i in inner]
            self._hops[key] = set().union(*found)
        return self._hops[key]


@cache
def relations(corpus: str) -> Relations:
    return Relations(documents(corpus))


class Reader:
    """The exhaustive oracle: it reads texts, apart from the relational view.

    A document that states a value holds every word of the value; so the documents that hold its rarest word are all that need
    reading. The index of words is made from the plain texts. What reading a common clause gave is kept: many questions say it.
    """

    def __init__(self, found: Sequence[Document]):
        self.documents = found
        self.names = [name_of(document) for document in found]
        self._read: dict[tuple[str, str], frozenset[int]] = {}
        self._said: dict[tuple[int, str], frozenset[str]] = {}
        self.postings: dict[str, list[int]] = {}
        for i, document in enumerate(found):
            for word in set(_WORDS.findall(document.text.lower())):
                self.postings.setdefault(word, []).append(i)

    def scan(self, clauses: Sequence[Clause]) -> set[int]:
        """The answers by reading."""
        plain = [(c["field"], c["value"]) for c in clauses if "of" not in c]
        by_length = sorted(plain, key=lambda clause: len(self._to_read(clause[1])))
        kept: Iterable[int] = self._to_read(by_length[0][1]) if by_length else range(len(self.documents))
        for field, value in by_length:
            kept = self._fulfilling(field, value, kept)
        for clause in (c for c in clauses if "of" in c):
            names = {self.names[i] for i in self.scan(clause["of"])}
            kept = [i for i in kept if not self._stated(i, clause["field"]).isdisjoint(names)]
        return set(kept)

    def _fulfilling(self, field: str, value: str, among: Iterable[int]) -> Iterable[int]:
        candidates = self._to_read(value)
        if len(candidates) < COMMON:
            return [i for i in among if value in self._stated(i, field)]
        if (field, value) not in self._read:
            self._read[field, value] = frozenset(i for i in candidates if value in self._stated(i, field))
        return self._read[field, value].intersection(among)

    def _stated(self, number: int, field: str) -> frozenset[str]:
        key = (number, field)
        if key not in self._said:
            self._said[key] = stated(self.documents[number].text, field)
        return self._said[key]

    def _to_read(self, value: str) -> Sequence[int]:
        known = [self.postings.get(word, []) for word in _WORDS.findall(value.lower())]
        return min(known, key=len) if known else range(len(self.documents))


@cache
def reader(corpus: str) -> Reader:
    return Reader(documents(corpus))


@lru_cache(maxsize=64)
def _stated(field: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape('Description' if field == 'word' else field)}: (.*)$", re.MULTILINE)


def stated(text: str, field: str) -> frozenset[str]:
    """The values of a field that a text states."""
    lines = _stated(field).findall(text)
    if field == "word":
        return frozenset(word for line in lines for word in re.findall(r"[a-z]{5,}", line.lower()))
    if field in LISTS:
        parts = [part.strip() for line in lines for part in line.split(",")]
        return frozenset([*parts, *(_BEFORE.split(part)[0] for part in parts)])
    return frozenset(line.split(" <")[0].strip() for line in lines)


def holds(text: str, field: str, values: Set[str]) -> bool:
    """Whether a text states one of the values of a field."""
    return not stated(text, field).isdisjoint(values)
