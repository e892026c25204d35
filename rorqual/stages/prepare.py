"""Text to tokens: read the corpora, drop duplicates, hold documents out, train a tokenizer (or take one), write a token store."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from rorqual.chat import encode
from rorqual.chat.markers import BOS, EOS, SPECIAL_TOKENS
from rorqual.data.bpe import encode_documents, open_tokenizer, train_bpe, with_special_tokens
from rorqual.data.corpora import Document, Tally, documents
from rorqual.data.duplicates import Index, is_held_out, without_duplicates
from rorqual.data.recall import sample_text
from rorqual.data.store import STORE_FILE, TokenStore, write_store
from rorqual.errors import UserError, require
from rorqual.runlog import RunLog
from rorqual.synthesis.primers import PrimerConfig, gold_messages, primer
from rorqual.train.lineage import Making, write_record

RECALL_TEXTS = 2000
"""Recall documents in the tokenizer's training text (see rorqual/data/recall.py)."""
ENCODE_BATCH = 256
_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


@dataclass(frozen=True)
class CorpusConfig:
    name: str
    """As in rorqual/data/corpora.py: python, packages, man, doc, files:PATH, jsonl:PATH#field, parquet:PATH#column, hf:NAME."""
    weight: float = 1.0
    """Share of the text rows of a batch, relative to the other corpora's."""
    limit_mb: float | None = None
    """Read no more than this, a random choice of documents; None: all."""

    def __post_init__(self) -> None:
        require(
            self,
            weight=(self.weight >= 0, "at least 0"),
            limit_mb=(self.limit_mb is None or self.limit_mb > 0, "more than 0, or none"),
        )


@dataclass(frozen=True)
class Config:
    corpora: tuple[CorpusConfig, ...] = (CorpusConfig("python"),)
    optional_corpora: tuple[CorpusConfig, ...] = ()
    """Used where this machine has them (such as man and doc), left out with a line in the log where it has not."""
    held_out_share: float = 0.02
    near_duplicate_threshold: float = 0.8
    """Jaccard similarity of five-word shingles at and above which the later document goes."""
    tokenizer: Path | None = None
    """A tokenizer.json, or the directory of one; None trains one."""
    document_ends: tuple[str, str] = (BOS, EOS)
    """Begin and end every document. With others than DeepSeek's, a given tokenizer needs no more of DeepSeek's tokens."""
    add_special_tokens: bool = False
    """Give a tokenizer that lacks DeepSeek's special tokens new ids for them at its end."""
    vocab_size: int = 4096
    """Of a tokenizer trained here."""
    tokenizer_mb: float = 8.0
    """Text that the tokenizer is trained on, a random choice of documents."""
    tokenizer_chats: int = 0
    """Prompts and replies of primer tasks (rorqual/synthesis/primers.py) in the tokenizer's training text: the chat format's own
    words then are one token each, and a tool surface costs half."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = [corpus.name for corpus in (*self.corpora, *self.optional_corpora)]
        require(
            self,
            corpora=(bool(names) and len(set(names)) == len(names), "at least one corpus, each named once"),
            held_out_share=(0 < self.held_out_share < 1, "in (0, 1)"),
            near_duplicate_threshold=(0 < self.near_duplicate_threshold <= 1, "in (0, 1]"),
            tokenizer_mb=(self.tokenizer_mb > 0, "more than 0"),
        )


def main(config: Config, directory: Path, log: RunLog) -> TokenStore:
    """Write the token store in `directory`, or open the one that an earlier run finished there."""
    if (directory / STORE_FILE).exists():
        return TokenStore(directory)
    texts: dict[str, dict[str, list[str]]] = {}
    tallies, index = {}, Index(config.near_duplicate_threshold)
    for corpus, optional in [(c, False) for c in config.corpora] + [(c, True) for c in config.optional_corpora]:
        tallies[corpus.name] = tally = Tally()
        try:
            found = list(documents(corpus.name, tally))
        except UserError as error:
            if not optional:
                raise
            log.event("corpus left out", corpus=corpus.name, reason=str(error))
            continue
        kept = without_duplicates(_limited(found, corpus.limit_mb, config.seed), tally, index)
        texts[corpus.name] = _split([document.text for document in kept], config.held_out_share)
    _require_both_splits(texts)

    tokenizer = _tokenizer(config, [text for splits in texts.values() for text in splits["train"]])
    corpora = {
        name: {split: list(_encoded(tokenizer, part, config.document_ends)) for split, part in splits.items()}
        for name, splits in texts.items()
    }
    facts = {"documents": {name: tally.counts for name, tally in tallies.items()}, "held_out_share": config.held_out_share}
    facts["bytes"] = {n: {s: sum(len(t.encode("utf-8", "replace")) for t in p) for s, p in ss.items()} for n, ss in texts.items()}
    making = Making("prepare", config, {"tokenizer": config.tokenizer} if config.tokenizer else {})
    store = write_store(
        directory, tokenizer, corpora, facts, config.document_ends, complete=lambda part: write_record(part, making)
    )
    log.event("prepared", **store.facts)
    return store


def _limited(found: list[Document], limit_mb: float | None, seed: int) -> list[Document]:
    """All documents, or a random choice of them up to the limit, in their order."""
    if limit_mb is None:
        return found
    order, room, chosen = list(range(len(found))), limit_mb * 1e6, set()
    random.Random(seed).shuffle(order)
    for i in order:
        room -= len(found[i].text)
        if room < 0 and chosen:
            break
        chosen.add(i)
    return [found[i] for i in sorted(chosen)]


def _split(texts: list[str], share: float) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "held_out": []}
    for text in texts:
        splits["held_out" if is_held_out(text, share) else "train"].append(text)
    return splits


def _require_both_splits(texts: dict[str, dict[str, list[str]]]) -> None:
    for split in ("train", "held_out"):
        if not any(splits[split] for splits in texts.values()):
            raise UserError(f"the corpora {', '.join(texts) or '(none)'} leave no document to the split {split}: give more text")


def _tokenizer(config: Config, texts: list[str]) -> Tokenizer:
    if config.tokenizer is None:
        sample = [d.text for d in _limited([Document(t, "") for t in texts], config.tokenizer_mb, config.seed)]
        recall = sample_text(np.random.default_rng(config.seed), RECALL_TEXTS)
        chats = list(chat_texts(config.tokenizer_chats, config.seed))
        return train_bpe([*sample, *recall, *chats], config.vocab_size, SPECIAL_TOKENS)
    required = SPECIAL_TOKENS if config.document_ends == (BOS, EOS) else config.document_ends
    tokenizer = open_tokenizer(config.tokenizer, () if config.add_special_tokens else required)
    return with_special_tokens(tokenizer, SPECIAL_TOKENS) if config.add_special_tokens else tokenizer


def chat_texts(count: int, seed: int) -> Iterator[str]:
    """`count` gold conversations of primer tasks as the chat format writes them, without its special tokens."""
    for number in range(count):
        made = primer(PrimerConfig(seed), number)
        if made.row is not None:
            yield _SPECIAL.sub("\n", encode(gold_messages(made.row.task, made.world)))


def _encoded(tokenizer: Tokenizer, texts: list[str], ends: tuple[str, str]) -> Iterator[np.ndarray]:
    for i in range(0, len(texts), ENCODE_BATCH):
        yield from encode_documents(tokenizer, texts[i : i + ENCODE_BATCH], ends)
