"""What an encoded conversation is made of: runs of text, each of which knows whether it's special and where it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rorqual.chat.errors import ChatError
from rorqual.chat.markers import SPECIAL_TOKENS, find_reserved

_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


class Source(NamedTuple):
    """Where a span came from: the index of the message in `messages` (-1: none), its role, and the field.

    Fields: content, reasoning_content, tool_calls[k] (all that is written for call k), tools[k], tools (the prose around
    them), response_format; "format" is what the format itself writes, such as markers and tags.
    """

    message: int
    role: str
    field: str

    @property
    def is_generated(self) -> bool:
        """Whether a model writes it: all of an assistant message, its </think>, tags and end of sentence included."""
        return self.role == "assistant"

    @property
    def where(self) -> str:
        return f"messages[{self.message}].{self.field}"


class Span(NamedTuple):
    text: str
    is_special: bool
    source: Source


def fixed(text: str, source: Source) -> list[Span]:
    """Spans of text that the format itself writes: every marker in it is a special token."""
    parts = _SPLIT.split(text)
    return [Span(part, bool(n % 2), source) for n, part in enumerate(parts) if part]


def plain(text: str, source: Source) -> list[Span]:
    """Spans of text that somebody else wrote: no marker in it is special."""
    return [Span(text, False, source)] if text else []


def plain_runs(spans: list[Span]) -> Iterator[list[Span]]:
    """Consecutive spans of plain text, and single special spans; a run never mixes prompt and generated text.

    Text is tokenised by runs, so that ids do not depend on where one field ends and the next begins.
    """
    run: list[Span] = []
    for span in spans:
        if run and (span.is_special or run[-1].is_special or span.source.is_generated != run[-1].source.is_generated):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def refuse_markers(spans: list[Span]) -> None:
    """Raise ChatError, naming the field, where text would turn into a special token once the spans are joined."""
    run: list[Span] = []
    for span in [*spans, Span("", True, Source(-1, "", "format"))]:
        if not span.is_special:
            run.append(span)
            continue
        marker = find_reserved("".join(part.text for part in run)) if run else None
        if marker:
            raise ChatError(
                _holder(run, marker).where,
                f"holds the marker {marker}, which would turn into a special token in one flat string; "
                "take it out, or use encode_tokens, which writes it as plain text",
            )
        run = []


def _holder(run: list[Span], marker: str) -> Source:
    """The source of the span in which the marker's last character stands."""
    end = "".join(part.text for part in run).index(marker) + len(marker)
    for part in run:
        end -= len(part.text)
        if end <= 0:
            return part.source
    raise AssertionError("the marker is in the run")
