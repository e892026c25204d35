"""Stop strings over a stream of pieces: text after one never comes out, and text that may begin one waits."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.chat import Piece


class StopFilter:
    """Feed it pieces; it gives those that are certain. `is_done` once a stop string was seen (it is not given)."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.is_done = False

    def feed(self, piece: Piece) -> list[Piece]:
        if self.is_done or not self._stops:
            return [] if self.is_done else [piece]
        if piece.is_special:
            return [*self.finish(), piece]
        text, self._held = self._held + piece.text, ""
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.is_done = True
            return _pieces(text[: min(ends)])
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return _pieces(text[: len(text) - keep])

    def finish(self) -> list[Piece]:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return _pieces(held)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)


def _pieces(text: str) -> list[Piece]:
    return [Piece(text, False)] if text else []
