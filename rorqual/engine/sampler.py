"""From logits to a token, its log-prob, and the set it was drawn from.

The distribution sampled from is the model's after bias, temperature and truncation, renormalised; the log-prob of a sampled
token is its natural logarithm, and the kept set is recorded so that a trainer renormalises over the same tokens (the paper's
Keep Sampling Mask). Everything is computed a row at a time from that row's logits alone, in float64, so a token never
depends on its batch.

Noise is counter-based: one uniform number for each (request seed, position), whatever came before, so a request that is
preempted, recomputed or drafted for speculatively draws the same token there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.policy import SamplingParams


@dataclass(frozen=True)
class Sampled:
    """One drawn token. kept: int32 ids ascending, or None where the whole vocabulary was kept."""

    token: int
    logprob: float
    model_logprob: float
    kept: np.ndarray | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to a request's seed and the position of the token to draw."""
    generator = np.random.Philox(key=seed % 2**64, counter=position)
    return float(generator.random_raw() >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, seed: int, position: int, allowed: Tensor | None = None) -> Sampled | None:
    """Draw one token from logits [V] (any float dtype, the raw model's).

    allowed: bool [V], the tokens a grammar admits here; None admits all. Gives None where nothing is admitted.
    """
    raw = logits.detach().to(torch.float64).cpu().numpy()
    model_logprobs = _log_softmax(raw)
    logprobs = distribution(raw, params, None if allowed is None else allowed.cpu().numpy())
    if logprobs is None:
        return None
    token = draw(logprobs, 0.0 if params.temperature == 0 else uniform(seed, position))
    finite = np.isfinite(logprobs)
    return Sampled(
        token,
        float(logprobs[token]),
        float(model_logprobs[token]),
        None if finite.all() else np.flatnonzero(finite).astype(np.int32),
        _top(model_logprobs, params.top_logprobs),
    )


def distribution(logits: np.ndarray, params: SamplingParams, allowed: np.ndarray | None = None) -> np.ndarray | None:
    """The natural logs of the distribution sampled from, float64 [V]; -inf outside the kept set. None if nothing is admitted.

    The order is bias, grammar, temperature, top-k, top-p, min-p, each on the distribution the one before left. Greedy
    (temperature 0) keeps the likeliest token alone, ties to the lowest id. Ties at a truncation's edge: the lowest ids stay.
    """
    logits = logits.astype(np.float64, copy=True)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if allowed is not None:
        logits[~allowed] = -np.inf
    if not np.isfinite(logits).any():
        return None
    if params.temperature == 0:
        return _point_mass(int(np.argmax(logits)), len(logits))
    logprobs = _log_softmax(logits / params.temperature)
    if not _truncates(params):
        return logprobs
    order = np.argsort(-logprobs, kind="stable")  # likeliest first, ties by ascending id
    count = _kept_count(np.exp(logprobs[order]), params)
    kept = np.full_like(logprobs, -np.inf)
    kept[order[:count]] = logprobs[order[:count]]
    return _log_softmax(kept)


def draw(logprobs: np.ndarray, noise: float) -> int:
    """The token at `noise` in the cumulative distribution, over ids ascending; never one of probability 0."""
    cumulative = np.cumsum(np.exp(logprobs))
    token = int(np.searchsorted(cumulative, noise * cumulative[-1], side="right"))
    last = int(np.flatnonzero(np.isfinite(logprobs))[-1])
    return min(token, last)


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _kept_count(probabilities: np.ndarray, params: SamplingParams) -> int:
    """How many of the descending probabilities stay: at least one, none of probability 0."""
    count = int(np.count_nonzero(probabilities))
    if params.top_k:
        count = min(count, params.top_k)
    if params.top_p < 1:
        mass = np.cumsum(probabilities[:count])
        # The smallest set whose mass reaches top_p of what is left; the token that crosses the line is in it.
        count = min(count, int(np.searchsorted(mass, params.top_p * mass[-1], side="left")) + 1)
    if params.min_p:
        count = int(np.count_nonzero(probabilities[:count] >= params.min_p * probabilities[0]))
    return max(count, 1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _point_mass(token: int, size: int) -> np.ndarray:
    logprobs = np.full(size, -np.inf)
    logprobs[token] = 0.0
    return logprobs


def _top(logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    order = np.argsort(-logprobs, kind="stable")[:count]
    return tuple((int(token), float(logprobs[token])) for token in order)
