"""Policies without tool and reasoning: each turns a prompt into one answer. A task that one of them solves is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from rorqual.tasks import GateResult
from rorqual.tasks.answer import check_answer

CONSTANTS = ("0", "1", "2", "-1", "10", "yes", "no", "true", "false", "A", "none", "[]")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")


def _numbers(prompt: str) -> list[Fraction]:
    return [Fraction(text) for text in _NUMBER.findall(prompt)][:200]


def _text(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else str(float(value))


ARITHMETIC: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "first": lambda n: n[0],
    "last": lambda n: n[-1],
    "largest": lambda n: max(n),
    "smallest": lambda n: min(n),
    "count": lambda n: Fraction(len(n)),
    "sum": lambda n: sum(n, Fraction()),
    "product": lambda n: math.prod(n[:4], start=Fraction(1)),
    "mean": lambda n: sum(n, Fraction()) / len(n),
    "range": lambda n: max(n) - min(n),
    "first_two_added": lambda n: n[0] + n[1],
    "first_two_subtracted": lambda n: n[0] - n[1],
    "first_two_multiplied": lambda n: n[0] * n[1],
    "first_two_divided": lambda n: n[0] / n[1],
    "last_two_added": lambda n: n[-2] + n[-1],
    "last_two_multiplied": lambda n: n[-2] * n[-1],
    "last_two_divided": lambda n: n[-2] / n[-1],
}


def guesses(prompt: str, arithmetic: bool = True) -> dict[str, str]:
    """policy -> its answer. arithmetic: with those that combine the prompt's numbers in one step."""
    found = {f"says {value}": value for value in CONSTANTS} | {"echo": prompt}
    numbers = _numbers(prompt)
    for name, rule in ARITHMETIC.items() if arithmetic else ():
        try:
            found[name] = _text(rule(numbers))
        except (IndexError, ValueError, ZeroDivisionError, OverflowError):
            continue
    return found


def guess_gate(name: str, prompt: str, check: Mapping[str, Any], isolation: str, arithmetic: bool = True) -> GateResult:
    """No guess passes the check."""
    made = guesses(prompt, arithmetic)
    for policy, answer in made.items():
        verdict = check_answer(check, f"Answer: {answer}", isolation)
        if verdict.passed:
            return GateResult(name, False, f"the policy {policy!r} passes")
    return GateResult(name, True, "", {"policies": float(len(made))})


def wrong_gate(answer: str, check: Mapping[str, Any], isolation: str) -> GateResult:
    """Answers near the gold one fail: the checker tells them apart."""
    near = [f"{answer}7", f"{answer} {answer}"]
    passing = [text for text in near if check_answer(check, f"Answer: {text}", isolation).passed]
    return GateResult("near_answers_fail", not passing, ", ".join(passing)[:200])
