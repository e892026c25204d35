"""100,000 completions of three tokens from the engine, with the MTP layer's speculation and without, follow the exact joint
distribution (chi-square; the model's own full forward over every continuation), plain and truncated, and speculation changes
not one token. The same statistic rejects a distribution of slightly other temperature, so it could have failed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rorqual.engine import Engine, EngineConfig
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams

SECONDS = 300
QUICK_SECONDS = 25

V, LENGTH = 10, 3
CONFIG = ModelConfig(
    vocab_size=V, dim=32, n_layers=2, n_dense_layers=1, inter_dim=48, max_positions=64, n_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, yarn=None, index_n_heads=2, index_head_dim=16,
    index_topk=6, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=16, n_expert_groups=1, n_limited_groups=1,
    init_std=0.25,
)  # fmt: skip
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
KINDS = {"plain": {"temperature": 0.9}, "truncated": {"temperature": 1.3, "top_p": 0.9, "top_k": 8, "min_p": 0.02}}


@torch.no_grad()
def exact(model: Transformer, temperature: float, top_p: float = 1, top_k: int = V, min_p: float = 0) -> np.ndarray:
    """The probability of each completion [V ** LENGTH], by the definition of each truncation, token by token."""
    joint, tails = np.ones(1), [[]]
    for _ in range(LENGTH):
        logits = model(torch.tensor([PROMPT + tail for tail in tails]))[:, -1].double().numpy() / temperature
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        joint = (joint[:, None] * np.stack([truncated(row, top_p, top_k, min_p) for row in p])).ravel()
        tails = [[*tail, token] for tail in tails for token in range(V)]
    return joint


def truncated(p: np.ndarray, top_p: float, top_k: int, min_p: float) -> np.ndarray:
    kept: list[int] = []
    within = np.argsort(-p)[:top_k]
    for token in within:
        if p[kept].sum() < top_p * p[within].sum() and p[token] >= min_p * p.max():
            kept.append(int(token))
    q = np.zeros(V)
    q[kept] = p[kept] / p[kept].sum()
    return q


def excess(counts: np.ndarray, probability: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean; rare completions share a cell."""
    expected = counts.sum() * probability
    assert counts[probability == 0].sum() == 0, "a completion of probability 0 was drawn"
    rare = expected < 8
    seen, due = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    freedom = len(due) - 1 - (due[-1] == 0)
    statistic = ((seen - due) ** 2)[due > 0] / due[due > 0]
    return float((statistic.sum() - freedom) / np.sqrt(2 * freedom))


def drawn(model: Transformer, count: int, kind: dict[str, Any], speculative: bool) -> tuple[np.ndarray, float]:
    """How often each completion came [V ** LENGTH], and the acceptance rate."""
    config = EngineConfig(block_size=4, cache_tokens=16384, max_running=512, record_routing=False, speculative=speculative)
    engine, counts = Engine(model, config), np.zeros(V**LENGTH, dtype=np.int64)
    for low in range(0, count, 2048):
        params = [SamplingParams(max_tokens=LENGTH, seed=seed, **kind) for seed in range(low, min(low + 2048, count))]
        for done in engine.generate([PROMPT] * len(params), params):
            counts[int("".join(map(str, done.tokens)))] += 1
    return counts, engine.counters.acceptance_rate


def main(quick: bool) -> dict[str, Any]:
    count, model, figures = 6_000 if quick else 100_000, Transformer(CONFIG, seed=8), {}
    for name, kind in KINDS.items():
        probability = exact(model, **kind)
        plain, _ = drawn(model, count, kind, speculative=False)
        guessed, rate = drawn(model, count, kind, speculative=True)
        assert np.array_equal(plain, guessed), "speculation changed what was drawn"
        assert 0 < rate < 1, f"accepted and rejected drafts are both wanted, found a rate of {rate}"
        off = excess(plain, exact(model, **kind | {"temperature": kind["temperature"] + 0.2}) + 1e-300)
        figures[name] = {"draws": count, "chi_square_excess": excess(plain, probability), "acceptance_rate": rate,
                         "excess_at_temperature_plus_0.2": off}  # fmt: skip
        print(name, figures[name], flush=True)
        assert abs(figures[name]["chi_square_excess"]) < 4, figures
        assert off > 5, f"a wrong temperature should be noticed: {figures}"
    return figures
