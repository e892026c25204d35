"""Conversations as training rows: each round in the context it would be sampled in, loss on what the model writes.

A file holds one conversation a line: {"messages": [...], "tools": [...], "thinking": true}, OpenAI-shaped. In thinking mode a
new user message drops earlier reasoning, so a conversation of several user turns becomes one sample for each of them, with
the loss on that round's assistant messages alone; without thinking (or with reasoning kept) it is one sample.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.chat import ChatError, Tokenizer, encode_with_sources, with_tools
from rorqual.data.loader import Batch
from rorqual.errors import UserError


@dataclass(frozen=True)
class Conversation:
    """tokens int64 [N]; trained bool [N]."""

    tokens: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Conversations:
    """The samples of a file, split by conversation; `dropped` counts what was left out and why."""

    train: list[Conversation]
    held_out: list[Conversation]
    dropped: dict[str, int]


def read_conversations(
    path: Path, tokenizer: Tokenizer, length: int, held_out_share: float = 0.05, drop_thinking: bool = True
) -> Conversations:
    """All conversations of a JSONL file. Samples longer than `length` are left out and counted, never cut.

    Raises UserError where a line is no conversation (naming the line and the field), or where nothing is left to train on.
    """
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    dropped: Counter[str] = Counter()
    for number, line in _lines(path):
        share = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=4).digest(), "little") / 2**32
        for sample in _samples(_record(path, number, line), tokenizer, drop_thinking, f"{path}:{number}"):
            if len(sample.tokens) > length:
                dropped["longer than a row"] += 1
            else:
                (held_out if share < held_out_share else train).append(sample)
    if not train:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it is empty"
        raise UserError(f"{path}: no conversation of at most {length} tokens to train on ({reasons})")
    return Conversations(train, held_out, dict(dropped))


def packed_rows(samples: Sequence[Conversation], length: int, seed: str) -> list[list[int]]:
    """Which samples share a row, by first fit in an order that the seed gives."""
    draw = np.random.default_rng(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little"))
    rows: list[list[int]] = []
    room: list[int] = []
    for index in draw.permutation(len(samples)).tolist():
        need = len(samples[index].tokens)
        at = next((i for i, left in enumerate(room) if left >= need), None)
        if at is None:
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(index)
        room[at] -= need
    return rows


def batch_of(samples: Sequence[Conversation], rows: Sequence[Sequence[int]], length: int) -> Batch:
    """Rows of samples as one padded batch; attention never crosses from one sample to the next."""
    tokens = np.zeros((len(rows), length), np.int64)
    documents = np.full((len(rows), length), -1, np.int64)
    trained = np.zeros((len(rows), length), bool)
    for row, indices in enumerate(rows):
        at = 0
        for number, index in enumerate(indices):
            sample = samples[index]
            mine = slice(at, at + len(sample.tokens))
            tokens[row, mine], documents[row, mine], trained[row, mine] = sample.tokens, number, sample.trained
            at += len(sample.tokens)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(trained))


def _samples(record: dict[str, Any], tokenizer: Tokenizer, drop_thinking: bool, where: str) -> Iterator[Conversation]:
    thinking = bool(record.get("thinking", True))
    messages = with_tools(record["messages"], record.get("tools") or ())
    ends = _rounds(messages) if thinking and drop_thinking else [(0, len(messages))]
    for begin, end in ends:
        try:
            encoded = encode_with_sources(messages[:end], tokenizer, thinking, drop_thinking)
        except ChatError as error:
            raise UserError(f"{where}: {error}") from None
        trained = [m and s.message >= begin for m, s in zip(encoded.loss_mask, encoded.sources, strict=True)]
        if any(trained):
            yield Conversation(np.array(encoded.tokens, np.int64), np.array(trained, bool))


def _rounds(messages: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """[begin, end) of each user turn with what answers it."""
    begins = [i for i, message in enumerate(messages) if message.get("role") in ("user", "developer")]
    begins = begins or [0]
    return list(zip(begins, [*begins[1:], len(messages)], strict=True))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: could not be read: {error}") from None


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise UserError(f'{path}:{number}: expected {{"messages": [...]}}')
    return record
