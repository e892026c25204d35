"""The tolerant reading of a model's output: it streams, it mends what is malformed, and it reports each repair.

A state machine over runs of text and single markers. What is given out is never taken back: a call whose arguments turn
out to be no JSON, or that is cut off, is abandoned, so that no half of a call can ever be run.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring

from rorqual.chat.deltas import ABANDONED, ARGUMENTS, CONTENT, END_CALL, REASONING, TOOL_CALL, Delta, NewId, Repair
from rorqual.chat.grammar import Header, read_closing, read_opening
from rorqual.chat.json_stream import JsonStream
from rorqual.chat.markers import ASSISTANT, BOS, CLOSE, END_THINK, EOS, LONGEST, OPEN, THINK, USER, unescape_markers
from rorqual.chat.schema import ALL_TYPES, Schemas, typed

HEAD = LONGEST
"""Characters of JSON that are looked at before any is given out: text that fails within them becomes a string."""
HOLD_LIMIT = 1 << 20
"""Characters of a value that is kept whole for its type; a longer one is a string."""
JSON_SPACE = " \t\n\r"
MAX_REPAIRS = 1000
SHOWN = 200

BLOCK, INVOKE, STRING, JSON, HELD, BODY = "block", "invoke", "string", "json", "held", "body"
VALUES = (STRING, JSON, HELD)


class TolerantMachine:
    """`direct` names the kind of delta that plain text becomes in this state as it stands; "" where it must be looked at."""

    def __init__(self, out: list[Delta], thinking: bool, schemas: Schemas | None, new_id: NewId, drops_unknown: bool):
        self.out = out
        self.direct = REASONING if thinking else CONTENT
        self.index = -1
        self.repairs: list[Repair] = []
        self.is_done = False
        self._state = self.direct
        self._schemas = schemas
        self._new_id = new_id
        self._drops_unknown = drops_unknown
        self._tag: str | None = None  # what came after OPEN or CLOSE, until its ">"
        self._is_closing = False
        self._cuts_marker = False
        self._seams: set[str] = set()  # reasoning or content, where it was left with the beginning of a marker
        self._newlines = ""  # line ends that may belong to the structure that follows
        self._junk = ""
        self._is_bare = False  # a call without function_calls around it
        self._is_after_block = False
        self._is_muted = False  # inside a call, or a parameter, that is dropped
        self._start_call("")

    # Entry points: a run of text, one marker, the end.

    def text(self, text: str) -> None:
        if self.is_done:
            self._report("after_end", text)
        elif self._tag is not None:
            self._read_tag(text)
        elif self._state in (REASONING, CONTENT):
            self._prose(text)
        elif self._state == STRING:
            self._string(text)
        elif self._state == JSON:
            self._json(text)
        elif self._state == HELD:
            self._held_text(text)
        else:
            self._between_tags(text)

    def mark(self, marker: str, cuts_marker: bool = False) -> None:
        """One marker. cuts_marker: the text before it ends with the beginning of another one.

        Where text then goes on in the same place, a space keeps the two sides from making a marker.
        """
        if self.is_done:
            self._report("after_end", marker)
            return
        if self._tag is not None:
            self._drop_tag()
        self._cuts_marker = cuts_marker
        if cuts_marker and self._state in (REASONING, CONTENT):
            self._seams.add(self._state)
        if marker in (OPEN, CLOSE):
            self._tag, self._is_closing, self.direct = "", marker == CLOSE, ""
        elif marker in (EOS, BOS, USER, ASSISTANT):
            self._end_message(marker)
        elif self._state in VALUES or self._state == BODY:
            self.text(marker)  # it can't end a value, and a file being written may hold it
        elif marker == END_THINK and self._state == REASONING:
            self._go(CONTENT)
        elif marker == THINK and self._state == CONTENT:
            self._flush_newlines()
            self._is_after_block = False
            self._report("reopened_thinking", marker)
            self._go(REASONING)
        else:
            self._drop("stray_marker", marker)

    def finish(self) -> None:
        """The text is over, without an end of sentence: what is incomplete was cut off."""
        if self.is_done:
            return
        if self._tag is not None:
            self._drop_tag()
        if self._state in VALUES or self._state in (INVOKE, BODY):
            self._report("truncated_call", self._name)
            self._abandon()
        self._close_all()

    # Prose: reasoning and content.

    def _prose(self, text: str) -> None:
        if self._is_after_block:
            text = text.lstrip()
            if not text:
                return
            self._is_after_block = False
            self._report("text_after_calls", "")
        if self._state in self._seams:
            self._seams.remove(self._state)
            text = " " + text
        if self._state == REASONING:
            self.out.append(Delta(REASONING, text))
            self.direct = REASONING
            return
        text = self._newlines + text
        kept = text.rstrip("\n")
        kept = text[: max(len(kept), len(text) - 2)]
        self._newlines = text[len(kept) :]
        self.direct = "" if self._newlines else CONTENT
        if kept:
            self.out.append(Delta(CONTENT, kept))

    def _flush_newlines(self) -> None:
        if self._newlines:
            self.out.append(Delta(CONTENT, self._newlines))
            self._newlines = ""

    def _go(self, state: str) -> None:
        self._state = state
        must_look = self._is_after_block or self._newlines or state in self._seams
        self.direct = state if state in (REASONING, CONTENT) and not must_look else ""

    # Tags.

    def _read_tag(self, text: str) -> None:
        self._tag = (self._tag or "") + text
        read = (read_closing if self._is_closing else read_opening)(self._tag)
        if read is None:
            return
        tag, rest = self._tag[: read.length], self._tag[read.length :]
        self._tag = None
        if not (self._closing if self._is_closing else self._opening)(read.header):
            self._drop("stray_tag", (CLOSE if self._is_closing else OPEN) + tag)
        elif not read.header.is_exact:
            self._report("tag_spelling", tag)
        if rest:
            self.text(rest)

    def _drop_tag(self) -> None:
        tag, self._tag = self._tag or "", None
        self._drop("stray_tag", (CLOSE if self._is_closing else OPEN) + tag)

    def _drop(self, kind: str, text: str) -> None:
        """Leave a marker or a tag out of the text around it."""
        self._report(kind, text)
        if self._cuts_marker and self._state in VALUES:
            self.text(" ")
        if self._state in (REASONING, CONTENT):
            self._go(self._state)
        elif self._state == STRING:
            self._set_string_direct()
        elif self._state == JSON and self._has_given_head and not self._is_muted:
            self.direct = JSON

    def _opening(self, header: Header) -> bool:
        """Act on an opening tag; False where it means nothing here."""
        if header.kind == "group":
            return self._open_group()
        if header.kind == "invoke":
            return self._open_invoke(header)
        if header.kind == "parameter" and self._state in (INVOKE, *VALUES):
            self._imply_end_of_value()
            self._open_parameter(header)
            return True
        return False

    def _open_group(self) -> bool:
        if self._state == BLOCK and not self._is_bare:
            return False
        self._enter_block()
        self._is_bare = False
        return True

    def _open_invoke(self, header: Header) -> bool:
        if not header.name:
            return False
        if self._state in (REASONING, CONTENT):
            self._report("no_function_calls", header.name)
            self._is_bare = True
        self._enter_block()
        self._start_call(header.name)
        self._state = INVOKE
        if header.is_self_closed:
            self._end_call()
        return True

    def _enter_block(self) -> None:
        """Leave prose, or an open call, for the space between the calls of a block."""
        if self._state == REASONING:
            self._report("call_in_reasoning", "")
        elif self._state == CONTENT:
            if self._newlines != "\n\n" and not self._is_after_block:
                self._report("no_blank_line", self._newlines)
            self._newlines = ""
        elif self._state != BLOCK:
            self._report("unclosed_invoke", self._name)
            self._imply_end_of_value()
            self._end_call()
        self._flush_junk()
        self._state, self.direct, self._is_after_block = BLOCK, "", False

    def _closing(self, header: Header) -> bool:
        if header.kind == "parameter" and self._state in VALUES:
            self._end_value(is_implied=False)
        elif header.kind == "invoke" and self._state in (INVOKE, BODY, *VALUES):
            self._imply_end_of_value()
            self._end_call()
        elif header.kind == "group" and self._state in (BLOCK, INVOKE, BODY, *VALUES):
            if self._state != BLOCK:
                self._enter_block()
            self._end_block()
        else:
            return False
        return True

    def _end_block(self) -> None:
        self._flush_junk()
        self._is_after_block = True
        self._go(CONTENT)

    def _between_tags(self, text: str) -> None:
        """Text in a block or a call, outside any value: white space, an inline JSON body, or what doesn't belong there."""
        if self._state == BODY:
            self._body(text)
            return
        shown = text.lstrip() if not self._junk else text
        if not shown:
            return
        if self._state == BLOCK and self._is_bare:
            self._go(CONTENT)
            self._report("text_after_calls", "")
            self._prose(shown)
        elif self._state == INVOKE and shown[0] == "{" and not (self._parameters or self._junk):
            self._state, self._value, self._head, self._has_given_head = BODY, JsonStream(), "", False
            self._body(shown)
        else:
            self._junk += shown[: SHOWN - len(self._junk)]

    def _flush_junk(self) -> None:
        if self._junk:
            self._report("text_between_tags", self._junk)
            self._junk = ""

    # Calls.

    def _start_call(self, name: str) -> None:
        self._name = name
        self._parameters: set[str] = set()
        self._has_emitted = False  # whether any of the arguments were given out
        self._is_abandoned = False
        self._has_junk = False
        self._wrapper: tuple[str, str, bool | None] | None = None
        self._is_muted = False
        if not name:
            return
        if self._drops_unknown and self._schemas is not None and name not in self._schemas:
            self._report("unknown_tool", name)
            self._is_muted = self._is_abandoned = True
            return
        self.index += 1
        self.out.append(Delta(TOOL_CALL, name, self.index, self._new_id()))

    def _end_call(self) -> None:
        self._has_junk = self._has_junk or bool(self._junk)
        self._flush_junk()
        if self._state == BODY:
            self._end_body()
        elif self._wrapper:
            self._unwrap()
        if not self._is_abandoned and not self._has_emitted and self._has_junk:
            self._report("invalid_body", self._name)
            self._abandon()
        if not self._is_abandoned:
            if self._state != BODY:
                self._emit("}" if self._has_emitted else "{}")
            self.out.append(Delta(END_CALL, "", self.index))
        self._state, self.direct, self._is_muted = BLOCK, "", False

    def _abandon(self) -> None:
        if not self._is_abandoned:
            self.out.append(Delta(ABANDONED, "", self.index))
        self._is_abandoned = self._is_muted = True

    def _emit(self, fragment: str) -> None:
        if fragment and not self._is_muted:
            self._has_emitted = True
            self.out.append(Delta(ARGUMENTS, fragment, self.index))

    def _body(self, text: str) -> None:
        """All arguments as one JSON object inside the call."""
        if not self._has_given_head and not self._value.has_failed:
            self._head += text
        fresh = self._value.feed(text)
        if self._value.accepted >= HEAD and not self._value.has_failed:
            self._emit(unescape_markers(self._head_or(fresh)))

    def _head_or(self, fresh: str) -> str:
        """The accepted text from the beginning the first time, then what is fresh."""
        if self._has_given_head:
            return fresh
        self._has_given_head = True
        head, self._head = self._head[: self._value.accepted], ""
        return head.strip(JSON_SPACE) if self._value.is_complete else head.lstrip(JSON_SPACE)

    def _end_body(self) -> None:
        rest = self._value.finish()
        if self._value.has_failed:
            self._report("invalid_body", self._name)
            self._abandon()
        else:
            self._report("inline_json", self._name)
            self._emit(unescape_markers(self._head_or(rest)))

    # Parameters.

    def _open_parameter(self, header: Header) -> None:
        self._flush_wrapper()
        self._has_junk = self._has_junk or bool(self._junk)
        self._flush_junk()
        self._key, self._string_attribute = header.name, header.string
        self._is_duplicate = header.name in self._parameters
        if self._is_duplicate:
            self._report("duplicate_parameter", header.name)
            self._is_muted = True
        is_first = not self._parameters
        self._parameters.add(header.name)
        self._types = self._schemas.types(self._name, header.name) if self._schemas else ALL_TYPES
        self._may_wrap = bool(is_first and self._schemas and self._schemas.may_be_wrapper(self._name, header.name))
        self._begin_value()

    def _begin_value(self) -> None:
        """Choose how the value is read: streamed as a string or as JSON, or kept whole until its type is known."""
        self._held: list[str] = []
        self._held_len = 0
        self._head, self._has_given_head, self._newlines = "", False, ""
        string, types = self._string_attribute, self._types
        if self._may_wrap or string is None:
            self._state, self.direct = HELD, ""
        elif string and "string" in types and (types == ALL_TYPES or "null" not in types):
            self._start_string()
        elif not string and (types == ALL_TYPES or types & {"array", "object"}):
            self._state, self.direct, self._value = JSON, "", JsonStream()
        else:
            self._state, self.direct = HELD, ""

    def _start_string(self) -> None:
        self._emit(self._prefix() + '"')
        self._state = STRING
        self._set_string_direct()

    def _set_string_direct(self) -> None:
        self.direct = "" if self._newlines or self._is_muted else ARGUMENTS

    def _prefix(self) -> str:
        return (", " if self._has_emitted else "{") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _string(self, text: str) -> None:
        """Raw text as a JSON string; one line end is kept back, as it's no part of the value if its end tag is missing."""
        text = self._newlines + text
        self._newlines = "\n" if text.endswith("\n") else ""
        self._set_string_direct()
        self._emit(_escaped(text[:-1] if self._newlines else text))

    def _json(self, text: str) -> None:
        if not self._has_given_head:
            self._head += text
        fresh = self._value.feed(text)
        if self._value.has_failed:
            self._on_bad_json()
        elif self._value.accepted >= HEAD:
            self._emit_json(fresh)

    def json_text(self, text: str) -> None:
        """`text` for the state whose `direct` is JSON: arguments that flow already."""
        fresh = self._value.feed(text)
        if self._value.has_failed:
            self._on_bad_json()
        elif fresh:
            self.out.append(Delta(ARGUMENTS, unescape_markers(fresh), self.index))

    def _emit_json(self, fresh: str) -> None:
        prefix = "" if self._has_given_head else self._prefix()
        self._emit(prefix + unescape_markers(self._head_or(fresh)))
        self.direct = "" if self._is_muted else JSON

    def _on_bad_json(self) -> None:
        """Before anything was given out the value can still become a string; after it, the call is lost."""
        if self._value.accepted < HEAD:
            self._state, self.direct = HELD, ""
            text, self._head = self._head, ""
            self._held_text(text)
        else:
            self._report("invalid_json", self._key)
            if not self._is_duplicate:
                self._abandon()
            self._state, self.direct, self._is_lost = HELD, "", True

    _is_lost = False  # the value is dropped: nothing of it is kept

    def _held_text(self, text: str) -> None:
        if self._is_lost:
            return
        self._held.append(text)
        self._held_len += len(text)
        if self._held_len > HOLD_LIMIT:
            self._overflow()
        elif self._types == {"string", "null"} and self._string_attribute and not self._may_wrap:
            self._release_unless_null()

    def _release_unless_null(self) -> None:
        text = "".join(self._held)
        if self._held_len > 16 or not any(word.startswith(text.strip()) for word in ("null", "None")):
            self._held = []
            self._start_string()
            self._string(text)

    def _overflow(self) -> None:
        """Too long to be kept: a string from here on."""
        self._report("long_value", self._key)
        text, self._held = "".join(self._held), []
        self._start_string()
        self._string(text)

    def _imply_end_of_value(self) -> None:
        if self._state in VALUES:
            self._report("unclosed_parameter", self._key)
            self._end_value(is_implied=True)

    def _end_value(self, is_implied: bool) -> None:
        if self._state == JSON:
            self._end_json()
        if self._state == STRING:
            self._emit(("" if is_implied else _escaped(self._newlines)) + '"')
        elif self._state == HELD and not self._is_lost:
            text = "".join(self._held)
            self._end_held(text.removesuffix("\n") if is_implied else text)
        self._state, self.direct, self._newlines, self._held, self._is_lost = INVOKE, "", "", [], False
        self._is_muted = self._is_abandoned

    def _end_json(self) -> None:
        rest = self._value.finish()
        if self._value.has_failed:
            self._on_bad_json()
        else:
            self._emit_json(rest)

    def _end_held(self, text: str) -> None:
        if self._may_wrap:
            self._wrapper = (self._key, text, self._string_attribute)
            return
        found, is_overruled = typed(text, self._types, self._string_attribute)
        if is_overruled:
            self._report("type", text)
        self._emit(self._prefix() + (found if self._string_attribute else unescape_markers(found)))

    def _flush_wrapper(self) -> None:
        """What looked like all arguments in one parameter is an ordinary one."""
        if self._wrapper:
            (self._key, text, self._string_attribute), self._wrapper = self._wrapper, None
            self._may_wrap = False
            self._types = ALL_TYPES
            self._end_held(text)

    def _unwrap(self) -> None:
        assert self._wrapper and self._schemas
        arguments = self._schemas.unwrapped(self._name, self._wrapper[1])
        if arguments is None:
            self._flush_wrapper()
            return
        self._report("wrapped_arguments", self._wrapper[0])
        self._emit(arguments[:-1] if len(arguments) > 2 else "")

    # The end.

    def _end_message(self, marker: str) -> None:
        if marker != EOS:
            self._report("stray_marker", marker)
        if self._state in (*VALUES, BODY):
            self._report("truncated_call", self._name)
            self._abandon()
        elif self._state == INVOKE:
            self._report("unclosed_invoke", self._name)
            self._end_call()
        self._close_all()

    def _close_all(self) -> None:
        self._flush_junk()
        if self._state == BLOCK and not self._is_bare:
            self._report("unclosed_function_calls", "")
        elif self._state == REASONING:
            self._report("unclosed_reasoning", "")
        elif self._state == CONTENT:
            self._flush_newlines()
        self.is_done, self.direct = True, ""

    def _report(self, kind: str, text: str) -> None:
        """Note a repair; one that goes on from the last (text after the end, in pieces) is joined with it."""
        if kind == "after_end" and self.repairs and self.repairs[-1].kind == kind:
            said = self.repairs.pop().text
            text = said + text[: SHOWN - len(said)]
        if len(self.repairs) < MAX_REPAIRS:
            self.repairs.append(Repair(kind, text[:SHOWN]))


def _escaped(text: str) -> str:
    """Text as the inside of a JSON string; each character by itself, so that any split gives the same."""
    return encode_basestring(text)[1:-1]
