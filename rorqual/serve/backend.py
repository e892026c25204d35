"""Where tokens come from: the embedded engine, or another engine's completions endpoint. One protocol, so that the chat
semantics in front of both are the same code."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from rorqual.chat import Piece, Tokenizer, encode, encode_tokens
from rorqual.engine.request import Constraint
from rorqual.engine.sampler import Sampled
from rorqual.engine.service import Busy, Closing, EngineService, Handle
from rorqual.policy import Completion, SamplingParams, StopReason
from rorqual.serve.failures import Refusal


@dataclass(frozen=True)
class Job:
    """One choice to generate. prompt: ids, or text for a backend without a tokenizer."""

    prompt: list[int] | str
    params: SamplingParams
    constraint: Constraint | None = None


class Fragment(NamedTuple):
    """Text that has come, and the token behind it where the backend shows tokens."""

    pieces: list[Piece]
    token: Sampled | None = None


@dataclass
class Ending:
    stop_reason: StopReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    completion: Completion | None = None


class Generation(Protocol):
    """Iterate over its fragments, then await `ending`. `abort` at any time."""

    def __aiter__(self) -> AsyncIterator[Fragment]: ...
    async def ending(self) -> Ending: ...
    def abort(self) -> None: ...


class Backend(Protocol):
    model_name: str

    def chat_prompt(self, messages: Sequence[dict[str, Any]], thinking: bool, drop_thinking: bool) -> list[int] | str: ...
    def text_prompt(self, prompt: str | list[int]) -> list[int] | str: ...
    def room(self, prompt: list[int] | str) -> int | None:
        """Tokens that fit after a prompt; None where the backend alone knows."""
        ...

    def start(self, job: Job) -> Generation: ...


class EngineBackend:
    """The embedded engine and its tokenizer."""

    def __init__(self, service: EngineService, tokenizer: Tokenizer, model_name: str):
        self.service, self.tokenizer, self.model_name = service, tokenizer, model_name

    def chat_prompt(self, messages: Sequence[dict[str, Any]], thinking: bool, drop_thinking: bool) -> list[int]:
        return encode_tokens(messages, self.tokenizer, thinking, drop_thinking)

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode_flat(prompt) if isinstance(prompt, str) else prompt

    def room(self, prompt: list[int] | str) -> int:
        return self.service.engine.max_context - len(prompt)

    def start(self, job: Job) -> Generation:
        try:
            handle = self.service.submit(job.prompt, job.params, job.constraint)  # type: ignore[arg-type]
        except Busy as error:
            raise Refusal(429, str(error), code="queue_full", retry_after_s=error.retry_after_s) from None
        except Closing as error:
            raise Refusal(503, str(error), code="shutting_down") from None
        return _EngineGeneration(handle, self.tokenizer)


@dataclass
class _EngineGeneration:
    handle: Handle
    tokenizer: Tokenizer

    async def __aiter__(self) -> AsyncIterator[Fragment]:
        detokenizer = self.tokenizer.detokenizer()
        async for sampled in self.handle:
            yield Fragment(list(detokenizer.feed(sampled.token)), sampled)
        rest = list(detokenizer.finish())
        if rest:
            yield Fragment(rest)

    async def ending(self) -> Ending:
        done = await self.handle.completion()
        return Ending(done.stop_reason, len(done.prompt_tokens), len(done.tokens), done.cached_len, done)

    def abort(self) -> None:
        self.handle.abort()


class UpstreamBackend:
    """Another engine's /v1/completions (vLLM, SGLang, llama.cpp): it takes the prompt as text and streams text back.

    It must read special tokens in the prompt, and must not leave them out of what it gives: `skip_special_tokens: false` is
    sent, which vLLM and SGLang know.
    """

    def __init__(self, url: str, model_name: str, api_key: str = "", timeout_s: float = 600.0):
        import httpx

        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model_name = model_name
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, pool=None), headers=headers)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], thinking: bool, drop_thinking: bool) -> str:
        return encode(messages, thinking, drop_thinking)

    def text_prompt(self, prompt: str | list[int]) -> list[int] | str:
        return prompt

    def room(self, prompt: list[int] | str) -> None:
        return None

    def start(self, job: Job) -> Generation:
        if job.constraint is not None:
            raise Refusal(400, "response_format, tool_choice: this upstream takes no constraint on tokens", "response_format")
        return _UpstreamGeneration(self, job)

    async def aclose(self) -> None:
        await self.client.aclose()


@dataclass
class _UpstreamGeneration:
    backend: UpstreamBackend
    job: Job
    _ending: Ending = field(default_factory=lambda: Ending(StopReason.UNAVAILABLE, 0, 0))
    _response: Any = None

    async def __aiter__(self) -> AsyncIterator[Fragment]:
        import httpx

        try:
            async with self.backend.client.stream("POST", f"{self.backend.base}/completions", json=self._body()) as response:
                self._response = response
                if response.status_code >= 400:
                    detail = (await response.aread()).decode("utf-8", "replace")[:300]
                    raise Refusal(502 if response.status_code >= 500 else 400, f"upstream: {detail}", code="upstream")
                async for line in response.aiter_lines():
                    text = self._read(line)
                    if text:
                        # Text alone: the parser finds the markers in it.
                        yield Fragment([Piece(text, None)])  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            raise Refusal(502, f"upstream: {type(error).__name__}: {error}", code="upstream") from None

    def _body(self) -> dict[str, Any]:
        params = self.job.params
        body = {
            "model": self.backend.model_name,
            "prompt": self.job.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        optional = {"top_k": params.top_k, "min_p": params.min_p, "seed": params.seed}
        return body | {name: value for name, value in optional.items() if value}

    def _read(self, line: str) -> str:
        """The text of one event; counts and reasons are kept."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            return ""
        try:
            event = json.loads(data)
        except json.JSONDecodeError:
            raise Refusal(502, f"upstream: an event that is no JSON: {data[:100]}", code="upstream") from None
        usage = event.get("usage") or {}
        self._ending.prompt_tokens = usage.get("prompt_tokens", self._ending.prompt_tokens)
        self._ending.completion_tokens = usage.get("completion_tokens", self._ending.completion_tokens)
        choice = (event.get("choices") or [{}])[0]
        if choice.get("finish_reason"):
            is_cut = choice["finish_reason"] == "length"
            self._ending.stop_reason = StopReason.LENGTH if is_cut else StopReason.STOP
        return choice.get("text") or ""

    async def ending(self) -> Ending:
        return self._ending

    def abort(self) -> None:
        """The stream is closed with its generator; nothing else holds the request upstream."""
