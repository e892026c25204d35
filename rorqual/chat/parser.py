"""The whole output of a model at once: a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rorqual.chat.deltas import MessageBuilder, NewId, Repair, no_id
from rorqual.chat.stream import Mode, StreamParser
from rorqual.chat.tokenizer import Tokenizer


def parse(
    text: str,
    thinking: bool = True,
    mode: Mode = "strict",
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop_unknown: bool = False,
    new_id: NewId = no_id,
) -> dict[str, Any]:
    """The assistant message that a model's output says: the inverse of `encode`.

    text: what follows the prompt, with or without its end of sentence. thinking: whether the prompt ended with <think>.
    Strictly read, what the format doesn't allow is plain text, never a call; see `StreamParser` for the other arguments.
    Calls carry ids only where `new_id` makes them: the text holds none. Raises nothing on any text.
    """
    return parse_with_repairs([(text, None)], thinking, mode, tools, drop_unknown, new_id)[0]


def parse_tokens(
    tokens: Iterable[int],
    tokenizer: Tokenizer,
    thinking: bool = True,
    mode: Mode = "strict",
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop_unknown: bool = False,
    new_id: NewId = no_id,
) -> dict[str, Any]:
    """`parse` of token ids: only special tokens are markers, so that text which looks like one stays text."""
    return parse_with_repairs(tokenizer.pieces(tokens), thinking, mode, tools, drop_unknown, new_id)[0]


def parse_with_repairs(
    pieces: Iterable[tuple[str, bool | None]],
    thinking: bool = True,
    mode: Mode = "tolerant",
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop_unknown: bool = False,
    new_id: NewId = no_id,
) -> tuple[dict[str, Any], list[Repair]]:
    """The message of (text, is_special) pieces, and what was mended."""
    parser = StreamParser(thinking, mode, tools, drop_unknown, new_id)
    builder = MessageBuilder()
    for text, is_special in pieces:
        builder.add(parser.feed(text, is_special))
    builder.add(parser.finish())
    return builder.message(), parser.repairs
