"""From logits to tokens, their log-probs, and the sets they were drawn from.

The distribution sampled from is the model's after bias, temperature and truncation, renormalised; the log-prob of a sampled
token is its natural logarithm, and the kept set is recorded so that a trainer renormalises over the same tokens (the paper's
Keep Sampling Mask). All rows of a step are computed together, in float64, but every operation works along a row, so that a
row's token and log-prob are the same bits in any batch.

Noise is counter-based: one uniform number for each (request seed, position), whatever came before, so a request that is
preempted, recomputed or drafted for speculatively draws the same token there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from rorqual.engine.philox import uniforms
from rorqual.policy import SamplingParams

TILE_LOGITS = 1 << 16
"""Logits computed at once: 512 KiB of float64."""

NO_NUMBERS = "the model's logits are not numbers: its weights have diverged, or its dtype overflows"


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token. kept: int32 ids ascending, or None where the whole vocabulary was kept."""

    token: int
    logprob: float
    model_logprob: float
    kept: np.ndarray | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row is to be drawn with."""

    params: SamplingParams
    seed: int
    position: int
    """Of the token to draw, among the request's sampled ones."""
    allowed: Tensor | None = None
    """bool [V], the tokens a grammar admits here; None admits all."""


def sample(logits: Tensor, params: SamplingParams, seed: int, position: int, allowed: Tensor | None = None) -> Sampled | None:
    """`sample_rows` of one row, logits [V]."""
    return sample_rows(logits[None], [Draw(params, seed, position, allowed)])[0]


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> list[Sampled | None]:
    """Draw one token for each row of logits [N, V] (any float dtype, the raw model's). None where nothing is admitted.

    Raises FloatingPointError for logits that are not numbers.
    """
    tile = max(1, TILE_LOGITS // max(1, logits.shape[1]))
    sampled: list[Sampled | None] = []
    for low in range(0, len(draws), tile):
        raw = np.ascontiguousarray(logits[low : low + tile].detach().cpu().double().numpy())
        sampled += _sample_tile(raw, draws[low : low + tile])
    return sampled


def _sample_tile(raw: np.ndarray, draws: Sequence[Draw]) -> list[Sampled | None]:
    top = raw.max(1, keepdims=True)
    shift = top + np.log(np.exp(raw - top).sum(1, keepdims=True))
    if not np.isfinite(shift).all():
        raise FloatingPointError(NO_NUMBERS)
    kept = kept_weights(raw, draws)
    tokens, index = kept.draw(_noise(draws)), np.arange(len(draws))
    drawn, plain = kept.logprobs_of(tokens).tolist(), (raw[index, tokens] - shift[:, 0]).tolist()
    sets = kept.sets()
    return [
        Sampled(token, drawn[row], plain[row], sets[row], _top(raw[row], shift[row, 0], draws[row].params.top_logprobs))
        if kept.admitted[row]
        else None
        for row, token in enumerate(tokens.tolist())
    ]


def _noise(draws: Sequence[Draw]) -> np.ndarray:
    """[N]; what a greedy row gets makes no difference."""
    return uniforms([each.seed for each in draws], [each.position for each in draws])


@dataclass(frozen=True)
class KeptWeights:
    """Distributions of N rows that are not normalised yet, float64 [N, V]."""

    logs: np.ndarray
    """-inf outside the kept set; the likeliest token's is 0."""
    weights: np.ndarray
    """exp(logs)."""
    admitted: np.ndarray
    """bool [N]: False where bias and grammar leave no token; the rest of such a row means nothing."""

    @cached_property
    def cumulative(self) -> np.ndarray:
        return np.cumsum(self.weights, axis=1)

    def draw(self, noise: np.ndarray) -> np.ndarray:
        """The token at `noise` [N] in each row's cumulative distribution, over ids ascending; never one of probability 0: [N]."""
        tokens = (self.cumulative <= (noise * self.cumulative[:, -1])[:, None]).sum(1)
        last = self.weights.shape[1] - 1 - (self.weights[:, ::-1] > 0).argmax(1)
        return np.minimum(tokens, last)

    def logprobs_of(self, tokens: np.ndarray) -> np.ndarray:
        """The natural log of the probability of one token of each row, [N]."""
        return self.logs[np.arange(len(tokens)), tokens] - np.log(self.cumulative[:, -1])

    def logprobs(self) -> np.ndarray:
        return self.logs - np.log(self.cumulative[:, -1:])

    def sets(self) -> list[np.ndarray | None]:
        """The ids of each row's kept set, int32 ascending; None where it is the whole vocabulary."""
        finite = np.isfinite(self.logs)
        sizes, V = finite.sum(1).tolist(), finite.shape[1]
        ids, ends = np.flatnonzero(finite), itertools.accumulate(sizes)
        return [
            None if size == V else (ids[end - size : end] - row * V).astype(np.int32)
            for row, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]


def distribution(logits: np.ndarray, params: SamplingParams, allowed: Tensor | None = None) -> np.ndarray | None:
    """The natural logs of the distribution sampled from, float64 [V], -inf outside the kept set; None if nothing is admitted."""
    kept = kept_weights(logits[None].astype(np.float64), [Draw(params, 0, 0, allowed)])
    return kept.logprobs()[0] if kept.admitted[0] else None


def kept_weights(raw: np.ndarray, draws: Sequence[Draw]) -> KeptWeights:
    """The distributions that rows of raw logits [N, V] are sampled from.

    The order is bias, grammar, temperature, top-k, top-p, min-p, each on the distribution the one before left. Greedy
    (temperature 0) keeps the likeliest token alone, ties to the lowest id. Ties at a truncation's edge: the lowest ids stay.
    """
    logits = _biased(raw, draws)
    top = logits.max(1, keepdims=True)
    admitted = np.isfinite(top[:, 0])
    temperature = np.array([each.params.temperature for each in draws])
    logs = np.where(admitted[:, None], logits - np.where(np.isfinite(top), top, 0), 0)
    if (temperature != 1).any():
        logs /= np.where(temperature > 0, temperature, 1)[:, None]
    for row in np.flatnonzero(temperature == 0):
        best = logs[row].argmax()
        logs[row], logs[row, best] = -np.inf, 0
    weights = np.exp(logs)
    truncated = np.flatnonzero([bool(each.params.temperature) and _truncates(each.params) for each in draws])
    if len(truncated):
        dropped = ~_truncation(weights[truncated], [draws[row].params for row in truncated.tolist()])
        logs[truncated] = np.where(dropped, -np.inf, logs[truncated])
        weights[truncated] = np.where(dropped, 0, weights[truncated])
    return KeptWeights(logs, weights, admitted)


def _biased(logits: np.ndarray, draws: Sequence[Draw]) -> np.ndarray:
    """With each row's bias and grammar applied; a copy where there are any."""
    if not any(each.params.logit_bias or each.allowed is not None for each in draws):
        return logits
    logits = logits.copy()
    for row, each in enumerate(draws):
        for token, bias in each.params.logit_bias.items():
            logits[row, token] += bias
        if each.allowed is not None:
            logits[row, ~each.allowed.cpu().numpy()] = -np.inf
    return logits


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _truncation(weights: np.ndarray, params: Sequence[SamplingParams]) -> np.ndarray:
    """bool [n, V]: what top-k, top-p and min-p keep of weights [n, V]."""
    descending = np.ascontiguousarray(np.sort(weights, axis=1)[:, ::-1])
    counts = _kept_counts(descending, params)
    edge = np.take_along_axis(descending, counts[:, None] - 1, axis=1)
    kept = weights >= edge
    for row in np.flatnonzero(kept.sum(1) > counts):  # more stand at the edge than may stay
        tied = weights[row] == edge[row]
        kept[row] &= ~tied | (tied.cumsum() <= tied.sum() - (kept[row].sum() - counts[row]))
    return kept


def _kept_counts(descending: np.ndarray, params: Sequence[SamplingParams]) -> np.ndarray:
    """How many of each row's descending weights stay: at least one, none of weight 0."""
    counts = np.count_nonzero(descending, axis=1)
    top_k = np.array([each.top_k for each in params])
    counts = np.where(top_k > 0, np.minimum(counts, top_k), counts)
    top_p = np.array([each.top_p for each in params])
    if (top_p < 1).any():
        mass = np.cumsum(descending, axis=1)
        # The smallest set whose mass reaches top_p of what is left; the token that crosses the line is in it.
        line = top_p[:, None] * np.take_along_axis(mass, counts[:, None] - 1, axis=1)
        counts = np.where(top_p < 1, np.minimum(counts, (mass < line).sum(1) + 1), counts)
    min_p = np.array([each.min_p for each in params])
    if min_p.any():
        counts = np.minimum(counts, (descending >= min_p[:, None] * descending[:, :1]).sum(1))
    return np.maximum(counts, 1)


def _top(logits: np.ndarray, shift: float, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of a row and their log-probs."""
    if not count:
        return ()
    order = np.argsort(-logits, kind="stable")[:count]
    return tuple((int(token), float(logits[token] - shift)) for token in order)
