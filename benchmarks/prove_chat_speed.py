"""The streaming parser takes 20 MB/s in 4 KB pieces and 250,000 token-sized feeds a second or more, in bounded memory.

Three kinds of output are read in both ways: prose and reasoning, a file written as a string argument, and a large JSON
argument; each is also read with is_special as a detokeniser gives it. Every timed output is first checked: its deltas add up
to the message that the encoder wrote. The length is doubled to show that time is linear, and a 10 MB argument is streamed with
the peak of allocated memory measured. Times are of the processor, one thread, the best of several;
the full form asserts them.
"""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from rorqual.chat import MessageBuilder, StreamParser, encode, no_id
from rorqual.chat.markers import SPECIAL_TOKENS

SECONDS = 40
QUICK_SECONDS = 15
PIECE_BYTES = 4096
TOKEN_CHARS = 4
FLOOR_MB_S = 20.0
FLOOR_FEEDS_S = 250_000.0
Pieces = list[tuple[str, bool | None]]

WORDS = ["the", "sparse", "attention", "of", "a", "layer", "selects", "tokens", ";", "x = f(a[i], b)", "if a < b", "`c`"]
WORDS += ["\u2014", "größe", "数据", "\n\n-", "def\n"]


def prose(n_chars: int, seed: int) -> str:
    choose = random.Random(seed)
    parts = []
    length = 0
    while length < n_chars:
        parts.append(choose.choice(WORDS) + " ")
        length += len(parts[-1])
    return "".join(parts)


def message(kind: str, n_chars: int) -> dict[str, Any]:
    if kind == "prose":
        return {"role": "assistant", "reasoning_content": prose(n_chars // 2, 1), "content": prose(n_chars // 2, 2)}
    if kind == "string argument":
        arguments: dict[str, Any] = {"path": "src/main.py", "text": prose(n_chars, 3)}
    else:
        rows = [{"id": n, "name": prose(20, n), "size": n / 7, "tags": ["a", "b"], "on": True} for n in range(n_chars // 90)]
        arguments = {"rows": rows}
    call = {"type": "function", "function": {"name": "write", "arguments": json.dumps(arguments, ensure_ascii=False)}}
    return {"role": "assistant", "content": None, "reasoning_content": "Write it.", "tool_calls": [call]}


def output(kind: str, n_chars: int) -> tuple[str, dict[str, Any]]:
    """A well-formed output, and the message that it says."""
    said = message(kind, n_chars)
    return encode([said], context=[{"role": "user", "content": "Q"}]), said


def in_bytes(text: str) -> Pieces:
    """Pieces of about 4 KB of UTF-8."""
    step = max(1, int(PIECE_BYTES * len(text) / len(text.encode())))
    return [(text[at : at + step], None) for at in range(0, len(text), step)]


def in_tokens(text: str, flagged: bool) -> Pieces:
    """Token-sized pieces; flagged: with is_special, each special token a piece of its own."""
    cut, at = [], 0
    while at < len(text):
        special = next((token for token in SPECIAL_TOKENS if text.startswith(token, at)), None) if text[at] in "<｜" else None
        end = at + len(special) if special else at + TOKEN_CHARS
        for marker in "<｜":
            other = -1 if special else text.find(marker, at + 1, end)
            end = other if other > 0 else end
        cut.append((text[at:end], bool(special) if flagged else None))
        at = end
    return cut


def consume(pieces: Pieces, use: Callable[[list], None] | None = None) -> float:
    """Seconds to feed all pieces. `use` gets every list of deltas."""
    parser = StreamParser(new_id=no_id)
    feed = parser.feed
    began = time.process_time()
    if use is None:
        for text, is_special in pieces:
            feed(text, is_special)
        parser.finish()
    else:
        for text, is_special in pieces:
            use(feed(text, is_special))
        use(parser.finish())
    seconds = time.process_time() - began
    assert not parser.repairs, parser.repairs[:3]
    return seconds


def check(pieces: Pieces, said: dict[str, Any]) -> None:
    builder = MessageBuilder()
    consume(pieces, builder.add)
    assert builder.message() == said, "the deltas do not add up to the message"


def best(pieces: Pieces, repeats: int) -> float:
    return min(consume(pieces) for _ in range(repeats))


def peak_bytes(pieces: Pieces) -> int:
    """The most memory that parsing held at once beyond the pieces themselves."""
    tracemalloc.start()
    consume(pieces, lambda deltas: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(kind: str, n_chars: int, repeats: int) -> dict[str, float]:
    text, said = output(kind, n_chars)
    whole, tokens, flagged = in_bytes(text), in_tokens(text, False), in_tokens(text, True)
    for pieces in (whole, tokens, flagged):
        check(pieces, said)
    double = in_bytes(output(kind, 2 * n_chars)[0])
    seconds = best(whole, repeats)
    return {
        "megabytes": len(text.encode()) / 1e6,
        "mb_per_s_in_4_kb": len(text.encode()) / 1e6 / seconds,
        "token_feeds_per_s": len(tokens) / best(tokens, repeats),
        "flagged_token_feeds_per_s": len(flagged) / best(flagged, repeats),
        "time_of_twice_the_length": best(double, repeats) / seconds,
    }


def assert_fast(figures: dict[str, Any]) -> None:
    for kind, found in figures.items():
        assert found["mb_per_s_in_4_kb"] >= FLOOR_MB_S, (kind, found)
        assert min(found["token_feeds_per_s"], found["flagged_token_feeds_per_s"]) >= FLOOR_FEEDS_S, (kind, found)
        assert found["time_of_twice_the_length"] < 3, (kind, found)


def main(quick: bool) -> dict[str, Any]:
    n_chars, repeats = (500_000, 3) if quick else (2_000_000, 4)
    figures: dict[str, Any] = {kind: measure(kind, n_chars, repeats) for kind in ("prose", "string argument", "json argument")}
    if not quick:
        assert_fast(figures)
    for kind in ("string argument", "json argument"):
        ten_megabytes = in_bytes(output(kind, 10_000_000)[0])
        figures[kind]["peak_kb_of_10_mb"] = peak_bytes(ten_megabytes) / 1e3
        assert figures[kind]["peak_kb_of_10_mb"] < 1000, (kind, figures[kind])
    return figures
