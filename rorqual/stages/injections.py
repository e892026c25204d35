"""A sampler that disagrees with its trainer on purpose, in five ways, each of its own strength.

The sampler's weights are the trainer's, changed; so what differs is known exactly, and everything else is equal.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.sampler import Draw, Sampled, sample_rows
from rorqual.errors import require
from rorqual.model.call import EXPANDED
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.policy import Completion, KeptTokens, SamplingParams, StopReason

INJECTIONS = ("staleness", "precision", "truncation", "routing", "selection")


@dataclass(frozen=True)
class Strengths:
    """How much of each disagreement. What a strength amounts to on these weights is measured in every run."""

    staleness: int = 16
    """Optimiser steps on one batch of rollouts (1: none). Rollouts and steps in all stay the same."""
    precision: int = 1
    """Mantissa bits that the sampler's matrices keep: 3 are those of FP8 E4M3, 1 is that of FP4 E2M1."""
    truncation: float = 0.6
    """top-p of the sampler."""
    routing: float = 0.5
    """Standard deviation of noise on the sampler's expert biases, which move the choice of experts and not their gates."""
    selection: float = 1.0
    """Noise in the sampler's indexers, as a share of each matrix's standard deviation."""

    def __post_init__(self) -> None:
        require(
            self,
            staleness=(self.staleness >= 1, "at least 1"),
            precision=(1 <= self.precision <= 23, "in [1, 23]"),
            truncation=(0 < self.truncation <= 1, "in (0, 1]"),
            routing=(self.routing >= 0, "at least 0"),
            selection=(self.selection >= 0, "at least 0"),
        )


def disagree(sampler: Transformer, injected: Sequence[str], strengths: Strengths, seed: Sequence[int]) -> None:
    """Change a sampler's weights, which are the trainer's, in place. Noise is drawn anew from the seed."""
    noise = torch.Generator().manual_seed(int(np.random.default_rng(list(seed)).integers(2**62)))
    with torch.no_grad():
        for name, tensor in sampler.state_dict().items():
            if "routing" in injected and name.endswith("expert_bias"):
                tensor.add_(torch.randn(tensor.shape, generator=noise) * strengths.routing)
            if "selection" in injected and ".indexer." in name and tensor.dim() == 2:
                tensor.add_(torch.randn(tensor.shape, generator=noise) * strengths.selection * tensor.std())
            if "precision" in injected and tensor.dim() >= 2:
                tensor.copy_(rounded(tensor, strengths.precision))


def rounded(x: Tensor, bits: int) -> Tensor:
    """x with `bits` mantissa bits beside the leading one, to nearest; the exponent's range is not limited."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0 ** (bits + 1)).round() / 2.0 ** (bits + 1), exponent)


@dataclass
class ForwardSampler:
    """Samples by whole forwards, all prompts at once: for short answers quicker than a cache, and the same distribution.

    It returns what the engine returns: ids, log-probs, kept sets, experts and selections of every computed token.
    """

    model: Transformer
    version: int = 0

    @classmethod
    def of(cls, model: Transformer) -> ForwardSampler:
        return cls(copy.deepcopy(model).eval().requires_grad_(False))

    def load(self, weights: Transformer, version: int) -> None:
        self.model.load_state_dict(weights.state_dict())
        self.version = version

    @torch.no_grad()
    def complete(self, prompts: np.ndarray, params: SamplingParams, seeds: Sequence[int]) -> list[Completion]:
        """prompts int64 [n, P] -> n completions of params.max_tokens tokens each; seeds [n] are of their noise."""
        tokens, trace = torch.from_numpy(prompts), Trace()
        drawn: list[list[Sampled]] = [[] for _ in prompts]
        for position in range(params.max_tokens):
            is_last = position + 1 == params.max_tokens
            trace = Trace(routed_experts=is_last, selected_indices=is_last)
            logits = self.model(tokens, trace=trace, mode=EXPANDED)[:, -1]
            for own, one in zip(drawn, sample_rows(logits, [Draw(params, seed, position) for seed in seeds]), strict=True):
                assert one is not None, "no grammar forbids anything here"
                own.append(one)
            tokens = torch.cat([tokens, torch.tensor([[own[-1].token] for own in drawn])], 1)
        experts, selected = self._records(trace, len(prompts))
        return [self._completion(prompts[i], drawn[i], params, experts[i], [s[i] for s in selected]) for i in range(len(prompts))]

    def _records(self, trace: Trace, rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Of the last forward, which saw all tokens but the last: [n, N, MoE layers, K] and for each layer [n, N, K]."""
        experts = torch.stack([trace.experts[layer] for layer in sorted(trace.experts)], 1)
        selected = [trace.selected[layer] for layer in sorted(trace.selected)]
        return experts.unflatten(0, (rows, -1)).numpy().astype(np.int16), [s.unflatten(0, (rows, -1)).numpy() for s in selected]

    def _completion(
        self,
        prompt: np.ndarray,
        drawn: Sequence[Sampled],
        params: SamplingParams,
        experts: np.ndarray,
        selected: list[np.ndarray],
    ) -> Completion:
        rows = [np.empty(0, np.int32) if one.kept is None else one.kept for one in drawn]
        kept = KeptTokens(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64))
        return Completion(
            tuple(prompt.tolist()), tuple(one.token for one in drawn), np.array([one.logprob for one in drawn], np.float32),
            StopReason.STOP, kept_tokens=kept, routed_experts=experts, selected_indices=tuple(selected),
            temperature=params.temperature, policy_versions=np.full(len(drawn), self.version, np.int32),
        )  # fmt: skip
