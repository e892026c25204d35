"""A document, and the digest of a corpus of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One page. `url` names it for `open`; its host groups it in lists of hits."""

    url: str
    title: str
    text: str
    """Plain text; its lines are the lines that an agent sees, wrapped."""

    @property
    def host(self) -> str:
        """What stands between :// and the next slash."""
        return self.url.partition("://")[2].partition("/")[0] or self.url


def corpus_digest(documents: Iterable[Document]) -> str:
    """SHA-256 of all documents in order: two machines with one digest hold the same corpus."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.url, document.title, document.text):
            total.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()
