"""A request on its way through the engine: what it asked for, how far it is, and which cache blocks hold it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.sampler import Sampled
from rorqual.policy import SamplingParams, StopReason

Constraint = Callable[[list[int]], Any]
"""From the tokens sampled so far to the tokens admitted next: a bool tensor [V], or None for all. Made outside the engine
(a JSON schema's grammar, say) and handed in."""


@dataclass(eq=False)
class Request:
    """Filled by its maker down to `constraint`, by the scheduler (`blocks`, `computed_len`), and by the engine (the rest)."""

    number: int
    """The order of arrival; the scheduler serves lower numbers first and preempts higher ones."""
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    seed: int
    constraint: Constraint | None = None

    blocks: list[int] = field(default_factory=list)
    computed_len: int = 0
    """How many of `tokens` have their activations in the cache."""
    names: list[bytes] = field(default_factory=list)
    """The chain hashes of its full blocks so far; empty again when the weights change."""
    awaited: bytes | None = None
    """The block that it waits for, since another request is computing it."""
    cached_len: int = 0
    """How many prompt tokens the prefix cache spared when the request was first admitted."""
    preemptions: int = 0

    tokens: list[int] = field(default_factory=list)
    """The prompt and all tokens sampled so far."""
    sampled: list[Sampled] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """The weights' version that sampled each token."""
    draft: int | None = None
    """The next token as the MTP layer guesses it; it is computed along with the last sampled one, and kept where it was right."""
    drafted: int = 0
    accepted: int = 0
    stop_reason: StopReason | None = None
    records: tuple[Any, Any] = (None, None)
    """Routed experts and selected indices, once it has ended."""
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt_tokens, *self.tokens]

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - len(self.prompt_tokens)

    @property
    def remaining_len(self) -> int:
        """Known tokens whose activations are still to be computed: 1 in decode, more in prefill and after a preemption."""
        return len(self.tokens) - self.computed_len

    @property
    def is_finished(self) -> bool:
        return self.stop_reason is not None
