"""DeepSeek-V3.2 written a second time, straight from its formulas: one sequence, float64, whole [T, S] matrices, no module.

An independent truth for values and gradients: it shares no code with rorqual.model or rorqual.kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.model import ModelConfig

Weights = dict[str, Tensor]


@dataclass
class NaiveRun:
    logits: Tensor
    mtp_logits: Tensor | None = None
    index_losses: dict[int, Tensor] = field(default_factory=dict)
    """[T] by layer."""
    selections: dict[int, Tensor] = field(default_factory=dict)
    """bool [T, S] by layer."""


def naive_run(w: Weights, c: ModelConfig, tokens: Tensor, index_loss: str = "none", sparse: bool = True) -> NaiveRun:
    """tokens [T] -> everything, with gradients to the weights `w` (float64)."""
    run = NaiveRun(torch.empty(0))
    x, selected = w["embed.weight"][tokens], None
    for i, kind in enumerate(c.layer_indexers):
        x, selected = layer(w, c, i, f"layers.{i}", kind, x, selected, run, index_loss, sparse)
    hidden = norm(x, w["norm.weight"], c.norm_eps)
    run.logits = hidden @ w["head.weight"].T
    if c.n_mtp_layers:
        following = w["embed.weight"][torch.cat([tokens[1:], tokens[:1] * 0])]
        h = hidden if c.mtp_reads_normed else x
        joined = torch.cat([norm(following, w["mtp.enorm.weight"], c.norm_eps), norm(h, w["mtp.hnorm.weight"], c.norm_eps)], -1)
        y = joined @ w["mtp.eh_proj.weight"].T
        y, _ = layer(w, c, c.n_layers, "mtp.layer", c.mtp_indexer, y, None, run, index_loss, sparse)
        run.mtp_logits = norm(y, w["mtp.norm.weight"], c.norm_eps) @ w["head.weight"].T
    return run


def layer(
    w: Weights, c: ModelConfig, i: int, at: str, kind: str, x: Tensor, selected, run: NaiveRun, index_loss: str, sparse: bool
):
    x_in = norm(x, w[f"{at}.attn_norm.weight"], c.norm_eps)
    y, selected = attention(w, c, i, f"{at}.attn", kind, x_in, selected, run, index_loss, sparse)
    x = x + y
    x_in = norm(x, w[f"{at}.ffn_norm.weight"], c.norm_eps)
    return x + (swiglu(w, f"{at}.ffn", x_in) if i < c.n_dense_layers else moe(w, c, f"{at}.ffn", x_in)), selected


def attention(
    w: Weights, c: ModelConfig, i: int, at: str, kind: str, x: Tensor, handed, run: NaiveRun, index_loss: str, sparse: bool
):
    T, H = x.shape[0], c.n_heads
    c_q = x
    if c.q_lora_rank is not None:
        c_q = norm(x @ w[f"{at}.wq_a.weight"].T, w[f"{at}.q_norm.weight"], c.latent_norm_eps)
    q = (c_q @ w[f"{at}.{'wq' if c.q_lora_rank is None else 'wq_b'}.weight"].T).view(T, H, -1)
    raw = x @ w[f"{at}.wkv_a.weight"].T
    latent = norm(raw[:, : c.kv_lora_rank], w[f"{at}.kv_norm.weight"], c.latent_norm_eps)
    k_rope = rope(raw[:, c.kv_lora_rank :], c, interleaved=True)
    up = (latent @ w[f"{at}.wkv_b.weight"].T).view(T, H, -1)
    k = torch.cat([up[..., : c.qk_nope_head_dim], k_rope[:, None].expand(T, H, -1)], -1)
    q = torch.cat([q[..., : c.qk_nope_head_dim], rope(q[..., c.qk_nope_head_dim :], c, interleaved=True)], -1)
    scale = c.qk_head_dim**-0.5
    if c.yarn:
        scale *= (0.1 * c.yarn.mscale_all_dim * math.log(c.yarn.factor) + 1) ** 2
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    mask = handed
    if kind == "full":
        index = index_scores(w, c, f"{at}.indexer", x.detach(), c_q.detach()).masked_fill(~causal, -torch.inf)
        mask = top_columns(index.detach(), c.index_topk) & causal
        run.selections[i] = mask
        if index_loss != "none":
            over = mask if index_loss == "restricted" else causal
            target = scores.detach().masked_fill(~over, -torch.inf).softmax(-1).mean(0)
            predicted = index.masked_fill(~over, -torch.inf).log_softmax(-1).masked_fill(~over, 0)
            run.index_losses[i] = torch.where(over, torch.xlogy(target, target) - target * predicted, 0.0).sum(1)
    seen = mask if sparse and kind != "none" else causal
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("hts,shd->thd", p, up[..., c.qk_nope_head_dim :])
    return out.reshape(T, -1) @ w[f"{at}.wo.weight"].T, mask


def index_scores(w: Weights, c: ModelConfig, at: str, x: Tensor, c_q: Tensor) -> Tensor:
    T, R = x.shape[0], c.qk_rope_head_dim
    q = (c_q @ w[f"{at}.wq_b.weight"].T).view(T, c.index_n_heads, -1)
    k = x @ w[f"{at}.wk.weight"].T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    k = k * w[f"{at}.k_norm.weight"] + w[f"{at}.k_norm.bias"]
    q = torch.cat([rope(q[..., :R], c, c.index_rope_interleaved), q[..., R:]], -1)
    k = torch.cat([rope(k[..., :R], c, c.index_rope_interleaved), k[..., R:]], -1)
    heads = (x @ w[f"{at}.weights_proj.weight"].T) * (c.index_n_heads * c.index_head_dim) ** -0.5
    return torch.einsum("tis,ti->ts", torch.einsum("tic,sc->tis", q, k).relu(), heads)


def moe(w: Weights, c: ModelConfig, at: str, x: Tensor) -> Tensor:
    s = (x @ w[f"{at}.router.weight"].T).sigmoid()
    choice = s.detach() + w[f"{at}.router.expert_bias"]
    y = swiglu(w, f"{at}.shared_experts", x) if c.n_shared_experts else torch.zeros_like(x)
    out = []
    for t in range(len(x)):
        chosen = brute_force_experts(choice[t].tolist(), c)
        g = s[t, chosen]
        g = (g / g.sum() if c.norm_topk_prob else g) * c.route_scale
        parts = [
            w[f"{at}.experts.w2"][e] @ (silu(w[f"{at}.experts.w1"][e] @ x[t]) * (w[f"{at}.experts.w3"][e] @ x[t])) for e in chosen
        ]
        out.append(sum(gate * part for gate, part in zip(g, parts, strict=True)))
    return y + torch.stack(out)


def brute_force_experts(choice: list[float], c: ModelConfig) -> list[int]:
    """Sort and pick in plain Python; equal scores go to the lower index."""
    size = c.n_routed_experts // c.n_expert_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(c.n_expert_groups)]
    if c.n_limited_groups < c.n_expert_groups:
        best = sorted(range(len(groups)), key=lambda g: (-sum(sorted(groups[g], reverse=True)[:2]), g))[: c.n_limited_groups]
    else:
        best = list(range(len(groups)))
    eligible = [e for g in best for e in range(g * size, (g + 1) * size)]
    return sorted(sorted(eligible, key=lambda e: (-choice[e], e))[: c.n_activated_experts])


def swiglu(w: Weights, at: str, x: Tensor) -> Tensor:
    return (silu(x @ w[f"{at}.w1.weight"].T) * (x @ w[f"{at}.w3.weight"].T)) @ w[f"{at}.w2.weight"].T


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def top_columns(scores: Tensor, k: int) -> Tensor:
    """bool [T, S]: the k largest of each row, the leftmost among equals."""
    order = torch.argsort(-scores, dim=1, stable=True)[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def rope(x: Tensor, c: ModelConfig, interleaved: bool) -> Tensor:
    """x [T, ..., R] turned as complex numbers, row t by position t."""
    R = x.shape[-1]
    pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : R // 2], x[..., R // 2 :])
    z = torch.complex(*(part.contiguous() for part in pairs))
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * torch.tensor(
        [frequency(i, c) for i in range(R // 2)], dtype=torch.float64
    )
    turned = z * torch.polar(torch.ones_like(angles), angles).view(x.shape[0], *(1,) * (x.dim() - 2), R // 2)
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def frequency(i: int, c: ModelConfig) -> float:
    R, theta = c.qk_rope_head_dim, c.rope_theta
    f = theta ** (-2 * i / R)
    if not c.yarn:
        return f
    at = lambda turns: R * math.log(c.yarn.original_max_positions / (2 * math.pi * turns)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(at(c.yarn.beta_fast)), 0), min(math.ceil(at(c.yarn.beta_slow)), R - 1)
    ramp = min(max((i - low) / max(high - low, 1e-3), 0), 1)
    return f * (1 - ramp) + f / c.yarn.factor * ramp
