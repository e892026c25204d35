"""Programming tasks out of a grammar: a function of a list of whole numbers as a chain of steps, tests from a reference run.

The reference is composed from the same table as the prose, and the gates run the gold program, which is emitted apart, in the
sandbox: two of the three must be wrong in the same way for a wrong task to pass.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step in words, as a function, and as source over `values`. {k} stands for its number."""

    said: str
    apply: Callable[[list[int], int], list[int]]
    source: str


STEPS: dict[str, Step] = {
    "multiples": Step(
        "keep only the multiples of {k}", lambda v, k: [x for x in v if x % k == 0], "[x for x in values if not x % {k}]"
    ),
    "above": Step(
        "drop everything that is not greater than {k}", lambda v, k: [x for x in v if x > k], "[x for x in values if x > {k}]"
    ),
    "add": Step("add {k} to every element", lambda v, k: [x + k for x in v], "[x + {k} for x in values]"),
    "scale": Step("multiply every element by {k}", lambda v, k: [x * k for x in v], "[x * {k} for x in values]"),
    "remainder": Step(
        "replace every element by its remainder after division by {k} (never negative)",
        lambda v, k: [x % k for x in v],
        "[x % {k} for x in values]",
    ),
    "once": Step(
        "remove repeated elements, keeping the first of each",
        lambda v, k: list(dict.fromkeys(v)),
        "[x for i, x in enumerate(values) if x not in values[:i]]",
    ),
    "reverse": Step("reverse the order", lambda v, k: v[::-1], "list(reversed(values))"),
    "sort": Step("sort in descending order", lambda v, k: sorted(v, reverse=True), "sorted(values)[::-1]"),
    "every": Step(
        "keep the first of every {k} elements", lambda v, k: v[::k], "[x for i, x in enumerate(values) if i % {k} == 0]"
    ),
    "sums": Step(
        "replace every element by the sum of all elements up to and including it",
        lambda v, k: [sum(v[: i + 1]) for i in range(len(v))],
        "__import__('itertools').accumulate(values)",
    ),
    "steps": Step(
        "replace the list by the differences of neighbours, later minus earlier",
        lambda v, k: [b - a for a, b in itertools.pairwise(v)],
        "[values[i] - values[i - 1] for i in range(1, len(values))]",
    ),
    "first": Step("keep at most the first {k} elements", lambda v, k: v[:k], "[x for i, x in enumerate(values) if i < {k}]"),
    "rotate": Step(
        "move the first element to the end, {k} times over (nothing happens to an empty list)",
        lambda v, k: v[k % len(v) :] + v[: k % len(v)] if v else v,
        "[values[(i + {k}) % len(values)] for i in range(len(values))]",
    ),
}
NAME = "transform"


def problem(rng: random.Random, length: int, tests: int = 12) -> tuple[str, str, list[list[Any]], str]:
    """(the question, the gold program, tests [[arguments], result], the skeleton)."""
    names = rng.sample(sorted(STEPS), length)
    numbers = [rng.randrange(2, 8) for _ in names]
    said = "; then ".join(STEPS[name].said.format(k=k) for name, k in zip(names, numbers, strict=True))
    lines = [f"    values = list({STEPS[name].source.format(k=k)})" for name, k in zip(names, numbers, strict=True)]
    gold = f"def {NAME}(values):\n    values = list(values)\n" + "\n".join(lines) + "\n    return values\n"
    inputs = [[], [rng.randrange(-9, 9)]] + [
        [rng.randrange(-30, 60) for _ in range(rng.randrange(4, 16))] for _ in range(tests - 2)
    ]
    cases = []
    for values in inputs:
        result = values
        for name, k in zip(names, numbers, strict=True):
            result = STEPS[name].apply(list(result), k)
        cases.append([[values], result])
    ask = f"Write a Python function `{NAME}(values)` that takes a list of whole numbers and returns a new list: {said}."
    return ask, gold, cases, "/".join(names)
