"""The one seam between learning and serving: what is asked of a policy, and what it gives back. Imports no torch.

`TokenPolicy`: prompt tokens and SamplingParams in, a Completion out. Rollouts that train use it, since what was sampled is
what is trained: a completion carries all that a trainer must replay.
`ChatPolicy`: messages and tools in, one assistant message out. Synthesis and evaluation accept either; `rorqual.rollout`
holds the adapter that makes a ChatPolicy of a TokenPolicy and the chat format, and keeps the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from rorqual.errors import require


class StopReason(StrEnum):
    """Why a completion ended. A failure is a value here, never an exception that takes its siblings along."""

    STOP = "stop"  # a stop token
    LENGTH = "length"  # max_tokens, or the context's end
    ABORTED = "aborted"  # the caller withdrew it
    TOO_LONG = "too_long"  # the prompt does not fit
    OUT_OF_MEMORY = "out_of_memory"  # no cache block could be had
    CONSTRAINT = "constraint"  # a grammar admitted no further token
    UNAVAILABLE = "unavailable"  # an endpoint did not answer


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, and what to record. Counts are in tokens."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy; ties go to the lowest token id."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens of at least this share of the likeliest token's probability."""
    seed: int | None = None
    """Noise is counter-based from the seed and the position, so a request draws the same whatever its batch. None: drawn."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end the completion; the id is part of the completion's tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    """How many of the raw model's likeliest tokens to report at each position."""
    record_kept_tokens: bool = False
    record_routed_experts: bool = False
    record_selected_indices: bool = False

    def __post_init__(self) -> None:
        require(
            self,
            max_tokens=(self.max_tokens >= 0, "at least 0"),
            temperature=(self.temperature >= 0, "at least 0"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            top_k=(self.top_k >= 0, "at least 0 (0 keeps all)"),
            min_p=(0 <= self.min_p <= 1, "in [0, 1]"),
            top_logprobs=(self.top_logprobs >= 0, "at least 0"),
        )


@dataclass(frozen=True)
class KeptTokens:
    """The sampling mask, ragged: at sampled position t the kept ids are tokens[offsets[t]:offsets[t + 1]], ascending.

    tokens: int32 [sum of kept]; offsets: int64 [n + 1]. A row with offsets[t] == offsets[t + 1] kept the whole vocabulary.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def row(self, t: int) -> np.ndarray:
        return self.tokens[self.offsets[t] : self.offsets[t + 1]]


@dataclass(frozen=True)
class Completion:
    """What a TokenPolicy gives back, with all that a trainer must replay. n is the number of sampled tokens, P of prompt tokens.

    Routing and selection cover the N = P + max(n - 1, 0) tokens that went through the model: the last sampled one did not.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: np.ndarray
    """float32 [n]: natural logs under the distribution sampled from (temperature, bias, grammar, truncation, renormalised)."""
    stop_reason: StopReason
    model_logprobs: np.ndarray | None = None
    """float32 [n]: natural logs under the raw model; the API's `logprobs`."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each sampled position, (token, raw model log-prob) of the likeliest, most likely first."""
    kept_tokens: KeptTokens | None = None
    routed_experts: np.ndarray | None = None
    """int16 or int32 [N, MoE layers, experts per token]."""
    selected_indices: tuple[np.ndarray, ...] | None = None
    """For each layer that selects (full indexers), int32 [N, K] positions, ascending, -1 last."""
    temperature: float = 1.0
    policy_versions: np.ndarray | None = None
    """int32 [n]: the weights' version that sampled each token; all equal unless mixing was asked for."""
    cached_len: int = 0
    """How many prompt tokens a prefix cache spared."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Such as drafted and accepted tokens of speculative decoding, preemptions, seconds queued."""

    @property
    def policy_version(self) -> int:
        """The version of the weights that sampled the last token; -1 for an empty completion."""
        return -1 if self.policy_versions is None or not len(self.policy_versions) else int(self.policy_versions[-1])


class TokenPolicy(Protocol):
    """Token ids in, completions out: the embedded engine, or an external engine that takes and gives tokens."""

    async def complete(self, prompt_tokens: Sequence[int], params: SamplingParams) -> Completion: ...


Message = dict[str, Any]
"""An OpenAI-shaped message: role, content, and where they apply reasoning_content, tool_calls, tool_call_id, tools."""


@dataclass(frozen=True)
class ChatReply:
    """One assistant message, with the tokens behind it where the policy has them."""

    message: Message
    stop_reason: StopReason
    completion: Completion | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    """prompt_tokens, completion_tokens, and where known reasoning_tokens and cached_tokens."""


class ChatPolicy(Protocol):
    """Messages and tools in, one assistant message out: an OpenAI-compatible endpoint, a program, or an adapted TokenPolicy."""

    async def reply(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams
    ) -> ChatReply: ...
