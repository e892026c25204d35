"""Messages -> the prompt, byte for byte as the published encoder writes it [encoding_dsv32.py; P 3.2.1; spec 4.1, 4.3].

One pass makes spans of (text, is_special, source). `encode` joins them; `encode_tokens` makes ids of them, in which only
special spans give special ids; training takes its loss mask from their sources. docs/chat.md lists where the published
encoder crashes or loses something and this one doesn't.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.chat.errors import ChatError
from rorqual.chat.grammar import invoke_header, parameter_header
from rorqual.chat.markers import ASSISTANT, BOS, CLOSE, END_THINK, EOS, OPEN, THINK, USER, escape_markers, find_reserved
from rorqual.chat.messages import Call, Turn, read_messages
from rorqual.chat.prompts import DEVELOPER, RESPONSE_FORMAT, TOOLS_HEAD, TOOLS_TAIL
from rorqual.chat.results import Place, order_results
from rorqual.chat.spans import Source, Span, fixed, plain, plain_runs, refuse_markers
from rorqual.chat.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EncodedChat:
    """Token ids with their origin, one entry each."""

    tokens: list[int]
    sources: list[Source]

    @property
    def loss_mask(self) -> list[bool]:
        """True where the model writes the token: all of every assistant message, its end of sentence included."""
        return [source.is_generated for source in self.sources]


def encode(
    messages: Messages, thinking: bool = True, drop_thinking: bool = True, context: Messages = (), add_bos: bool = True
) -> str:
    """The prompt as one string, to be tokenised with its markers as special tokens.

    messages: OpenAI-shaped; tools and response_format stand on the system or developer message.
    thinking: whether the model shall reason. drop_thinking: leave out the reasoning of rounds before the last user
    message, as the released weights expect; False keeps it, so that a conversation only ever grows (prefix caches, RL).
    context: earlier messages, known but not written; the beginning of sentence is written only without them.
    Raises ChatError, naming message and field, for what the format can't write, marker text in a field included.
    """
    spans = encode_spans(messages, thinking, drop_thinking, context, add_bos)
    refuse_markers(spans)
    return "".join(span.text for span in spans)


def encode_tokens(
    messages: Messages,
    tokenizer: Tokenizer,
    thinking: bool = True,
    drop_thinking: bool = True,
    context: Messages = (),
    add_bos: bool = True,
) -> list[int]:
    """The prompt as token ids, as `encode`; marker text in a field becomes plain tokens, never a special one."""
    return encode_with_sources(messages, tokenizer, thinking, drop_thinking, context, add_bos).tokens


def encode_with_sources(
    messages: Messages,
    tokenizer: Tokenizer,
    thinking: bool = True,
    drop_thinking: bool = True,
    context: Messages = (),
    add_bos: bool = True,
) -> EncodedChat:
    """`encode_tokens` with the source of every token, hence the loss mask of training."""
    spans = encode_spans(messages, thinking, drop_thinking, context, add_bos)
    if tokenizer.missing:
        refuse_markers(spans)
    return tokenize_spans(spans, tokenizer)


def tokenize_spans(spans: list[Span], tokenizer: Tokenizer) -> EncodedChat:
    """Ids of spans: a special span is its one id, text is never special. A token across two fields belongs to the first."""
    tokens: list[int] = []
    sources: list[Source] = []
    spans = [span._replace(is_special=False) if span.text in tokenizer.missing else span for span in spans]
    for run in plain_runs(spans):
        if run[0].is_special:
            tokens.append(tokenizer.special_id(run[0].text))
            sources.append(run[0].source)
        else:
            ids, starts = tokenizer.encode_with_offsets("".join(span.text for span in run))
            tokens += ids
            sources += _sources_at(run, starts)
    return EncodedChat(tokens, sources)


def _sources_at(run: list[Span], starts: list[int]) -> list[Source]:
    """The source of the span in which each character position stands. starts ascend."""
    found: list[Source] = []
    n, end = 0, len(run[0].text)
    for start in starts:
        while start >= end and n + 1 < len(run):
            n += 1
            end += len(run[n].text)
        found.append(run[n].source)
    return found


def encode_spans(
    messages: Messages, thinking: bool = True, drop_thinking: bool = True, context: Messages = (), add_bos: bool = True
) -> list[Span]:
    """The prompt as spans; see `encode`. Marker text in a field is accepted here: it is in no special span."""
    earlier = read_messages(context, "context")
    turns = earlier + read_messages(messages)
    writer = _Writer(turns, len(earlier), thinking, drop_thinking)
    spans = fixed(BOS, Source(-1, "", "format")) if add_bos and not earlier else []
    for index in range(len(earlier), len(turns)):
        spans += writer.turn(index)
    return spans


class _Writer:
    """Writes one turn at a time; knows the whole conversation."""

    def __init__(self, turns: list[Turn], n_context: int, thinking: bool, drop_thinking: bool):
        self.turns = turns
        self.n_context = n_context
        self.thinking = thinking
        self.drop_thinking = drop_thinking
        self.last_user = max((n for n, turn in enumerate(turns) if turn.is_user), default=-1)
        self.places = order_results(turns, n_context)

    def turn(self, index: int) -> list[Span]:
        turn = self.turns[index]
        if turn.role == "tool":
            return self._result(index, self.places[index])
        if turn.role == "assistant":
            return self._assistant(index, turn)
        body = self._source(index, "content")
        if turn.role == "system":
            return plain(turn.content, body) + self._offers(index, turn)
        head = fixed(USER, self._source(index))
        if turn.role == "developer":
            head += self._offers(index, turn) + fixed(DEVELOPER, self._source(index))
        return head + plain(turn.content, body) + fixed(ASSISTANT + self._opener(index), self._source(index))

    def _source(self, index: int, field: str = "format") -> Source:
        return Source(index - self.n_context, self.turns[index].role, field)

    def _offers(self, index: int, turn: Turn) -> list[Span]:
        """The tools and the response format of a system or developer message."""
        spans: list[Span] = []
        if turn.tools:
            prose = self._source(index, "tools")
            spans += fixed("\n\n" + TOOLS_HEAD, prose)
            for n, schema in enumerate(turn.tools):
                spans += fixed("\n", prose) if n else []
                spans += plain(schema, self._source(index, f"tools[{n}]"))
            spans += fixed(TOOLS_TAIL, prose)
        if turn.response_format:
            spans += fixed(RESPONSE_FORMAT, self._source(index))
            spans += plain(turn.response_format, self._source(index, "response_format"))
        return spans

    def _opener(self, index: int) -> str:
        """<think> where the model shall reason, or where reasoning that is kept follows; else </think>."""
        if not self.thinking:
            return END_THINK
        is_open = index >= self.last_user or (not self.drop_thinking and self._keeps_reasoning(index + 1))
        return THINK if is_open else END_THINK

    def _keeps_reasoning(self, index: int) -> bool:
        """Whether an assistant turn writes its reasoning: in the current round always, before it only if it is kept."""
        turn = self.turns[index]
        if not self.thinking or turn.role != "assistant":
            return False
        return index > self.last_user or (not self.drop_thinking and bool(turn.reasoning or turn.calls))

    def _assistant(self, index: int, turn: Turn) -> list[Span]:
        end = self._source(index)
        spans: list[Span] = []
        if self._keeps_reasoning(index):
            if not (turn.reasoning or turn.calls):
                raise ChatError(
                    f"messages[{index - self.n_context}].reasoning_content",
                    "an assistant message after the last user message needs reasoning_content or tool_calls in thinking mode",
                )
            spans += plain(turn.reasoning, self._source(index, "reasoning_content")) + fixed(END_THINK, end)
        spans += plain(turn.content, self._source(index, "content"))
        for n, call in enumerate(turn.calls):
            source = self._source(index, f"tool_calls[{n}]")
            spans += fixed("\n" if n else f"\n\n{OPEN}function_calls>\n", source) + _call_spans(call, source)
        return spans + fixed((f"\n{CLOSE}function_calls>" if turn.calls else "") + EOS, end)

    def _result(self, index: int, place: Place) -> list[Span]:
        """A tool result, in the order of the calls; the last one closes the block."""
        frame = self._source(index)
        spans = fixed("\n\n<function_results>" if place.is_first else "", frame) + fixed("\n<result>", frame)
        spans += plain(self.turns[place.result].content, self._source(place.result, "content")) + fixed("</result>", frame)
        return spans + fixed("\n</function_results>\n\n" + self._opener(index) if place.is_last else "", frame)


def _call_spans(call: Call, source: Source) -> list[Span]:
    spans = fixed(f"{OPEN}invoke ", source) + plain(f"{invoke_header(call.name).removeprefix('invoke ')}\n", source)
    for n, (name, value) in enumerate(call.arguments.items()):
        is_string, text = write_value(value)
        header = parameter_header(name, is_string).removeprefix("parameter ")
        spans += fixed(("\n" if n else "") + f"{OPEN}parameter ", source)
        spans += plain(header + text, source) + fixed(f"{CLOSE}parameter>", source)
    return spans + fixed(f"\n{CLOSE}invoke>", source)


def write_value(value: Any) -> tuple[bool, str]:
    """An argument as (the string attribute, the text): strings raw, all else JSON.

    A string that holds a marker is written as JSON too, with the marker escaped: text can then never end the parameter.
    """
    if isinstance(value, str) and not find_reserved(value):
        return True, value
    return False, escape_markers(json.dumps(value, ensure_ascii=False))
