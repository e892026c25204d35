"""The strict reading of a model's output: the exact inverse of the encoder, and plain text for all that isn't."""

from __future__ import annotations

import json

from rorqual.chat.deltas import ARGUMENTS, CONTENT, END_CALL, REASONING, TOOL_CALL, Delta, NewId, Repair
from rorqual.chat.grammar import read_opening
from rorqual.chat.markers import CLOSE, END_THINK, EOS, OPEN, unescape_markers
from rorqual.chat.schema import ALL_TYPES, Schemas, is_json, typed

Events = list[tuple[str, str]]
"""A block as written: each tag's marker (OPEN or CLOSE) with the text up to the next tag."""

ReadCall = tuple[str, dict[str, tuple[bool, str]]]
"""A function's name, and its parameters: name -> (string attribute, text)."""

BLOCK_START = "function_calls>\n"
BLOCK_GAP = "\n\n"


class StrictMachine:
    """Reasoning and content stream; a call block is kept until the end of the message, then read as a whole.

    One malformed member, or text after the block, makes the whole block plain content: no call is ever invented. Markers out
    of place are plain text too. So memory holds a block, and calls come with the end of the message.
    """

    def __init__(self, out: list[Delta], thinking: bool, schemas: Schemas | None, new_id: NewId, drops_unknown: bool):
        self.out = out
        self.direct = REASONING if thinking else CONTENT
        self.index = -1
        self.repairs: list[Repair] = []
        self.is_done = False
        self._state = self.direct
        self._newlines = ""
        self._marks: list[str] = []
        self._texts: list[list[str]] = []
        self._schemas = schemas
        self._new_id = new_id
        self._drops_unknown = drops_unknown

    def text(self, text: str) -> None:
        if self.is_done:
            self._after_end(text)
        elif self._state == REASONING:
            self.out.append(Delta(REASONING, text))
        elif self._marks:
            self._texts[-1].append(text)
            self._require_block_start()
        else:
            self._content(text)

    def json_text(self, text: str) -> None:
        """Never called: no arguments flow before the end."""
        raise NotImplementedError

    def mark(self, marker: str, cuts_marker: bool = False) -> None:
        if self.is_done:
            self._after_end(marker)
        elif marker == EOS:
            self.finish()
        elif self._state == REASONING and marker == END_THINK:
            self._state = self.direct = CONTENT
        elif marker in (OPEN, CLOSE) and self._marks:
            self._add(marker)
        elif marker == OPEN and self._newlines == BLOCK_GAP:
            self.direct = ""
            self._add(marker)
        else:
            self.text(marker)

    def finish(self) -> None:
        """The message has ended."""
        if self.is_done:
            return
        if self._marks:
            events = list(zip(self._marks, map("".join, self._texts), strict=True))
            calls = read_block(events)
            if calls is None or self._has_unknown(calls):
                self.repairs.append(Repair("malformed_block", _source(events)[:200]))
                self._give_back()
            else:
                self._newlines = ""
                self._emit(calls)
        self._content("")
        if self._newlines:
            self.out.append(Delta(CONTENT, self._newlines))
        self.is_done, self.direct = True, ""

    def _add(self, marker: str) -> None:
        self._marks.append(marker)
        self._texts.append([])
        if len(self._marks) == 2 and "".join(self._texts[0]) != BLOCK_START:
            self._give_back()

    def _require_block_start(self) -> None:
        """A tag other than function_calls opens no block: give it back at once."""
        if len(self._marks) == 1:
            start = "".join(self._texts[0])
            if not BLOCK_START.startswith(start):
                self._give_back()

    def _give_back(self) -> None:
        texts = [marker + "".join(text) for marker, text in zip(self._marks, self._texts, strict=True)]
        self._marks, self._texts = [], []
        self._content("".join(texts))

    def _content(self, text: str) -> None:
        """Content, but for the last two line ends, which may belong to a block."""
        text = self._newlines + text
        kept = text.rstrip("\n")
        kept = text[: max(len(kept), len(text) - len(BLOCK_GAP))]
        self._newlines = text[len(kept) :]
        self.direct = "" if self._newlines else CONTENT
        if kept:
            self.out.append(Delta(CONTENT, kept))

    def _has_unknown(self, calls: list[ReadCall]) -> bool:
        return self._drops_unknown and self._schemas is not None and any(name not in self._schemas for name, _ in calls)

    def _emit(self, calls: list[ReadCall]) -> None:
        for name, parameters in calls:
            self.index += 1
            self.out.append(Delta(TOOL_CALL, name, self.index, self._new_id()))
            members = [f"{json.dumps(k, ensure_ascii=False)}: {self._value(name, k, *found)}" for k, found in parameters.items()]
            self.out.append(Delta(ARGUMENTS, "{" + ", ".join(members) + "}", self.index))
            self.out.append(Delta(END_CALL, "", self.index))

    def _value(self, tool: str, name: str, string: bool, text: str) -> str:
        types = self._schemas.types(tool, name) if self._schemas else ALL_TYPES
        found, is_overruled = typed(text, types, string)
        if is_overruled:
            self.repairs.append(Repair("type", text[:200]))
        return found if string else unescape_markers(found)

    def _after_end(self, text: str) -> None:
        if not self.repairs or self.repairs[-1].kind != "after_end":
            self.repairs.append(Repair("after_end", ""))
        said = self.repairs[-1].text
        self.repairs[-1] = Repair("after_end", said + text[: 200 - len(said)])


def read_block(events: Events) -> list[ReadCall] | None:
    """The calls of a well-formed block; None where anything is amiss."""
    if events[0] != (OPEN, BLOCK_START) or events[-1] != (CLOSE, "function_calls>"):
        return None
    calls, at = [], 1
    while at < len(events) - 1:
        read = _read_invoke(events, at)
        if read is None:
            return None
        call, at = read
        calls.append(call)
    return calls or None


def _read_invoke(events: Events, at: int) -> tuple[ReadCall, int] | None:
    marker, text = events[at]
    tag = read_opening(text) if marker == OPEN else None
    if tag is None or tag.header.kind != "invoke" or not tag.header.is_exact or not tag.header.name:
        return None
    name, rest = tag.header.name, text[tag.length :]
    parameters: dict[str, tuple[bool, str]] = {}
    at += 1
    while events[at][0] == OPEN:
        found = _read_parameter(events, at)
        if found is None or found[0] in parameters:
            return None
        parameters[found[0]] = found[1:]
        at += 2
    is_spaced = rest == "\n" or (rest == "\n\n" and not parameters)
    return ((name, parameters), at + 1) if is_spaced and events[at] == (CLOSE, "invoke>\n") else None


def _read_parameter(events: Events, at: int) -> tuple[str, bool, str] | None:
    tag = read_opening(events[at][1])
    if tag is None or tag.header.kind != "parameter" or not tag.header.is_exact or events[at + 1] != (CLOSE, "parameter>\n"):
        return None
    text = events[at][1][tag.length :]
    string = bool(tag.header.string)
    return (tag.header.name, string, text) if string or is_json(text) else None


def _source(events: Events) -> str:
    return "".join(marker + text for marker, text in events)
