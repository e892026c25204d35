"""100,000 random and mutated outputs are read without an exception or a hang, whole and in pieces, strictly and tolerantly.

Outputs are well-formed ones with pieces deleted, doubled, moved, cut off, spliced with others or with markers put anywhere,
and strings of markers and random text. For each, both readings of a random split equal those of the whole text; no tolerant
content holds a marker; every call that is returned holds a JSON object; a strict call stands in the text.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from rorqual.chat import encode, no_id, parse_with_repairs
from rorqual.chat.markers import CLOSE, OPEN, RESERVED, STRUCTURE

SECONDS = 150
QUICK_SECONDS = 10
COUNT, QUICK_COUNT = 100_000, 4_000

WORDS = [
    "hm ",
    "so\n\n",
    "<",
    "</",
    "｜",
    "｜DSM",
    "<th",
    '"',
    "\\",
    "\\u00e9",
    "{",
    "[1, 2]",
    "null",
    "é",
    "🐋",
    "\x00",
    ">",
    "/>\n",
    " \n",
]
TAGS = [f"\n\n{OPEN}function_calls>\n", f"{CLOSE}function_calls>", f'{OPEN}invoke name="f">\n', f"{CLOSE}invoke>\n"]
TAGS += [f'{OPEN}parameter name="a" string="true">', f'{OPEN}parameter name="b" string="false">', f"{CLOSE}parameter>\n"]
TAGS += [f"{OPEN}parameter name='a'>", f"{OPEN}nonsense>", f'{OPEN}invoke name="g"/>']
PARTS = [*WORDS, *TAGS, *STRUCTURE, *RESERVED]
QUESTION = [{"role": "user", "content": "Q"}]


def value(choose: random.Random, depth: int = 0) -> Any:
    kind = choose.randrange(7 if depth < 2 else 5)
    if kind == 5:
        return [value(choose, depth + 1) for _ in range(choose.randrange(4))]
    if kind == 6:
        return {choose.choice("abc"): value(choose, depth + 1) for _ in range(choose.randrange(4))}
    return ["".join(choose.choices(PARTS, k=choose.randrange(5))), choose.randrange(-9, 10**12), choose.random(), None, True][
        kind
    ]


def well_formed(choose: random.Random) -> str:
    """An output as the format writes it."""
    calls = [
        {"function": {"name": choose.choice(["f", "g"]), "arguments": {choose.choice("abcd"): value(choose) for _ in range(2)}}}
        for _ in range(choose.randrange(3))
    ]
    said = {"role": "assistant", "content": "".join(choose.choices(WORDS, k=3)), "reasoning_content": "why", "tool_calls": calls}
    return encode([said], context=QUESTION)


def mutated(choose: random.Random, text: str, other: str) -> str:
    for _ in range(choose.randrange(4)):
        a, b = sorted((choose.randrange(len(text) + 1), choose.randrange(len(text) + 1)))
        b = min(b, a + choose.choice([1, 5, 30, 300]))
        text = choose.choice(
            [
                text[:a] + text[b:],
                text[:b] + text[a:],
                text[:a] + choose.choice(PARTS) + text[a:],
                text[:a] + choose.choice(PARTS) + text[b:],
                text[:a],
                text[:a] + other[a:],
                text[:a] + chr(choose.choice([0, 34, 60, 62, 92, 0xFF5C, 0x1F40B])) + text[a + 1 :],
            ]
        )
    return text


def outputs(seed: int, count: int) -> Any:
    choose = random.Random(seed)
    last = well_formed(choose)
    for n in range(count):
        if n % 5 == 4:
            yield "".join(choose.choices(PARTS, k=choose.randrange(30)))
            continue
        text = well_formed(choose)
        yield mutated(choose, text, last)
        last = text


def check(text: str, choose: random.Random) -> None:
    """Raise AssertionError, with the text, where a reading is not what it must be."""
    thinking = choose.random() < 0.7
    places = sorted(choose.randrange(len(text) + 1) for _ in range(choose.randrange(8)))
    pieces = [(text[a:b], None) for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    for mode in ("tolerant", "strict"):
        message, repairs = parse_with_repairs([(text, None)], thinking, mode, new_id=no_id)  # type: ignore[arg-type]
        again = parse_with_repairs(pieces, thinking, mode, new_id=no_id)  # type: ignore[arg-type]
        assert again == (message, repairs), (mode, text, places)
        for call in message.get("tool_calls", []):
            assert isinstance(json.loads(call["function"]["arguments"]), dict), (mode, text)
            assert mode == "tolerant" or f'{OPEN}invoke name="{call["function"]["name"]}">\n' in text, text
        if mode == "tolerant":
            said = (message["content"] or "") + "\x01" + message.get("reasoning_content", "")
            assert not any(marker in said for marker in STRUCTURE), (text, said)


def main(quick: bool) -> dict[str, Any]:
    count = QUICK_COUNT if quick else COUNT
    choose = random.Random(1)
    slowest, n_chars, began = 0.0, 0, time.perf_counter()
    for text in outputs(2, count):
        start = time.process_time()
        check(text, choose)
        slowest = max(slowest, time.process_time() - start)
        n_chars += len(text)
    assert slowest < 5, f"an output took {slowest} s"
    return {"outputs": count, "characters": n_chars, "slowest_s": slowest, "seconds": time.perf_counter() - began}
