"""Token stores: tokenised documents on disk, memory-mapped. A directory holds, for each corpus and split, two arrays.

NAME.SPLIT.tokens.npy    uint16 or uint32 [tokens]
NAME.SPLIT.offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
store.json               the tokenizer's digest, and what became of every document that was met
tokenizer.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rorqual.chat.markers import BOS, EOS
from rorqual.data.bpe import open_tokenizer, save_tokenizer
from rorqual.errors import UserError
from rorqual.runlog import write_atomically

STORE_FILE = "store.json"


@dataclass(frozen=True)
class Documents:
    """Tokenised documents: tokens [N], offsets int64 [documents + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


class TokenStore:
    """An opened store. Raises UserError where the directory holds none, or only a part of one."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        path = self.directory / STORE_FILE
        if not path.is_file():
            raise UserError(f"{self.directory}: holds no token store (no {STORE_FILE}); make one with rorqual prepare")
        self.facts = json.loads(path.read_text(encoding="utf-8"))
        self.tokenizer = open_tokenizer(self.directory)

    @property
    def names(self) -> list[str]:
        return list(self.facts["corpora"])

    @property
    def ends(self) -> tuple[int, int]:
        """The ids that begin and end a document."""
        first, last = (self.tokenizer.token_to_id(token) for token in self.facts["document_ends"])
        assert first is not None and last is not None, "the store was written with other tokens"
        return first, last

    def documents(self, name: str, split: str) -> Documents:
        """The documents of one corpus; split is train or held_out."""
        if name not in self.names:
            raise UserError(f"{self.directory}: holds no corpus {name!r}; it holds: {', '.join(self.names)}")
        parts = [self.directory / f"{_file_name(name)}.{split}.{part}.npy" for part in ("tokens", "offsets")]
        try:
            return Documents(np.load(parts[0], mmap_mode="r"), np.load(parts[1]))
        except (OSError, ValueError) as error:
            raise UserError(f"{parts[0]}: unreadable ({error}); make the store again") from None


def write_store(
    directory: str | os.PathLike,
    tokenizer: Tokenizer,
    corpora: dict[str, dict[str, list[np.ndarray]]],
    facts: dict,
    ends: tuple[str, str] = (BOS, EOS),
    complete: Callable[[Path], Any] = lambda directory: None,
) -> TokenStore:
    """Write {corpus: {split: documents}} as a store, all or nothing: it appears under its name when it is complete.

    complete: called with the directory before it gets its name.
    """
    directory = Path(directory)
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, splits in corpora.items():
            for split, documents in splits.items():
                _write_documents(part / f"{_file_name(name)}.{split}", documents)
        save_tokenizer(tokenizer, part, ends)
        sizes = {n: {s: {"documents": len(d), "tokens": sum(map(len, d))} for s, d in ss.items()} for n, ss in corpora.items()}
        facts = {
            **facts,
            "document_ends": ends,
            "corpora": sizes,
            "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        }
        write_atomically(part / STORE_FILE, json.dumps(facts, indent=1))
        complete(part)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
    except OSError as error:
        raise UserError(f"{directory}: could not write the token store: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return TokenStore(directory)


def _write_documents(stem: Path, documents: list[np.ndarray]) -> None:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.uint32), *documents])
    if not len(tokens) or tokens.max() < 1 << 16:
        tokens = tokens.astype(np.uint16)
    np.save(stem.with_name(stem.name + ".tokens.npy"), tokens)
    np.save(stem.with_name(stem.name + ".offsets.npy"), offsets)


def _file_name(corpus: str) -> str:
    kind, _, rest = corpus.partition(":")
    return f"{kind}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}" if rest else kind
