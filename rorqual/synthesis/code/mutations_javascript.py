"""Procedural faults in JavaScript: one operator, keyword or number of a function's text, found by a scanner that skips the rest.

There is no parser here: whether a change compiles and matters, only execution says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|`(?:\\.|[^`\\])*`|=>|\+\+|--)
    |(?P<operator>===|!==|==|!=|<=|>=|&&|\|\||\+=|-=|(?<=\s)[<>+\-*](?=\s))
    |(?P<number>(?<![\w.$])\d+(?![\w.$]))
    |(?P<word>\b(?:true|false|break|continue)\b)
    |(?P<result>\breturn\ [^;\n{]+;)
    |(?P<function>\bfunction\b\s*\*?\s*(?P<named>[\w$]+)|^\s*(?:async\s+|static\s+)*(?P<method>[\w$]+)\s*\([^()]*\)\s*\{)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
SWAPS = {"===": "!==", "!==": "===", "==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "&&": "||", "||": "&&",
         "+=": "-=", "-=": "+=", "+": "-", "-": "+", "*": "+", "true": "false", "false": "true", "break": "continue",
         "continue": "break"}  # fmt: skip
_WORDS = {"if", "for", "while", "switch", "catch", "function", "return"}


@dataclass(frozen=True)
class TextMutation:
    """See rorqual.synthesis.code.mutations.Mutation; `span` counts characters."""

    path: str
    function: str
    line: int
    kind: str
    span: tuple[int, int]
    replacement: str

    def apply(self, source: str) -> str | None:
        return source[: self.span[0]] + self.replacement + source[self.span[1] :]


def mutations(path: str, source: str) -> Iterator[TextMutation]:
    """All single changes, each with the name and line of the function that begins nearest before it."""
    function, line = "", 1
    for match in _TOKEN.finditer(source):
        kind = next(name for name in ("function", "skip", "operator", "number", "word", "result") if match.group(name))
        if kind == "function":
            name = match.group("named") or match.group("method")
            if name not in _WORDS:
                function, line = name, source.count("\n", 0, match.start()) + 1
        elif function and (change := _change(kind, match)):
            yield TextMutation(path, function, line, kind, match.span(), change)


def _change(kind: str, match: re.Match[str]) -> str:
    text = match.group()
    if kind in ("operator", "word"):
        return SWAPS[text]
    if kind == "number":
        return str(int(text) + 1)
    return "return undefined;" if kind == "result" else ""
