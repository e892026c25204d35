"""JSON checked while it streams: a prefix is let through only once it is known to begin a valid value."""

from __future__ import annotations

import re

MAX_DEPTH = 512
MAX_SCALAR = 4096

_STRING_BODY = r'[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+'
_NUMBER = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_LEAF = rf'(?:"{_STRING_BODY}"|{_NUMBER}|true|false|null)'
_SPACE = r"[ \t\n\r]*+"

_BODY = re.compile(_STRING_BODY)
_SPACES = re.compile(_SPACE)
_RUN = re.compile(r"[-+.0-9A-Za-z]*+")
_SCALAR = re.compile(rf"{_NUMBER}|true|false|null")
_PARTIAL_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")


def _node(inner: str) -> str:
    """A leaf, or an array or object whose members are `inner`."""
    item, member = rf"{_SPACE}{inner}{_SPACE}", rf'{_SPACE}"{_STRING_BODY}"{_SPACE}:{_SPACE}{inner}{_SPACE}'
    return rf"(?:{_LEAF}|\[(?:{item}(?:,{item})*+|{_SPACE})\]|\{{(?:{member}(?:,{member})*+|{_SPACE})\}})"


# Runs of complete members, two levels deep, at the speed of the regex engine; the loop below sees to the rest.
_NODE = _node(_node(_LEAF))
_ITEMS = re.compile(rf"(?:{_SPACE}{_NODE}{_SPACE},)++")
_MEMBERS = re.compile(rf'(?:{_SPACE}"{_STRING_BODY}"{_SPACE}:{_SPACE}{_NODE}{_SPACE},)++')

VALUE, FIRST_ITEM, FIRST_KEY, KEY, COLON, AFTER, DONE = range(7)


class JsonStream:
    """One JSON value in pieces, in time linear in its length. `accepted` counts the characters known to begin valid JSON.

    Once `has_failed`, `accepted` is where the first wrong token begins, whatever pieces the text came in.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.has_failed = False
        self._pending = ""
        self._expected = VALUE
        self._stack: list[str] = []
        self._in_string = False
        self._is_key = False

    def feed(self, text: str) -> str:
        """The further text that is now known to begin valid JSON; never a part of an escape, a number or a literal."""
        if self.has_failed:
            return ""
        if self._in_string and not self._pending and _BODY.fullmatch(text):
            self.accepted += len(text)
            return text
        text = self._pending + text
        end = self._advance(text)
        self._pending = text[end:]
        self.accepted += end
        if len(self._pending) > MAX_SCALAR:
            self.has_failed = True
        return text[:end].rstrip(" \t\n\r") if self.is_complete else text[:end]

    @property
    def is_complete(self) -> bool:
        """Whether the value has ended; white space may follow, which `feed` leaves out."""
        return self._expected == DONE and not self._in_string

    def finish(self) -> str:
        """The rest, if the value is complete; else `has_failed`."""
        rest = self._pending
        if not self.has_failed and rest and not self._stack and self._expected == VALUE and _SCALAR.fullmatch(rest):
            self._pending, self._expected = "", DONE
            self.accepted += len(rest)
            return rest
        self.has_failed = self.has_failed or bool(rest) or not self.is_complete
        return ""

    def _advance(self, text: str) -> int:
        """Where the part of the text ends that can be let through."""
        at, end = 0, len(text)
        while at < end and not self.has_failed:
            if self._in_string:
                at, is_stuck = self._string(text, at)
                if is_stuck:
                    break
                continue
            at = _SPACES.match(text, at).end()  # type: ignore[union-attr]
            if at < end:
                after = self._token(text, at)
                if after < 0:
                    break
                at = after
        return at

    def _string(self, text: str, at: int) -> tuple[int, bool]:
        """Past as much of a string as is there; whether it stops at an escape that is not complete."""
        at = _BODY.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return at, False
        if text[at] == '"':
            self._in_string = False
            self._expected = COLON if self._is_key else self._after()
            return at + 1, False
        if text[at] != "\\" or not _PARTIAL_ESCAPE.fullmatch(text, at):
            self.has_failed = True
        return at, True

    def _token(self, text: str, at: int) -> int:
        """Past the token that begins here; -1 where it's incomplete or wrong."""
        char, expected = text[at], self._expected
        if expected == AFTER:
            return self._close_or_comma(text, at)
        if expected == COLON and char == ":":
            self._expected = VALUE
            return at + 1
        if expected in (FIRST_KEY, KEY):
            return self._key(char, at)
        if expected in (VALUE, FIRST_ITEM):
            return self._value(text, at)
        return self._fail()

    def _key(self, char: str, at: int) -> int:
        if char == '"':
            self._in_string = self._is_key = True
            return at + 1
        return self._pop(at) if char == "}" and self._expected == FIRST_KEY else self._fail()

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._in_string, self._is_key = True, False
            return at + 1
        if char in "{[":
            if len(self._stack) >= MAX_DEPTH:
                return self._fail()
            self._stack.append(char)
            self._expected = FIRST_KEY if char == "{" else FIRST_ITEM
            return self._leaves(text, at + 1)
        if char == "]" and self._expected == FIRST_ITEM:
            return self._pop(at)
        return self._scalar(text, at)

    def _scalar(self, text: str, at: int) -> int:
        end = _RUN.match(text, at).end()  # type: ignore[union-attr]
        if end == at or end - at > MAX_SCALAR:
            return self._fail()
        if end == len(text):
            return -1
        if not _SCALAR.fullmatch(text, at, end):
            return self._fail()
        self._expected = self._after()
        return end

    def _close_or_comma(self, text: str, at: int) -> int:
        char = text[at]
        is_object = self._stack[-1] == "{"
        if char == ",":
            self._expected = KEY if is_object else VALUE
            return self._leaves(text, at + 1)
        return self._pop(at) if char == ("}" if is_object else "]") else self._fail()

    def _leaves(self, text: str, at: int) -> int:
        """Past all members that are leaves and followed by a comma."""
        is_object = self._stack[-1] == "{"
        match = (_MEMBERS if is_object else _ITEMS).match(text, at)
        if match:
            self._expected = KEY if is_object else VALUE
            return match.end()
        return at

    def _pop(self, at: int) -> int:
        self._stack.pop()
        self._expected = self._after()
        return at + 1

    def _after(self) -> int:
        return AFTER if self._stack else DONE

    def _fail(self) -> int:
        self.has_failed = True
        return -1
