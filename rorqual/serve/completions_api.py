"""POST /v1/completions: text or token ids in, text (and ids) out, without the chat format."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from rorqual.chat import Piece
from rorqual.engine.sampler import Sampled
from rorqual.policy import StopReason
from rorqual.serve.backend import Backend, Ending, EngineBackend, Generation, Job
from rorqual.serve.chat_api import Defaults, recorded, sse
from rorqual.serve.choices import FINISH, REFUSED
from rorqual.serve.failures import Refusal, error_body
from rorqual.serve.requests import CompletionRequest
from rorqual.serve.stops import StopFilter


@dataclass
class TextChoice:
    """One completion as plain text; the end-of-sentence token ends it and is not part of the text."""

    generation: Generation
    stops: StopFilter
    end_text: str
    skip_special: bool = False
    texts: list[str] = field(default_factory=list)
    tokens: list[Sampled] = field(default_factory=list)
    ending: Ending | None = None

    async def run(self) -> AsyncIterator[str]:
        async for fragment in self.generation:
            self.tokens += [fragment.token] if fragment.token else []
            text = "".join(p.text for piece in fragment.pieces if self._shows(piece) for p in self.stops.feed(piece))
            self.texts.append(text)
            yield text
            if self.stops.is_done:
                self.generation.abort()
                break
        rest = "".join(piece.text for piece in self.stops.finish())
        self.texts.append(rest)
        self.ending = await self.generation.ending()
        if self.ending.stop_reason in REFUSED and not self.ending.completion_tokens:
            status, message, code = REFUSED[self.ending.stop_reason]
            raise Refusal(status, message, "prompt", code)
        yield rest

    def _shows(self, piece: Piece) -> bool:
        return not piece.is_special or (piece.text != self.end_text and not self.skip_special)

    @property
    def finish_reason(self) -> str:
        reason = self.ending.stop_reason if self.ending else StopReason.STOP
        return "stop" if self.stops.is_done else FINISH.get(reason, "stop")


def open_texts(request: CompletionRequest, backend: Backend, defaults: Defaults) -> list[TextChoice]:
    """Queue n choices for each prompt."""
    choices = []
    for prompt in map(backend.text_prompt, request.prompts):
        room = backend.room(prompt)
        if room is not None and room <= 0:
            raise Refusal(400, f"the prompt's {len(prompt)} tokens fill the context", "prompt", "context_length_exceeded")
        wanted = 16 if request.max_tokens is None else request.max_tokens  # OpenAI's default of this endpoint
        max_tokens = wanted if room is None else min(wanted, room)
        for number in range(request.n):
            params = request.params(max_tokens, defaults.temperature, defaults.top_p, request.logprobs or 0, number)
            end_text = ""
            if isinstance(backend, EngineBackend):
                from dataclasses import replace

                params = replace(params, stop_tokens=(*params.stop_tokens, backend.tokenizer.eos_id))
                end_text = backend.tokenizer.special_tokens[backend.tokenizer.eos_id]
            choices.append(
                TextChoice(backend.start(Job(prompt, params)), StopFilter(request.stops), end_text, request.skip_special_tokens)
            )
    return choices


async def whole_texts(request: CompletionRequest, choices: list[TextChoice], backend: Backend) -> dict[str, Any]:
    async def drain(choice: TextChoice) -> None:
        async for _ in choice.run():
            pass

    try:
        await asyncio.gather(*(drain(choice) for choice in choices))
    finally:
        _abort(choices)
    bodies = [_body(number, "".join(choice.texts), choice, request, backend) for number, choice in enumerate(choices)]
    return _frame(backend) | {"choices": bodies, "usage": _usage(choices)}


async def stream_texts(request: CompletionRequest, choices: list[TextChoice], backend: Backend) -> AsyncIterator[str]:
    frame = _frame(backend)
    try:
        for number, choice in enumerate(choices):
            async for text in choice.run():
                if text:
                    yield sse(frame | {"choices": [{"index": number, "text": text, "finish_reason": None, "logprobs": None}]})
            yield sse(frame | {"choices": [_body(number, "", choice, request, backend)]})
        if request.stream_options and request.stream_options.include_usage:
            yield sse(frame | {"choices": [], "usage": _usage(choices)})
    except Refusal as error:
        yield sse(error_body(error.status, error.message, error.param, error.code))
    finally:
        _abort(choices)
    yield "data: [DONE]\n\n"


def _body(number: int, text: str, choice: TextChoice, request: CompletionRequest, backend: Backend) -> dict[str, Any]:
    body = {"index": number, "text": text, "finish_reason": choice.finish_reason, "logprobs": None}
    if request.logprobs is not None and isinstance(backend, EngineBackend):
        body["logprobs"] = _logprobs(choice.tokens, backend)
    return body | recorded(choice.ending.completion if choice.ending else None, request)


def _logprobs(tokens: list[Sampled], backend: EngineBackend) -> dict[str, Any]:
    """The older API's parallel lists."""

    def text(token: int) -> str:
        return backend.tokenizer.special_tokens.get(token) or backend.tokenizer.token_bytes(token).decode("utf-8", "replace")

    return {
        "tokens": [text(t.token) for t in tokens],
        "token_logprobs": [t.model_logprob for t in tokens],
        "top_logprobs": [{text(token): logprob for token, logprob in t.top_logprobs} for t in tokens],
    }


def _abort(choices: list[TextChoice]) -> None:
    for choice in choices:
        if choice.ending is None:
            choice.generation.abort()


def _usage(choices: list[TextChoice]) -> dict[str, Any]:
    endings = [choice.ending for choice in choices if choice.ending]
    prompt, completion = sum(e.prompt_tokens for e in endings), sum(e.completion_tokens for e in endings)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _frame(backend: Backend) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": backend.model_name,
    }
