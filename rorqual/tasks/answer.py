"""Answers in text: where they stand in a reply, and the checks that need no judge.

A check is data, `{"kind": ..., ...}`, stored with its task; `check_answer` gives its verdict. Kinds:

    exact          value, aliases: equal when case, accents of spacing and outer punctuation are set aside
    number         value: a fraction or decimal; tolerance: relative, 0 by default
    reasoning_gym  dataset, entry: that library's own scorer, confined, full marks only
    constraints    rules: properties of a text (rorqual.tasks.writing)
    calls          entry, tests [[arguments, result], ...]: a Python function is called, confined, its results compared outside
    asserts        entry, source: asserts over `candidate`, which answers from a sandbox of its own
    rubric         criteria: invalid here, since a judge must score it (rorqual.rewards.rubric)
"""

from __future__ import annotations

import ast
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from rorqual.tasks.box import BoxError, ConfinedBox
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

ANSWER_LINE = "End your reply with a line that says `Answer:` and then the answer alone."
_MARK = re.compile(r"^[\s*_#>]*answer[*_]*\s*[:：][*_]*[ \t]*", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
CALL_TIMEOUT_S = 10.0
FULL_MARKS = 0.999
MARKED_LENIENTLY = frozenset({"decimal_arithmetic", "number_sorting", "time_intervals"})
"""Data sets of reasoning-gym that ask for exact numbers and give full marks to near ones: there the numbers must be the same."""


def final_answer(text: str | None) -> str | None:
    """What follows the last `Answer:` at the start of a line; the whole text where there is none; None for nothing."""
    if not text or not text.strip():
        return None
    marks = list(_MARK.finditer(text))
    found = text[marks[-1].end() :] if marks else text
    return found.strip().strip("`").strip() or None


def normal(text: str) -> str:
    """Case, width, runs of spaces and outer punctuation set aside."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" \t\n.,;:!?'\"`*_()[]$")


def as_number(text: str) -> Fraction | None:
    """The one number of a text such as `$1,200.50`, `3/4` or `12 apples`; None where there is none, or several."""
    found = [match.group().replace(",", "").replace(" ", "") for match in _NUMBER.finditer(text)]
    if len(found) != 1 or len(found[0]) > 400:
        return None
    top, _, bottom = found[0].partition("/")
    exponent = top.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > 400:
        return None
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def check_answer(check: Mapping[str, Any], text: str | None, isolation: str = "bwrap") -> Verdict:
    """The verdict on a reply. Never raises for what the reply holds; a checker that broke is an invalid verdict."""
    answer = final_answer(text)
    if answer is None or text is None:
        return failed("no answer")
    if check["kind"] not in CHECKS:
        return invalid(f"there is no check {check['kind']!r}")
    try:
        return CHECKS[check["kind"]](check, text if check["kind"] in WHOLE_TEXT else answer, isolation)
    except BoxError as error:
        return invalid(f"checker: {error.reason}")


def _exact(check: Mapping[str, Any], answer: str, isolation: str) -> Verdict:
    right = {normal(str(value)) for value in (check["value"], *check.get("aliases", ()))}
    return passed() if normal(answer) in right else failed("another answer")


def _number(check: Mapping[str, Any], answer: str, isolation: str) -> Verdict:
    found, right = as_number(answer), Fraction(str(check["value"]))
    if found is None:
        return failed("not one number")
    slack = abs(right) * Fraction(str(check.get("tolerance", 0)))
    return passed() if abs(found - right) <= slack else failed("another number")


def _reasoning_gym(check: Mapping[str, Any], answer: str, isolation: str) -> Verdict:
    reply = scorer(isolation).ask({"dataset": check["dataset"], "entry": check["entry"], "answer": answer}, 30.0)
    if "score" not in reply:
        return invalid(f"scorer: {reply.get('problem', 'no score')}")
    score = min(1.0, max(0.0, float(reply["score"])))
    measures = {"library_score": score}
    if check["dataset"] in MARKED_LENIENTLY and _numbers_in(answer) != _numbers_in(str(check["entry"]["answer"])):
        return failed("other numbers", measures=measures)
    return passed(measures) if score >= FULL_MARKS else failed("another answer", measures=measures)


def _numbers_in(text: str) -> list[Fraction]:
    return [Fraction(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text[:100_000])]


class _Scorer:
    """One confined (or, inline, one imported) scorer for all threads; replaced when it dies."""

    def __init__(self, isolation: str):
        self._isolation, self._lock, self._box = isolation, threading.Lock(), None

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with self._lock:
            if self._isolation == "inline":
                from rorqual.tasks.scorer import score

                return score(request)
            return self._ask_confined(request, timeout_s)

    def _ask_confined(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        from rorqual.sandbox import site_packages

        if self._box is None:
            self._box = ConfinedBox("scorer.py", self._isolation, memory_mb=1024, packages=(site_packages(),))
        try:
            return self._box.ask({"op": "score", **request}, timeout_s)
        except BoxError:
            self._box.close()
            self._box = None
            raise


@cache
def scorer(isolation: str) -> _Scorer:
    return _Scorer(isolation)


def program_of(text: str) -> str:
    """The last fenced block of a reply; the whole text where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _calls(check: Mapping[str, Any], text: str, isolation: str) -> Verdict:
    """Arguments go in, results come out, and they are compared here: a program never sees what is expected."""
    box = _callee(text, check["entry"], isolation)
    if isinstance(box, Verdict):
        return box
    try:
        for number, (arguments, expected) in enumerate(check["tests"]):
            if (problem := _call_problem(box, arguments, expected)) is not None:
                return failed(f"test {number}: {problem}", measures={"tests_passed": float(number)})
        return passed({"tests_passed": float(len(check["tests"]))})
    finally:
        box.close()


def _call_problem(box: ConfinedBox, arguments: list[Any], expected: Any) -> str | None:
    try:
        reply = box.ask({"op": "call", "arguments": repr(tuple(arguments))}, CALL_TIMEOUT_S)
    except BoxError as error:
        return error.reason
    if "value" not in reply:
        return str(reply.get("problem", "no result"))[:200]
    try:
        value = ast.literal_eval(reply["value"])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return "a result that is no plain data"
    return None if _same(value, expected) else "another result"


def _same(found: Any, expected: Any) -> bool:
    """Equal as JSON would say it, with tuples as lists, and true is not 1."""
    try:
        return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
    except (TypeError, ValueError):
        return False


def _callee(text: str, entry: str, isolation: str) -> ConfinedBox | Verdict:
    box = ConfinedBox("callee.py", "bwrap" if isolation == "inline" else isolation)
    try:
        reply = box.ask({"op": "load", "source": program_of(text), "entry": entry}, CALL_TIMEOUT_S)
    except BoxError as error:
        box.close()
        if error.reason == "unavailable":
            raise
        return failed(f"the program did not load: {error.reason}")
    if "problem" in reply:
        box.close()
        return failed(f"the program did not load: {reply['problem']}"[:300])
    return box


def _asserts(check: Mapping[str, Any], text: str, isolation: str) -> Verdict:
    box = _callee(text, check["entry"], isolation)
    if isinstance(box, Verdict):
        return box
    tester = ConfinedBox("callee.py", "bwrap" if isolation == "inline" else isolation)

    def forward(name: str, arguments: Any) -> Any:
        try:
            return box.ask({"op": "call", "arguments": arguments}, CALL_TIMEOUT_S)
        except BoxError as error:
            return {"problem": error.reason}

    try:
        reply = tester.ask({"op": "test", "source": check["source"]}, 6 * CALL_TIMEOUT_S, forward)
    finally:
        box.close()
        tester.close()
    return passed() if reply.get("passed") is True else failed(str(reply.get("problem", "no result"))[:300])


def _constraints(check: Mapping[str, Any], text: str, isolation: str) -> Verdict:
    from rorqual.tasks.writing import broken_rules

    broken = broken_rules(check["rules"], text)
    share = 1 - len(broken) / len(check["rules"])
    return passed({"share": 1.0}) if not broken else failed(*broken, measures={"share": share})


def _rubric(check: Mapping[str, Any], text: str, isolation: str) -> Verdict:
    return invalid("a rubric needs a judge: rorqual.rewards.rubric.judge scores it")


CHECKS: dict[str, Callable[[Mapping[str, Any], str, str], Verdict]] = {
    "exact": _exact,
    "number": _number,
    "reasoning_gym": _reasoning_gym,
    "calls": _calls,
    "asserts": _asserts,
    "constraints": _constraints,
    "rubric": _rubric,
}
WHOLE_TEXT = ("calls", "asserts", "constraints", "rubric")
