"""What one attempt at a task left behind, and the samples that training makes of it.

A trajectory is a list of turns: what the policy sampled in each, and what the world answered. For training it becomes a chain
of samples. As long as each turn's prompt only extends what was there before (tool results appended), all turns are one
sample. Where the context was rewritten (a new user message drops earlier reasoning; a context strategy discards rounds) a new
sample begins, so that every token is trained in the context it was sampled in, and nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from rorqual.policy import Completion, KeptTokens, Message
from rorqual.tasks.verdict import Verdict


class End(StrEnum):
    """Why a trajectory ended. All but ANSWERED and SUBMITTED leave the task unfinished; none of them raises."""

    ANSWERED = "answered"  # the policy's last message called no tool
    SUBMITTED = "submitted"  # the task took its answer through a tool
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # the budget of sampled tokens
    MAX_CALLS = "max_calls"
    TIME = "time"
    CONTEXT = "context"  # the next prompt does not fit the window, and no strategy was to make room
    CUT = "cut"  # a completion ran into its own limit before it ended
    MALFORMED = "malformed"  # a completion that is no message
    POLICY_FAILED = "policy_failed"  # the policy gave no completion: an endpoint gone, memory out
    WORLD_FAILED = "world_failed"  # the episode could not be opened, or died


@dataclass(frozen=True)
class Observation:
    """What the world answered to one tool call."""

    call_id: str
    name: str
    content: str
    seconds: float = 0.0
    failure: str = ""
    """Empty, or what kept the tool from answering: timeout, crashed, too_long (its answer was cut)."""


@dataclass(frozen=True)
class Turn:
    """One message of the policy, in the context it saw, and what came back."""

    message: Message
    completion: Completion | None
    """None for a policy that shows no tokens (an endpoint): such a trajectory can be judged, not trained on."""
    observations: tuple[Observation, ...] = ()
    context_tokens: int = 0
    """Length of the prompt that was sampled from."""
    sampled_tokens: int = 0
    is_reset: bool = False
    """A context strategy rewrote the messages before this turn."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Trajectory:
    """One attempt. `steps` counts turns across resets: what the budgets and the paper's figure count."""

    task_id: str
    sample: int
    """Which of the group's attempts."""
    turns: tuple[Turn, ...]
    end: End
    verdict: Verdict | None = None
    """None where no verdict could be had; never a silent zero."""
    messages: tuple[Message, ...] = ()
    """The whole conversation as it went, nothing discarded."""
    detail: str = ""
    """Of a failure, for a person."""
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.turns)

    @property
    def answered(self) -> bool:
        return self.end in (End.ANSWERED, End.SUBMITTED)

    @property
    def sampled_tokens(self) -> int:
        return sum(turn.sampled_tokens for turn in self.turns)

    @property
    def num_calls(self) -> int:
        return sum(len(turn.observations) for turn in self.turns)

    @property
    def policy_versions(self) -> tuple[int, int]:
        """The oldest and the newest version of the weights that sampled a token; (-1, -1) where there is none."""
        versions = [t.completion.policy_versions for t in self.turns if t.completion and len(t.completion.tokens)]
        known = [v for v in versions if v is not None and len(v)]
        return (min(int(v.min()) for v in known), max(int(v.max()) for v in known)) if known else (-1, -1)


@dataclass(frozen=True)
class Sample:
    """A sequence to train on: N tokens that went through the sampler in one context, n of them its own.

    The log-prob, mask and kept set at i belong to predicting tokens[i]. Routing and selection at i are those of computing
    token i; a row of -1 was not recorded (the last token never went through the model) and is decided anew.
    """

    tokens: np.ndarray
    """int64 [N]."""
    mask: np.ndarray
    """bool [N]: sampled by the policy."""
    logprobs: np.ndarray
    """float32 [N]: the sampler's, 0 where not sampled."""
    versions: np.ndarray
    """int32 [N]: of the weights that sampled the token, -1 where not sampled."""
    kept: KeptTokens
    """Rows for all N positions; empty rows keep the whole vocabulary."""
    temperature: float
    routed_experts: np.ndarray | None = None
    """int [N, MoE layers, K]."""
    selected_indices: tuple[np.ndarray, ...] | None = None
    """For each selecting layer int32 [N, K]."""

    def __len__(self) -> int:
        return len(self.tokens)


def samples(trajectory: Trajectory) -> list[Sample]:
    """The trajectory's chain of samples, in order. Turns without a completion end the chain (there is nothing to train).

    A completion without tokens (refused for its length, say) computed nothing and recorded nothing: it is left out.
    """
    chains: list[list[Completion]] = []
    for turn in trajectory.turns:
        if turn.completion is None:
            break
        if not turn.completion.tokens:
            continue
        if chains and _extends(chains[-1][-1], turn.completion):
            chains[-1].append(turn.completion)
        else:
            chains.append([turn.completion])
    return [_join(chain) for chain in chains]


def _extends(before: Completion, after: Completion) -> bool:
    seen = (*before.prompt_tokens, *before.tokens)
    return after.prompt_tokens[: len(seen)] == seen


def _join(chain: Sequence[Completion]) -> Sample:
    """One sample of completions each of which continues the one before; each brings what was recorded as it sampled."""
    last = chain[-1]
    tokens = np.array([*last.prompt_tokens, *last.tokens], dtype=np.int64)
    mask = np.zeros(len(tokens), dtype=bool)
    logprobs, versions = np.zeros(len(tokens), np.float32), np.full(len(tokens), -1, np.int32)
    rows: list[np.ndarray] = [np.empty(0, np.int32)] * len(tokens)
    for completion in chain:
        at = len(completion.prompt_tokens)
        mine = slice(at, at + len(completion.tokens))
        mask[mine], logprobs[mine] = True, completion.logprobs
        if completion.policy_versions is not None:
            versions[mine] = completion.policy_versions
        if completion.kept_tokens is not None:
            rows[mine] = [completion.kept_tokens.row(t) for t in range(len(completion.tokens))]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    kept = KeptTokens(np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32), offsets)
    routed = _joined_rows([completion.routed_experts for completion in chain], len(tokens))
    layers = [completion.selected_indices for completion in chain]
    selected = None
    if all(layer is not None for layer in layers):
        selected = tuple(_joined_rows(list(each), len(tokens)) for each in zip(*layers, strict=True))  # type: ignore[arg-type]
    return Sample(tokens, mask, logprobs, versions, kept, last.temperature, routed, selected)  # type: ignore[arg-type]


def _joined_rows(records: Sequence[np.ndarray | None], length: int) -> Any:
    """Records of computed tokens, one after another: each completion's own rows from where the one before ended."""
    present = [record for record in records if record is not None]
    if len(present) < len(records) or not present:
        return None
    joined = np.full((length, *present[0].shape[1:]), -1, dtype=present[0].dtype)
    done = 0
    for record in present:
        joined[done : len(record)] = record[done:]
        done = max(done, len(record))
    return joined
