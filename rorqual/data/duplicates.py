"""Exact and near-duplicate removal, and the held-out split by document.

Near-duplicates by MinHash (Broder 1997) over shingles of five words, found through banded signatures: two documents whose
shingle sets have Jaccard similarity s share a band with probability 1 - (1 - s^ROWS)^BANDS (a half at s = 0.71), and a
candidate is dropped when its estimated similarity reaches the threshold. The first of the pair stays.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from rorqual.data.corpora import Document, Tally

SHINGLE_WORDS = 5
BANDS, ROWS = 16, 8
PRIME = np.uint64((1 << 61) - 1)
_draw = np.random.Generator(np.random.Philox(20111))
_MULTIPLIERS = _draw.integers(1, 1 << 32, BANDS * ROWS, dtype=np.uint64)
_OFFSETS = _draw.integers(0, 1 << 60, BANDS * ROWS, dtype=np.uint64)


def without_duplicates(documents: Iterable[Document], tally: Tally, index: Index) -> Iterator[Document]:
    """The documents, less exact and near copies of one that `index` already knows; both are counted."""
    for document in documents:
        verdict = index.add(document.text)
        if verdict is None:
            yield document
        else:
            tally.add(verdict)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its text alone, whatever else is in the corpus."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


class Index:
    """The documents kept so far, by digest and by MinHash band; one serves all corpora. threshold: Jaccard, in (0, 1]."""

    def __init__(self, threshold: float = 0.8):
        self.threshold = threshold
        self._digests: set[bytes] = set()
        self._signatures: list[np.ndarray] = []
        self._bands: dict[bytes, list[int]] = {}

    def add(self, text: str) -> str | None:
        """Keep the text (None), or say why not: "duplicates" or "near-duplicates"."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._digests:
            return "duplicates"
        signature = minhash(text)
        keys = [bytes([band]) + part.tobytes() for band, part in enumerate(signature.reshape(BANDS, ROWS))]
        for candidate in {i for key in keys for i in self._bands.get(key, ())}:
            if np.mean(self._signatures[candidate] == signature) >= self.threshold:
                return "near-duplicates"
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        self._digests.add(digest)
        return None


def minhash(text: str) -> np.ndarray:
    """uint64 [BANDS * ROWS]; the share of equal entries estimates the Jaccard similarity of two texts' shingle sets."""
    shingles = np.unique(_shingles(text))
    smallest = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for chunk in np.array_split(shingles, len(shingles) // 4096 + 1):
        hashed = (chunk[:, None] * _MULTIPLIERS + _OFFSETS) % PRIME  # [shingles, BANDS * ROWS]
        np.minimum(smallest, hashed.min(axis=0), out=smallest)
    return smallest


def _shingles(text: str) -> np.ndarray:
    """uint64: one hash below 2^32 for each run of SHINGLE_WORDS words (one for all of a shorter text)."""
    words = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in text.lower().split()], dtype=np.uint64)
    width = min(SHINGLE_WORDS, len(words))
    hashed = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for i in range(width):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + words[i : i + len(hashed)]
    return (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)
