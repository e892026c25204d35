"""Families of the reasoning-gym library with sizes beyond mental arithmetic, each with the program that solves it.

A program reads the prompt alone: it proves that the tool suffices, and is what an agent could have written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LIBRARY, LICENCE = "reasoning-gym", "Apache-2.0"


@dataclass(frozen=True)
class Puzzle:
    """A data set, its settings, and a body that sets `answer` from `prompt`."""

    settings: dict[str, Any] = field(default_factory=dict)
    body: str = ""


_NUMBERS = "numbers = [int(n) for n in re.findall(r'-?\\d+', prompt)]\n"
_EXPRESSION = "line = prompt.strip().split(':')[-1].replace('=', ' ').replace('Give only the result as your final answer.', '')\n"
PUZZLES: dict[str, Puzzle] = {
    "count_primes": Puzzle(
        {"min_n": 1000, "max_n": 60000},
        _NUMBERS
        + "span = range(max(2, numbers[0]), numbers[1] + 1)\n"
        + "answer = sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in span)",
    ),
    "prime_factorization": Puzzle(
        {"min_value": 100000, "max_value": 100000000},
        "n = int(re.search(r'of (\\d+)\\.', prompt)[1])\nfactors, d = [], 2\nwhile d * d <= n:\n    while n % d == 0:\n"
        "        factors.append(d)\n        n //= d\n    d += 1\nfactors += [n] if n > 1 else []\n"
        "answer = ' × '.join(map(str, factors))",
    ),
    "lcm": Puzzle(
        {"min_numbers": 3, "max_numbers": 5, "min_value": 300, "max_value": 9000}, _NUMBERS + "answer = math.lcm(*numbers)"
    ),
    "chain_sum": Puzzle(
        {"min_terms": 12, "max_terms": 24, "min_digits": 4, "max_digits": 9}, _EXPRESSION + "answer = eval(line)"
    ),
    "products": Puzzle(
        {"min_terms": 2, "max_terms": 3, "min_digits": 5, "max_digits": 9},
        "answer = eval(re.search(r'\\d[\\d *]*\\d', prompt)[0])",
    ),
    "count_bits": Puzzle({"min_n": 10**9, "max_n": 2**62}, _NUMBERS + "answer = bin(numbers[-1]).count('1')"),
    "letter_counting": Puzzle(
        {"min_words": 60, "max_words": 150},
        'letter, text = re.search(r\'letter "(.)" appear in the text: "(.*)"\', prompt, re.S).groups()\n'
        "answer = text.lower().count(letter.lower())",
    ),
    "bitwise_arithmetic": Puzzle(
        {"difficulty": 5}, "value = eval(prompt.strip().split('\\n')[-1])\nanswer = ('-' if value < 0 else '') + hex(abs(value))"
    ),
}
PREAMBLE = "import math, re\nprompt = {prompt!r}\n"
CLOSE = "\nprint('Answer:', answer)"


def program(name: str, question: str) -> str:
    """The cell that solves it."""
    return PREAMBLE.format(prompt=question) + PUZZLES[name].body + CLOSE


def entry(name: str, seed: int, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The library's item: question, answer, metadata, as JSON gives them back. Raises ValueError where JSON can't."""
    import json

    import reasoning_gym

    item = reasoning_gym.create_dataset(name, size=1, seed=seed, **(settings or {}))[0]
    try:
        return json.loads(json.dumps(item, allow_nan=False))
    except TypeError as error:
        raise ValueError(f"{name}: an item that is no JSON: {error}") from None
