"""The streaming parser: any split of a model's output in, typed deltas out as soon as they are certain.

It cuts the output into runs of text and single markers, and keeps back only what may still become a marker. A machine
(strict.py or tolerant.py) makes deltas of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, Literal

from rorqual.chat.deltas import ARGUMENTS, Delta, NewId, Repair, new_id
from rorqual.chat.errors import ChatError
from rorqual.chat.markers import CLOSE, DSML, OPEN, SPECIAL_TOKENS, STRUCTURE_PATTERN, partial_suffix
from rorqual.chat.schema import Schemas
from rorqual.chat.strict import StrictMachine
from rorqual.chat.tolerant import JSON, TolerantMachine

Mode = Literal["tolerant", "strict"]


class StreamParser:
    """Feed it the output of a model in any pieces; it gives deltas (see `Delta`). Time is linear in the output's length.

    thinking: whether the prompt ended with <think>.
    mode: "tolerant" streams calls, mends what is malformed and lists it in `repairs`; no delta holds a marker, and memory
    stays bounded however long an argument is. "strict" mends nothing: a call block with one malformed member is plain
    content as a whole, so calls come only with the end of the message.
    tools: the request's tools; given, arguments are typed by their schemas. drop_unknown: leave out calls of other tools.
    new_id: makes the ids of calls.

    Text alone is searched for markers. With is_special (from a `Detokenizer`), only special pieces are markers and text that
    looks like one stays text; the tokens of one output come either all with it or all without.
    """

    def __init__(
        self,
        thinking: bool = True,
        mode: Mode = "tolerant",
        tools: Sequence[Mapping[str, Any]] | None = None,
        drop_unknown: bool = False,
        new_id: NewId = new_id,
    ):
        if mode not in ("tolerant", "strict"):
            raise ChatError("mode", f"expected tolerant or strict, found {mode!r}")
        self._out: list[Delta] = []
        self._held = ""  # the end of the text so far, which may be the beginning of a marker
        self._ends_partial = False  # the text given to the machine ends like the beginning of a marker, and a marker may follow
        schemas = Schemas(tools) if tools else None
        machine = StrictMachine if mode == "strict" else TolerantMachine
        self._machine = machine(self._out, thinking, schemas, new_id, drop_unknown)

    @property
    def repairs(self) -> list[Repair]:
        """What was mended so far, in the order of the text."""
        return self._machine.repairs

    @property
    def is_done(self) -> bool:
        """Whether the message has ended: nothing that follows is part of it."""
        return self._machine.is_done

    def feed(self, text: str, is_special: bool | None = None) -> list[Delta]:
        """The deltas that this piece makes certain. is_special: the piece is one special token (True) or plain text (False)."""
        machine = self._machine
        direct = machine.direct
        if direct and text and "<" not in text and "｜" not in text and not self._held and text[-1] != "\n" and not is_special:
            if direct == ARGUMENTS:
                return [Delta(ARGUMENTS, encode_basestring(text)[1:-1], machine.index)]
            if direct != JSON:
                return [Delta(direct, text)]
            machine.json_text(text)
            return self._taken()
        if not text:
            return []
        if is_special is None:
            self._feed_text(text)
        elif is_special:
            self._feed_special(text)
        else:
            self._feed_plain(text)
        return self._taken()

    def finish(self) -> list[Delta]:
        """The last deltas; call it when the output is over."""
        if self._held:
            self._flush_held()
        self._machine.finish()
        return self._taken()

    def _taken(self) -> list[Delta]:
        """The deltas since the last time, neighbours of one kind joined."""
        out = self._out
        if len(out) > 1:
            taken = _joined(out)
            out.clear()
            return taken
        taken = out.copy()
        out.clear()
        return taken

    def _feed_text(self, text: str) -> None:
        text = self._held + text
        machine = self._machine
        if "<" not in text and "｜" not in text:
            self._held = ""
            machine.text(text)
            return
        at = 0
        for match in STRUCTURE_PATTERN.finditer(text):
            before = text[at : match.start()]
            if before:
                machine.text(before)
                self._ends_partial = partial_suffix(before) > 0
            machine.mark(match.group(), self._ends_partial)
            self._ends_partial = False
            at = match.end()
        held = partial_suffix(text[at:] if at else text)
        end = len(text) - held
        self._held = text[end:]
        if end > at:
            machine.text(text[at:end])
            self._ends_partial = held > 0 and partial_suffix(text[at:end]) > 0

    def _feed_special(self, text: str) -> None:
        if text not in SPECIAL_TOKENS:
            self._flush_held()
            self._machine.mark(text)
        elif text == DSML and self._held in ("<", "</"):
            marker, self._held = (OPEN if self._held == "<" else CLOSE), ""
            self._machine.mark(marker)
        else:
            self._flush_held()
            self._machine.mark(text)

    def _feed_plain(self, text: str) -> None:
        """Plain text holds no marker, but its last "<" or "</" may be the beginning of a tag."""
        text = self._held + text
        held = 1 if text.endswith("<") else 2 if text.endswith("</") else 0
        end = len(text) - held
        self._held = text[end:]
        if end:
            self._machine.text(text[:end])

    def _flush_held(self) -> None:
        held, self._held = self._held, ""
        if held:
            self._machine.text(held)


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind and call as one delta."""
    groups: list[tuple[Delta, list[str]]] = []
    for delta in deltas:
        if groups and delta.id is None and delta.text and groups[-1][0][::2] == delta[::2] and delta.kind != "tool_call":
            groups[-1][1].append(delta.text)
        else:
            groups.append((delta, [delta.text]))
    return [delta._replace(text="".join(texts)) for delta, texts in groups]
