"""The tags of a call block: how they are written, and how what follows <｜DSML｜ is read back."""

from __future__ import annotations

import re
from typing import NamedTuple

HEADER_LIMIT = 4096
"""Characters of a tag after which it's no tag."""

_INVOKE = re.compile(r'\s*invoke\s+name\s*=\s*"(?P<name>.*)"\s*(?P<closed>/?)>', re.DOTALL)
_PARAMETER = re.compile(r'\s*parameter\s+name\s*=\s*"(?P<name>.*?)"\s+string\s*=\s*"(?P<string>true|false)"\s*>', re.DOTALL)
_UNTYPED = re.compile(r'\s*parameter\s+name\s*=\s*"(?P<name>[^"]*)"\s*>')
_GROUP = re.compile(r"\s*(function_calls|tool_calls)\s*>")
_BEFORE_END = ('"', "/", "s", " ", "\t", "\n", "\r")
"""What can stand before the ">" of a tag."""
_CLOSING = re.compile(r"\s*(function_calls|tool_calls|invoke|parameter)\s*>")


class Header(NamedTuple):
    """What a tag says. kind: group, invoke, parameter, or stray (no tag of the format)."""

    kind: str
    name: str = ""
    string: bool | None = None
    """The parameter's string attribute; None where it is missing."""
    is_self_closed: bool = False
    is_exact: bool = True
    """Whether it's spelt as the format spells it."""


class Read(NamedTuple):
    header: Header
    length: int


def invoke_header(name: str) -> str:
    return f'invoke name="{name}">'


def parameter_header(name: str, string: bool) -> str:
    return f'parameter name="{name}" string="{"true" if string else "false"}">'


def read_opening(text: str) -> Read | None:
    """The tag that stands at the beginning of what follows <｜DSML｜; None where more text is needed.

    Each ">" is tried in turn: a ">" after an odd number of quotes stands inside a name. So the answer depends on the text
    alone and not on the pieces it came in.
    """
    end, counted, quotes = text.find(">", 0, HEADER_LIMIT), 0, 0
    while end >= 0:
        quotes += text.count('"', counted, end)
        counted = end
        header = _opening(text[: end + 1]) if text[end - 1 : end] in _BEFORE_END else None
        if header or quotes % 2 == 0:
            return Read(header or Header("stray", text[: end + 1]), end + 1)
        end = text.find(">", end + 1, HEADER_LIMIT)
    return Read(Header("stray", text[:HEADER_LIMIT]), HEADER_LIMIT) if len(text) >= HEADER_LIMIT else None


def read_closing(text: str) -> Read | None:
    """The tag after </｜DSML｜, up to its ">"; None where more text is needed."""
    end = text.find(">", 0, HEADER_LIMIT)
    if end < 0:
        return Read(Header("stray", text[:HEADER_LIMIT]), HEADER_LIMIT) if len(text) >= HEADER_LIMIT else None
    candidate = text[: end + 1]
    match = _CLOSING.fullmatch(candidate)
    if not match:
        return Read(Header("stray", candidate), end + 1)
    tag = match.group(1)
    kind = tag if tag in ("invoke", "parameter") else "group"
    return Read(Header(kind, is_exact=candidate in ("function_calls>", "invoke>", "parameter>")), end + 1)


def _opening(text: str) -> Header | None:
    if match := _PARAMETER.fullmatch(text):
        name, string = match["name"], match["string"] == "true"
        return Header("parameter", name, string, is_exact=text == parameter_header(name, string))
    if match := _INVOKE.fullmatch(text):
        return Header("invoke", match["name"], None, bool(match["closed"]), text == invoke_header(match["name"]))
    if match := _UNTYPED.fullmatch(text):
        return Header("parameter", match["name"], None, is_exact=False)
    return Header("group", is_exact=text == "function_calls>") if _GROUP.fullmatch(text) else None


def is_writable_function(name: str) -> bool:
    """Whether a function name survives being written in a tag."""
    return bool(name) and read_opening(invoke_header(name)) == Read(Header("invoke", name), len(invoke_header(name)))


def is_writable_parameter(name: str) -> bool:
    """Whether a parameter name survives being written in a tag."""
    for string in (True, False):
        text = parameter_header(name, string)
        if read_opening(text) != Read(Header("parameter", name, string), len(text)):
            return False
    return True
