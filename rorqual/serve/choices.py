"""One choice of an answer: a generation's fragments through the stop strings and the parser, as deltas and as a message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.chat import Delta, MessageBuilder, Piece, StreamParser, new_id
from rorqual.chat.deltas import END_CALL
from rorqual.chat.markers import END_THINK
from rorqual.engine.sampler import Sampled
from rorqual.policy import StopReason
from rorqual.serve.backend import Ending, Generation
from rorqual.serve.failures import Refusal
from rorqual.serve.stops import StopFilter

FINISH = {StopReason.LENGTH: "length", StopReason.ABORTED: "abort", StopReason.CONSTRAINT: "stop"}
REFUSED = {
    StopReason.TOO_LONG: (400, "the prompt does not fit the context", "context_length_exceeded"),
    StopReason.OUT_OF_MEMORY: (503, "no cache block could be had for this request", "out_of_memory"),
    StopReason.UNAVAILABLE: (502, "the upstream engine gave no answer", "upstream"),
}


@dataclass
class ChatChoice:
    """Consume `deltas`, then read the rest. single_call: end the message after its first call (parallel calls are off)."""

    generation: Generation
    stops: Sequence[str]
    thinking: bool
    tools: Sequence[dict[str, Any]]
    single_call: bool = False
    builder: MessageBuilder = field(default_factory=MessageBuilder)
    tokens: list[Sampled] = field(default_factory=list)
    reasoning_tokens: int = 0
    ending: Ending | None = None
    _calls: int = 0
    _is_reasoning: bool = False
    _was_stopped: bool = False

    async def deltas(self) -> AsyncIterator[tuple[list[Delta], list[Sampled]]]:
        """What became certain with each token, and the tokens. Raises Refusal for a generation that could not begin."""
        parser = StreamParser(self.thinking, tools=self.tools or None, new_id=new_id)
        stops, self._is_reasoning = StopFilter(self.stops), self.thinking
        async for fragment in self.generation:
            sampled = [fragment.token] if fragment.token else []
            self._count(fragment.pieces, sampled)
            pieces = [piece for each in fragment.pieces for piece in stops.feed(each)]
            yield self._take(parser, pieces), sampled
            if stops.is_done or (self.single_call and self._calls):
                self.generation.abort()
                break
        last = self._take(parser, stops.finish())
        closing = self._known(parser.finish())
        self.builder.add(closing)
        self.ending = await self.generation.ending()
        if self.ending.stop_reason in REFUSED and not self.ending.completion_tokens:
            status, message, code = REFUSED[self.ending.stop_reason]
            raise Refusal(status, message, "messages", code)
        self._was_stopped = stops.is_done
        yield last + closing, []

    @property
    def finish_reason(self) -> str:
        assert self.ending is not None
        if self._calls:
            return "tool_calls"
        return "stop" if self._was_stopped else FINISH.get(self.ending.stop_reason, "stop")

    def _take(self, parser: StreamParser, pieces: Sequence[Piece]) -> list[Delta]:
        deltas = [delta for piece in pieces for delta in self._known(parser.feed(piece.text, piece.is_special))]
        self.builder.add(deltas)
        return deltas

    def _known(self, deltas: Sequence[Delta]) -> list[Delta]:
        """The deltas up to the first complete call, where one is enough."""
        kept = []
        for delta in deltas:
            if self.single_call and self._calls:
                break
            kept.append(delta)
            self._calls += delta.kind == END_CALL
        return kept

    def _count(self, pieces: Sequence[Piece], sampled: Sequence[Sampled]) -> None:
        self.tokens += sampled
        if self._is_reasoning:
            self.reasoning_tokens += len(sampled)
            self._is_reasoning = not any(piece.text == END_THINK and piece.is_special for piece in pieces)
