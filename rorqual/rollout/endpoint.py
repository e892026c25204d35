"""A ChatPolicy behind any OpenAI-compatible endpoint: `await EndpointPolicy(EndpointConfig(url)).reply(messages, tools, params)`.

What goes wrong at the boundary has a name: an endpoint that stalls, refuses, or answers garbage is asked again a bounded number
of times with growing pauses, and then the reply carries StopReason.UNAVAILABLE and the reason; it never raises into its caller.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.errors import UserError, require
from rorqual.policy import ChatReply, Message, SamplingParams, StopReason

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask. Times in seconds."""

    url: str
    """With or without /v1, such as http://127.0.0.1:8000."""
    model: str = ""
    """Empty: the first that the endpoint lists."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; a key never stands in a config."""
    timeout_s: float = 600.0
    """Without a byte for so long, the request has stalled."""
    max_tries: int = 4
    first_pause_s: float = 0.5
    """Before the second try; doubled each time, with jitter. A Retry-After of the endpoint wins."""
    max_pause_s: float = 30.0
    max_concurrent: int = 64
    max_body_bytes: int = 64 << 20
    """An answer larger than this is refused."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields to send with each request beside OpenAI's own, such as chat_template_kwargs."""

    def __post_init__(self) -> None:
        require(
            self,
            url=(self.url.startswith(("http://", "https://")), "an http:// or https:// address"),
            timeout_s=(self.timeout_s > 0, "more than 0"),
            max_tries=(self.max_tries >= 1, "at least 1"),
            max_concurrent=(self.max_concurrent >= 1, "at least 1"),
        )

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"


class EndpointError(UserError):
    """What an endpoint answered instead of a completion."""


class EndpointPolicy:
    """Holds one HTTP client; close it with `aclose`, or use `async with`."""

    def __init__(self, config: EndpointConfig):
        import httpx

        self.config, self._model = config, config.model
        key = os.environ.get(config.api_key_env, "")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(config.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=config.max_concurrent),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def __aenter__(self) -> EndpointPolicy:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        """One assistant message. After the last try: an empty message, StopReason.UNAVAILABLE, the reason in `failure`."""
        async with self._slots:
            reason = ""
            for attempt in range(self.config.max_tries):
                try:
                    return await self._ask(messages, tools, params)
                except _Retry as error:
                    reason = str(error)
                    if attempt + 1 < self.config.max_tries:
                        await asyncio.sleep(error.pause_s or self._pause(attempt))
                except EndpointError as error:
                    reason = str(error)
                    break
            return ChatReply({"role": "assistant", "content": "", "failure": reason}, StopReason.UNAVAILABLE)

    async def _ask(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        body = request_body(await self._name(), messages, tools, params) | dict(self.config.extra_body)
        return read_reply(await self._post("/chat/completions", body))

    async def _name(self) -> str:
        if not self._model:
            listed = (await self._request("GET", "/models", None)).get("data") or [{}]
            self._model = str(listed[0].get("id") or "")
            if not self._model:
                raise EndpointError(f"{self.config.base}: lists no model; name one in `model`")
        return self._model

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._request("POST", path, body)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        import httpx

        try:
            response = await self._client.request(method, self.config.base + path, json=body)
        except httpx.TimeoutException:
            raise _Retry(f"{self.config.base}: no answer within {self.config.timeout_s} s") from None
        except httpx.HTTPError as error:
            raise _Retry(f"{self.config.base}: {type(error).__name__}: {error}") from None
        if len(response.content) > self.config.max_body_bytes:
            raise EndpointError(f"{self.config.base}: answered with {len(response.content)} bytes")
        if response.status_code in RETRIED:
            raise _Retry(f"{self.config.base}: status {response.status_code}", _retry_after(response.headers))
        if response.status_code >= 400:
            raise EndpointError(f"{self.config.base}: status {response.status_code}: {response.text[:300]}")
        try:
            answer = response.json()
        except ValueError:
            raise _Retry(f"{self.config.base}: the answer is no JSON: {response.text[:100]!r}") from None
        if not isinstance(answer, dict):
            raise _Retry(f"{self.config.base}: the answer is no JSON object")
        return answer

    def _pause(self, attempt: int) -> float:
        return min(self.config.first_pause_s * 2**attempt, self.config.max_pause_s) * random.uniform(0.5, 1.0)


class _Retry(Exception):
    def __init__(self, text: str, pause_s: float = 0.0):
        self.pause_s = pause_s
        super().__init__(text)


def request_body(
    model: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams
) -> dict[str, Any]:
    """The OpenAI-shaped request; fields that OpenAI's API lacks (top_k, min_p) are sent only where they say something."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    optional = {"top_k": params.top_k, "min_p": params.min_p, "seed": params.seed, "logit_bias": dict(params.logit_bias)}
    body |= {name: value for name, value in optional.items() if value}
    return body | ({"tools": list(tools)} if tools else {})


_REASONS = {"stop": StopReason.STOP, "tool_calls": StopReason.STOP, "length": StopReason.LENGTH}


def read_reply(body: Mapping[str, Any]) -> ChatReply:
    """The first choice of an answer. Raises for an answer that is none, which is asked for again."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        kept: Message = {"role": "assistant", "content": message.get("content") or ""}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Retry(f"the answer has no choices[0].message: {str(body)[:200]}") from None
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    kept |= {"reasoning_content": reasoning} if reasoning else {}
    kept |= {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    usage = {name: value for name, value in (body.get("usage") or {}).items() if isinstance(value, int)}
    return ChatReply(kept, _REASONS.get(choice.get("finish_reason"), StopReason.STOP), usage=usage)


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(float(headers.get("retry-after", "0")), 0.0)
    except ValueError:
        return 0.0
