"""A small formal system in which a program can check a proof exactly: equations between sums and products, by rewriting.

    problem      (a+0)*b = b*a
    solution     (a+0)*b
                 = a*b [zero]
                 = b*a [comm]

Each line after the first names the rule that turns the line above into it, applied once, anywhere, in either direction. So the
three scores have an exact meaning: 1, every step is what it says; 0.5, every step is true, but one names another rule or skips
a line; 0, a step is false or leaps, a line is unreadable, or the ends are not those of the problem.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from typing import Any

Expression = Any
"""A letter (str), a whole number (int), or (operator, left, right) with + or *."""


class SyntaxProblem(ValueError):
    """A text that is no expression."""


# --- expressions

_TOKEN = re.compile(r"\s*(\d{1,6}|[a-z]|[+*()])")
MAX_LETTERS, MAX_LINES = 24, 100
"""Of an expression (letters and numbers) and of a solution: what is larger is unreadable, so that a check is always quick."""


def parse(text: str) -> Expression:
    """`a*(b+1)`; * binds tighter, both associate to the left. Raises SyntaxProblem."""
    tokens, at = [], 0
    text = text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise SyntaxProblem(f"unreadable at {text[at : at + 8]!r}")
        tokens.append(found[1])
        at = found.end()
    if sum(token.isalnum() for token in tokens) > MAX_LETTERS or tokens.count("(") > MAX_LETTERS:
        raise SyntaxProblem(f"more than {MAX_LETTERS} letters and numbers, or brackets")
    expression, rest = _sum(tokens)
    if rest:
        raise SyntaxProblem(f"unexpected {rest[0]!r}")
    return expression


def _sum(tokens: list[str]) -> tuple[Expression, list[str]]:
    return _chain("+", _product, tokens)


def _product(tokens: list[str]) -> tuple[Expression, list[str]]:
    return _chain("*", _atom, tokens)


def _chain(operator: str, part: Any, tokens: list[str]) -> tuple[Expression, list[str]]:
    left, rest = part(tokens)
    while rest and rest[0] == operator:
        right, rest = part(rest[1:])
        left = (operator, left, right)
    return left, rest


def _atom(tokens: list[str]) -> tuple[Expression, list[str]]:
    if not tokens:
        raise SyntaxProblem("ends too early")
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        inner, rest = _sum(rest)
        if not rest or rest[0] != ")":
            raise SyntaxProblem("a bracket is open")
        return inner, rest[1:]
    if first.isdigit():
        return int(first), rest
    if first.isalpha():
        return first, rest
    raise SyntaxProblem(f"unexpected {first!r}")


def render(expression: Expression) -> str:
    """The text with no bracket more than needed; `parse` of it gives the expression back."""
    if not isinstance(expression, tuple):
        return str(expression)
    operator, left, right = expression
    low = operator == "*"
    shown_left = _bracketed(left, low and _is(left, "+"))
    return f"{shown_left}{operator}{_bracketed(right, isinstance(right, tuple) and (low or right[0] == '+'))}"


def _bracketed(expression: Expression, needed: bool) -> str:
    return f"({render(expression)})" if needed else render(expression)


def _is(expression: Expression, operator: str) -> bool:
    return isinstance(expression, tuple) and expression[0] == operator


@lru_cache(maxsize=4096)
def polynomial(expression: Expression) -> frozenset[tuple[tuple[str, ...], int]]:
    """The normal form: two expressions are equal for all numbers exactly where theirs are."""
    if isinstance(expression, int):
        return frozenset({((), expression)} if expression else ())
    if isinstance(expression, str):
        return frozenset({((expression,), 1)})
    operator, left, right = expression
    terms: Counter[tuple[str, ...]] = Counter()
    if operator == "+":
        for monomial, factor in (*polynomial(left), *polynomial(right)):
            terms[monomial] += factor
    else:
        for first, a in polynomial(left):
            for second, b in polynomial(right):
                terms[tuple(sorted((*first, *second)))] += a * b
    return frozenset((monomial, factor) for monomial, factor in terms.items() if factor)


# --- rules


def _comm(e: Expression) -> Iterator[Expression]:
    yield (e[0], e[2], e[1])


def _assoc(e: Expression) -> Iterator[Expression]:
    operator, left, right = e
    if _is(left, operator):
        yield (operator, left[1], (operator, left[2], right))
    if _is(right, operator):
        yield (operator, (operator, left, right[1]), right[2])


def _zero(e: Expression) -> Iterator[Expression]:
    if e[0] == "+":
        yield from (other for unit, other in ((e[1], e[2]), (e[2], e[1])) if unit == 0)


def _one(e: Expression) -> Iterator[Expression]:
    if e[0] == "*":
        yield from (other for unit, other in ((e[1], e[2]), (e[2], e[1])) if unit == 1)


def _null(e: Expression) -> Iterator[Expression]:
    if e[0] == "*" and 0 in (e[1], e[2]):
        yield 0


def _dist(e: Expression) -> Iterator[Expression]:
    operator, left, right = e
    if operator == "*" and _is(right, "+"):
        yield ("+", ("*", left, right[1]), ("*", left, right[2]))
    if operator == "*" and _is(left, "+"):
        yield ("+", ("*", left[1], right), ("*", left[2], right))
    if operator == "+" and _is(left, "*") and _is(right, "*"):
        if left[1] == right[1]:
            yield ("*", left[1], ("+", left[2], right[2]))
        if left[2] == right[2]:
            yield ("*", ("+", left[1], right[1]), left[2])


def _calc(e: Expression) -> Iterator[Expression]:
    if isinstance(e[1], int) and isinstance(e[2], int):
        yield e[1] + e[2] if e[0] == "+" else e[1] * e[2]


RULES = {"comm": _comm, "assoc": _assoc, "zero": _zero, "one": _one, "null": _null, "dist": _dist, "calc": _calc}


def rewrites(expression: Expression, rule: str) -> set[Expression]:
    """What one application of the rule, at any place, makes of an expression."""
    if not isinstance(expression, tuple):
        return set()
    operator, left, right = expression
    found = set(RULES[rule](expression))
    found |= {(operator, new, right) for new in rewrites(left, rule)}
    return found | {(operator, left, new) for new in rewrites(right, rule)}


def neighbours(expression: Expression) -> set[Expression]:
    return {new for rule in RULES for new in rewrites(expression, rule)}


def is_step(before: Expression, after: Expression, rule: str) -> bool:
    """One application of the rule leads from one to the other, in either direction."""
    return rule in RULES and (after in rewrites(before, rule) or before in rewrites(after, rule))


def _is_any_step(before: Expression, after: Expression) -> bool:
    return any(is_step(before, after, rule) for rule in RULES)


def _is_two_steps(before: Expression, after: Expression) -> bool:
    """A line that stands in between was left out."""
    return any(_is_any_step(middle, after) for middle in neighbours(before)) or any(
        _is_any_step(middle, before) for middle in neighbours(after)
    )


# --- checking


class Flaw(StrEnum):
    """What can be wrong with a line."""

    UNREADABLE = "unreadable"
    START = "start"  # the first line is not the problem's left side
    FALSE = "false"  # the two sides differ for some numbers
    LEAP = "leap"  # true, but more than one line is left out
    END = "end"  # the last line is not the problem's right side
    GAP = "gap"  # true, but one line is left out
    RULE = "rule"  # one application, of another rule than the one named


FATAL = {Flaw.UNREADABLE, Flaw.START, Flaw.FALSE, Flaw.LEAP, Flaw.END}


@dataclass(frozen=True, order=True)
class Finding:
    """A flaw and the line it stands in, from 1 (the first line)."""

    line: int
    flaw: Flaw

    def __str__(self) -> str:
        return f"Line {self.line}: {self.flaw}"


def score_of(findings: Sequence[Finding]) -> float:
    """0 with a fatal flaw, 0.5 with a minor one, 1 with none."""
    if any(finding.flaw in FATAL for finding in findings):
        return 0.0
    return 0.5 if findings else 1.0


def sides(problem: str) -> tuple[Expression, Expression]:
    """Left and right of `L = R`. Raises SyntaxProblem."""
    left, equals, right = problem.partition("=")
    if not equals:
        raise SyntaxProblem("a problem is an equation")
    return parse(left), parse(right)


def check(problem: str, solution: str) -> tuple[Finding, ...]:
    """Every flaw of a solution, in order; none for a proof."""
    left, right = sides(problem)
    lines = [line.strip() for line in solution.strip().splitlines() if line.strip()]
    read = [_line(line, is_first=number == 0) if number < MAX_LINES else None for number, line in enumerate(lines)]
    findings = [Finding(number, Flaw.UNREADABLE) for number, each in enumerate(read, 1) if each is None]
    known = [(number, *each) for number, each in enumerate(read, 1) if each is not None]
    if not known:
        return tuple(findings) or (Finding(1, Flaw.UNREADABLE),)
    if read[0] is not None and read[0][0] != left:
        findings.append(Finding(1, Flaw.START))
    for (_, before, _), (number, after, rule) in pairwise(known):
        flaw = _flaw(before, after, rule)
        findings += [Finding(number, flaw)] if flaw else []
    if known[-1][1] != right:
        findings.append(Finding(known[-1][0], Flaw.END))
    return tuple(sorted(set(findings)))


_LINE = re.compile(r"=\s*(.+?)\s*\[(\w+)\]")


def _line(text: str, is_first: bool) -> tuple[Expression, str] | None:
    if len(text) > 400:
        return None
    found = None if is_first else _LINE.fullmatch(text)
    try:
        if is_first:
            return parse(text), ""
        return (parse(found[1]), found[2]) if found else None
    except SyntaxProblem:
        return None


def _flaw(before: Expression, after: Expression, rule: str) -> Flaw | None:
    if is_step(before, after, rule):
        return None
    if polynomial(before) != polynomial(after):
        return Flaw.FALSE
    if _is_any_step(before, after):
        return Flaw.RULE
    return Flaw.GAP if _is_two_steps(before, after) else Flaw.LEAP


_FINDING = re.compile(rf"^Line (\d{{1,6}}): ({'|'.join(Flaw)})$", re.MULTILINE)
NO_FLAW = "No flaw."


def write_findings(findings: Sequence[Finding]) -> str:
    """An analysis that says these flaws and nothing else."""
    return "\n".join(map(str, findings)) or NO_FLAW


def read_findings(analysis: str) -> tuple[Finding, ...]:
    """The flaws that an analysis names; other text is praise or prose, and not judged."""
    return tuple(Finding(int(line), Flaw(flaw)) for line, flaw in _FINDING.findall(analysis))


# --- making


@dataclass(frozen=True)
class Derivation:
    """A proof as lines: each expression, with the rule that led to it (empty for the first)."""

    lines: tuple[tuple[Expression, str], ...]

    @property
    def problem(self) -> str:
        return f"{render(self.lines[0][0])} = {render(self.lines[-1][0])}"

    @property
    def solution(self) -> str:
        first, *rest = self.lines
        return "\n".join([render(first[0]), *(f"= {render(expression)} [{rule}]" for expression, rule in rest)])


def random_expression(rng: random.Random, size: int, letters: str = "abc") -> Expression:
    """`size` letters and small numbers, joined at random."""
    if size == 1:
        return rng.choice(letters) if rng.random() < 0.6 else rng.choice((0, 1, 1, 2, 3))
    left = rng.randrange(1, size)
    return (rng.choice("+*"), random_expression(rng, left, letters), random_expression(rng, size - left, letters))


def derive(rng: random.Random, size: int, steps: int) -> Derivation | None:
    """A derivation of so many steps from a random expression, never through one line twice; None where it gets stuck."""
    lines: list[tuple[Expression, str]] = [(random_expression(rng, size), "")]
    seen = {lines[0][0]}
    for _ in range(steps):
        here = lines[-1][0]
        options = sorted((rule, repr(new), new) for rule in RULES for new in rewrites(here, rule) if new not in seen)
        if not options:
            return None
        rule = rng.choice(sorted({option[0] for option in options}))
        new = rng.choice([option[2] for option in options if option[0] == rule])
        lines.append((new, rule))
        seen.add(new)
    return Derivation(tuple(lines))


def plant(derivation: Derivation, flaw: Flaw, rng: random.Random) -> str | None:
    """A solution of the same problem with this flaw in it, found by the checker; None where the derivation has no room."""
    lines = list(derivation.lines)
    places = list(range(1, len(lines)))
    rng.shuffle(places)
    for place in places:
        spoilt = _spoilt(lines, place, flaw, rng)
        solution = Derivation(tuple(spoilt)).solution if spoilt else ""
        if solution and flaw in {finding.flaw for finding in check(derivation.problem, solution)}:
            return solution
    return None


def _spoilt(
    lines: Sequence[tuple[Expression, str]], place: int, flaw: Flaw, rng: random.Random
) -> list[tuple[Expression, str]] | None:
    expression, rule = lines[place]
    last = len(lines) - 1
    match flaw:
        case Flaw.FALSE:
            return [*lines[:place], (_altered(expression, rng), rule), *lines[place + 1 :]] if place < last else None
        case Flaw.RULE:
            return [*lines[:place], (expression, rng.choice([r for r in RULES if r != rule])), *lines[place + 1 :]]
        case Flaw.GAP | Flaw.LEAP:
            count = 1 if flaw is Flaw.GAP else rng.randrange(2, 4)
            return [*lines[:place], *lines[place + count :]] if place + count <= last else None
        case Flaw.END:
            return list(lines[:-1]) if last > 1 else None
    return None


def _altered(expression: Expression, rng: random.Random) -> Expression:
    """The expression with one letter or number changed."""
    if not isinstance(expression, tuple):
        return rng.choice([atom for atom in ("a", "b", "c", 2, 3, 5) if atom != expression])
    operator, left, right = expression
    if rng.random() < 0.5:
        return (operator, _altered(left, rng), right)
    return (operator, left, _altered(right, rng))
