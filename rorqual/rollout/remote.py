"""A TokenPolicy behind another engine's HTTP interface: token ids in, token ids out, nothing tokenised on the way.

    async with RemotePolicy(RemoteConfig("sglang", EndpointConfig("http://127.0.0.1:30000", patience_s=120))) as policy:
        await policy.reload("/shared/checkpoint", version=7)
        completion = await policy.complete(prompt_tokens, params)

What an engine cannot give back is refused by name before anything is sampled (`refusals`), and an answer that lacks what was
asked for is an error, never a guess. An endpoint that stays away beyond its patience is a completion with
StopReason.UNAVAILABLE. The forms are those of vLLM's and SGLang's own servers and of `rorqual serve`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from rorqual.errors import UserError, require
from rorqual.policy import Completion, SamplingParams, StopReason
from rorqual.rollout.dialects import DIALECTS, Call, Dialect, ExpertLayout
from rorqual.rollout.endpoint import EndpointConfig
from rorqual.rollout.wire import Away, EndpointError


@dataclass(frozen=True)
class RemoteConfig:
    """Another engine. The endpoint's url without /v1 will do; patience_s decides how long it may be away."""

    kind: Literal["rorqual", "vllm", "sglang"]
    endpoint: EndpointConfig
    processed_logprobs: bool = False
    """vLLM: the server was started with --logprobs-mode processed_logprobs, so that log-probs are those of the distribution
    sampled from. Without it only temperature 1 and no truncation are taken, where raw and processed are the same."""

    def __post_init__(self) -> None:
        require(self, kind=(self.kind in DIALECTS, f"one of {', '.join(DIALECTS)}"))

    @property
    def root(self) -> str:
        return self.endpoint.base.removesuffix("/v1")


@dataclass
class RemotePolicy:
    """Belongs to the event loop that it is used in; use `async with`. No completion spans a change of weights."""

    config: RemoteConfig
    experts: ExpertLayout | None = None
    """Of the model that the engine runs; needed for routing from vLLM and SGLang."""
    version: int = 0
    failures: list[str] = field(default_factory=list)
    """Why the endpoint was given up, the last few times."""

    def __post_init__(self) -> None:
        self._dialect: Dialect = dialect_of(self.config, self.experts)
        self._wire = self.config.endpoint.wire(self.config.root)
        self._slots = asyncio.Semaphore(self.config.endpoint.max_concurrent)
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Condition()
        self._in_flight = 0

    async def __aenter__(self) -> RemotePolicy:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._wire.client.aclose()

    @property
    def counts(self) -> Counter[str]:
        """retries: answers that were asked for again; given_up: requests that ran out of patience."""
        return self._wire.counts

    async def complete(self, prompt_tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Raises UserError for what the engine cannot give (`refusals`), or did not give back."""
        check(self.config, params)
        await self._open.wait()
        self._in_flight += 1
        try:
            async with self._slots:
                return await self._ask(tuple(int(token) for token in prompt_tokens), params)
        finally:
            self._in_flight -= 1
            async with self._idle:
                self._idle.notify_all()

    async def reload(self, checkpoint: str, version: int) -> None:
        """Have the engine read a checkpoint directory that it can see. Requests under way end first, later ones wait.

        Raises UserError where it refuses, or stays away.
        """
        self._open.clear()
        try:
            async with self._idle:
                await self._idle.wait_for(lambda: self._in_flight == 0)
            for call in self._dialect.reload(checkpoint, version):
                answer = await self._wire.ask(call.method, call.path, call.body)
                if answer.get("success") is False:
                    raise UserError(f"{self.config.root}{call.path}: refused the weights: {answer.get('message')}")
            self.version = version
        finally:
            self._open.set()

    async def _ask(self, prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        call: Call = self._dialect.request(prompt, params)
        try:
            found = await self._wire.ask(
                call.method, call.path, call.body, lambda answer: self._dialect.read(answer, prompt, params)
            )
        except Away as error:
            self.failures = [*self.failures[-9:], str(error)]
            return empty(prompt, StopReason.UNAVAILABLE)
        except EndpointError as error:
            if error.status == 400 and _is_too_long(str(error)):
                return empty(prompt, StopReason.TOO_LONG)
            raise
        versions = np.full(len(found.tokens), self.version, np.int32) if found.policy_versions is None else found.policy_versions
        return replace(found, policy_versions=versions)


def dialect_of(config: RemoteConfig, experts: ExpertLayout | None = None) -> Dialect:
    return DIALECTS[config.kind](config.endpoint.model, config.processed_logprobs, experts)


def check(config: RemoteConfig, params: SamplingParams) -> None:
    """Raises UserError that names all that is asked for and that the engine cannot give."""
    refused = dialect_of(config).refusals(params)
    if refused:
        raise UserError(f"{config.kind} at {config.root} cannot do this: " + "; ".join(refused))


def empty(prompt: tuple[int, ...], reason: StopReason) -> Completion:
    """A completion that was not to be had."""
    return Completion(prompt, (), np.zeros(0, np.float32), reason, policy_versions=np.zeros(0, np.int32))


def _is_too_long(text: str) -> bool:
    return any(
        words in text.lower() for words in ("context length", "context_length", "fill the context", "too long", "max_model_len")
    )
