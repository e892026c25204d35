"""A ChatPolicy behind any OpenAI-compatible endpoint: `await EndpointPolicy(EndpointConfig(url)).reply(messages, tools, params)`.

What goes wrong at the boundary has a name: an endpoint that stalls, refuses, or answers garbage is asked again a bounded number
of times with growing pauses, and then the reply carries StopReason.UNAVAILABLE and the reason; it never raises into its caller.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.errors import require
from rorqual.policy import ChatReply, Message, SamplingParams, StopReason
from rorqual.rollout.wire import Away, EndpointError, Patience, Retry, Wire


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
    patience_s: float = 0.0
    """Go on asking for so long, however many tries that takes: for an endpoint that may be away for a while."""
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

    def wire(self, base: str) -> Wire:
        """A client for `base`; the key is read from the environment."""
        import httpx

        key = os.environ.get(self.api_key_env, "")
        client = httpx.AsyncClient(
            timeout=httpx.Timeout(self.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=self.max_concurrent),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        patience = Patience(self.max_tries, self.patience_s, self.first_pause_s, self.max_pause_s)
        return Wire(client, base, patience, self.max_body_bytes)


class EndpointPolicy:
    """Holds one HTTP client; close it with `aclose`, or use `async with`."""

    def __init__(self, config: EndpointConfig):
        self.config, self._model = config, config.model
        self._wire = config.wire(config.base)
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def __aenter__(self) -> EndpointPolicy:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._wire.client.aclose()

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        """One assistant message. After the last try: an empty message, StopReason.UNAVAILABLE, the reason in `failure`."""
        async with self._slots:
            try:
                body = request_body(await self._name(), messages, tools, params) | dict(self.config.extra_body)
                return await self._wire.ask("POST", "/chat/completions", body, read_reply)
            except (Away, EndpointError) as error:
                return ChatReply({"role": "assistant", "content": "", "failure": str(error)}, StopReason.UNAVAILABLE)

    async def _name(self) -> str:
        if not self._model:
            listed = (await self._wire.ask("GET", "/models", None)).get("data") or [{}]
            self._model = str(listed[0].get("id") or "")
            if not self._model:
                raise EndpointError(f"{self.config.base}: lists no model; name one in `model`")
        return self._model


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
        raise Retry(f"the answer has no choices[0].message: {str(body)[:200]}") from None
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    kept |= {"reasoning_content": reasoning} if reasoning else {}
    kept |= {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    usage = {name: value for name, value in (body.get("usage") or {}).items() if isinstance(value, int)}
    return ChatReply(kept, _REASONS.get(choice.get("finish_reason"), StopReason.STOP), usage=usage)
