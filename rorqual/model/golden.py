"""The architecture once more, straight from its formulas, in numpy: the truth that conformance vectors are made of.

One sequence, whole [T, T] matrices, one head at a time; it shares no code with the model's own modules, and a test holds the
two against each other. Equation numbers are those of the DeepSeek-V3.2 report; MLA and MoE are DeepSeek-V3's.

Weights `w` have the names of the Transformer's state dict. Every function works in the dtype of its inputs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rorqual.model.config import ModelConfig

Array = NDArray[np.floating]
Arrays = dict[str, NDArray]


def run(w: Arrays, c: ModelConfig, tokens: NDArray[np.int64]) -> Arrays:
    """Every intermediate of a forward over tokens [T] at positions 0 .. T - 1, by the names that `conformance` documents."""
    dtype = w["embed.weight"].dtype
    cos, sin = rotation(c, len(tokens))
    rope = (cos.astype(dtype), sin.astype(dtype))
    out: Arrays = {"frequencies": frequencies(c).astype(dtype), "cos": rope[0], "sin": rope[1]}
    out["softmax_scale"] = np.array([softmax_scale(c)], dtype)
    h = out["embedding"] = w["embed.weight"][tokens]
    for i in range(c.n_layers):
        h = layer(w, c, i, f"layers.{i}.", h, rope, out)
    out["hidden"] = rms_norm(h, w["norm.weight"], c.norm_eps)
    out["logits"] = out["hidden"] @ w["head.weight"].T
    if c.n_mtp_layers:
        following = w["embed.weight"][tokens[1:]]
        main = (out["hidden"] if c.mtp_reads_normed else h)[:-1]
        both = [rms_norm(following, w["mtp.enorm.weight"], c.norm_eps), rms_norm(main, w["mtp.hnorm.weight"], c.norm_eps)]
        out["mtp.input"] = np.concatenate(both, 1) @ w["mtp.eh_proj.weight"].T
        h = layer(w, c, c.n_layers, "mtp.layer.", out["mtp.input"], (rope[0][:-1], rope[1][:-1]), out)
        out["mtp.logits"] = rms_norm(h, w["mtp.norm.weight"], c.norm_eps) @ w["head.weight"].T
    return out


def layer(w: Arrays, c: ModelConfig, i: int, at: str, h: Array, rope: tuple[Array, Array], out: Arrays) -> Array:
    """h + Attention(norm(h)), then h + FFN(norm(h))."""
    x = out[f"{at}attn_norm"] = rms_norm(h, w[f"{at}attn_norm.weight"], c.norm_eps)
    h = h + attention(w, c, at, x, rope, out)
    x = out[f"{at}ffn_norm"] = rms_norm(h, w[f"{at}ffn_norm.weight"], c.norm_eps)
    y = swiglu(w, f"{at}ffn.", x) if i < c.n_dense_layers else moe(w, c, at, x, out)
    out[f"{at}ffn_output"] = y
    out[f"{at}output"] = h + y
    return h + y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-6) + bias


def swiglu(w: Arrays, at: str, x: Array) -> Array:
    gate = x @ w[f"{at}w1.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f"{at}w3.weight"].T)) @ w[f"{at}w2.weight"].T


# RoPE and YaRN


def frequencies(c: ModelConfig) -> Array:
    """[R/2] in float64: theta^(-2i/R); under YaRN divided by the factor where a dim turns too slowly, with a ramp between."""
    found = []
    for i in range(c.qk_rope_head_dim // 2):
        plain = c.rope_theta ** (-2 * i / c.qk_rope_head_dim)
        if c.yarn is None:
            found.append(plain)
            continue
        low = max(math.floor(turning_dim(c, c.yarn.beta_fast)), 0)
        high = min(math.ceil(turning_dim(c, c.yarn.beta_slow)), c.qk_rope_head_dim - 1)
        ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
        found.append(plain * (1 - ramp) + plain / c.yarn.factor * ramp)
    return np.array(found)


def turning_dim(c: ModelConfig, turns: float) -> float:
    """d(r) = R ln(original / (2 pi r)) / (2 ln theta)."""
    assert c.yarn is not None
    return c.qk_rope_head_dim * math.log(c.yarn.original_max_positions / (2 * math.pi * turns)) / (2 * math.log(c.rope_theta))


def rotation(c: ModelConfig, T: int) -> tuple[Array, Array]:
    """cos and sin [T, R/2] in float64."""
    angles = np.arange(T)[:, None] * frequencies(c)[None, :]
    magnitude = mscale(c, c.yarn.mscale) / mscale(c, c.yarn.mscale_all_dim) if c.yarn else 1.0
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


def mscale(c: ModelConfig, m: float) -> float:
    return 0.1 * m * math.log(c.yarn.factor) + 1 if c.yarn and c.yarn.factor > 1 else 1.0


def softmax_scale(c: ModelConfig) -> float:
    """(nope + R)^-0.5 m^2, with m = 0.1 mscale_all_dim ln(factor) + 1 under YaRN."""
    return c.qk_head_dim**-0.5 * (mscale(c, c.yarn.mscale_all_dim) ** 2 if c.yarn else 1)


def rotate_interleaved(x: Array, rope: tuple[Array, Array]) -> Array:
    """x [T, R]: the pairs (x_0, x_1), (x_2, x_3), ... turn; they stay where they are."""
    cos, sin = rope
    y = np.empty_like(x)
    for i in range(x.shape[1] // 2):
        a, b = x[:, 2 * i], x[:, 2 * i + 1]
        y[:, 2 * i], y[:, 2 * i + 1] = a * cos[:, i] - b * sin[:, i], b * cos[:, i] + a * sin[:, i]
    return y


def rotate_half_split(x: Array, rope: tuple[Array, Array]) -> Array:
    """x [T, R]: the pairs (x_0, x_{R/2}), (x_1, x_{R/2 + 1}), ... turn."""
    cos, sin = rope
    half = x.shape[1] // 2
    y = np.empty_like(x)
    for i in range(half):
        a, b = x[:, i], x[:, i + half]
        y[:, i], y[:, i + half] = a * cos[:, i] - b * sin[:, i], b * cos[:, i] + a * sin[:, i]
    return y


# Multi-head latent attention with the lightning indexer


def attention(w: Arrays, c: ModelConfig, at: str, x: Array, rope: tuple[Array, Array], out: Arrays) -> Array:
    T, H, N, V = len(x), c.n_heads, c.qk_nope_head_dim, c.v_head_dim
    q_latent = rms_norm(x @ w[f"{at}attn.wq_a.weight"].T, w[f"{at}attn.q_norm.weight"], c.latent_norm_eps)
    q = (q_latent @ w[f"{at}attn.wq_b.weight"].T).reshape(T, H, N + c.qk_rope_head_dim)
    q_rope = np.stack([rotate_interleaved(q[:, h, N:], rope) for h in range(H)], 1)
    raw = x @ w[f"{at}attn.wkv_a.weight"].T
    latent = rms_norm(raw[:, : c.kv_lora_rank], w[f"{at}attn.kv_norm.weight"], c.latent_norm_eps)
    k_rope = rotate_interleaved(raw[:, c.kv_lora_rank :], rope)
    out |= {f"{at}q_latent": q_latent, f"{at}q_nope": q[:, :, :N], f"{at}q_rope": q_rope}
    out |= {f"{at}latent": latent, f"{at}k_rope": k_rope}
    chosen = indexer(w, c, at, x, q_latent, rope, out)
    up = w[f"{at}attn.wkv_b.weight"].reshape(H, N + V, c.kv_lora_rank)
    heads = absorbed(c, at, q[:, :, :N], q_rope, latent, k_rope, up, chosen, out)
    expanded(c, at, q[:, :, :N], q_rope, latent, k_rope, up, chosen, out)
    y = out[f"{at}attention_output"] = heads.reshape(T, H * V) @ w[f"{at}attn.wo.weight"].T
    return y


def absorbed(c: ModelConfig, at: str, q_nope, q_rope, latent, k_rope, up, chosen: list[list[int]], out: Arrays) -> Array:
    """Multi-query form: W_UK moves to the query, W_UV to the output; a head reads the latents themselves. [T, H, V]."""
    T, H, N = q_nope.shape
    scale = q_nope.dtype.type(softmax_scale(c))
    query = np.stack([q_nope[:, h] @ up[h, :N] for h in range(H)], 1)  # [T, H, L]: W_UK^T q
    mixed, lse = np.empty_like(query), np.empty_like(query[:, :, 0])
    for t in range(T):
        for h in range(H):
            s = (latent[chosen[t]] @ query[t, h] + k_rope[chosen[t]] @ q_rope[t, h]) * scale
            p, lse[t, h] = softmax(s)
            mixed[t, h] = p @ latent[chosen[t]]
    heads = np.stack([mixed[:, h] @ up[h, N:].T for h in range(H)], 1)  # [T, H, V]
    out |= {f"{at}absorbed_query": query, f"{at}absorbed_latent_output": mixed, f"{at}absorbed_head_output": heads}
    out[f"{at}lse"] = lse
    return heads


def expanded(c: ModelConfig, at: str, q_nope, q_rope, latent, k_rope, up, chosen: list[list[int]], out: Arrays) -> None:
    """Multi-head form: keys and values of every head are made from the latents. The same function."""
    T, H, N = q_nope.shape
    scale = q_nope.dtype.type(softmax_scale(c))
    k_nope = np.stack([latent @ up[h, :N].T for h in range(H)], 1)  # [T, H, N]
    v = np.stack([latent @ up[h, N:].T for h in range(H)], 1)  # [T, H, V]
    heads = np.empty_like(v)
    for t in range(T):
        for h in range(H):
            s = (k_nope[chosen[t], h] @ q_nope[t, h] + k_rope[chosen[t]] @ q_rope[t, h]) * scale
            heads[t, h] = softmax(s)[0] @ v[chosen[t], h]
    out |= {f"{at}expanded_k_nope": k_nope, f"{at}expanded_v": v, f"{at}expanded_head_output": heads}


def softmax(s: Array) -> tuple[Array, Array]:
    """Probabilities, and the natural log of the sum of exponentials."""
    e = np.exp(s - s.max())
    return e / e.sum(), s.max() + np.log(e.sum())


def indexer(w: Arrays, c: ModelConfig, at: str, x, q_latent, rope: tuple[Array, Array], out: Arrays) -> list[list[int]]:
    """Equation 1: I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s); the top-k of each row, ascending."""
    T, R = len(x), c.qk_rope_head_dim
    rotate = rotate_interleaved if c.index_rope_interleaved else rotate_half_split
    query = (q_latent @ w[f"{at}attn.indexer.wq_b.weight"].T).reshape(T, c.index_n_heads, c.index_head_dim)
    for j in range(c.index_n_heads):
        query[:, j, :R] = rotate(query[:, j, :R], rope)
    key = x @ w[f"{at}attn.indexer.wk.weight"].T
    key = layer_norm(key, w[f"{at}attn.indexer.k_norm.weight"], w[f"{at}attn.indexer.k_norm.bias"])
    key[:, :R] = rotate(key[:, :R], rope)
    constants = x.dtype.type(c.index_n_heads**-0.5 * c.index_head_dim**-0.5)
    weight = x @ w[f"{at}attn.indexer.weights_proj.weight"].T * constants
    out |= {f"{at}index_query": query, f"{at}index_key": key, f"{at}index_weight": weight}
    out[f"{at}index_score"] = index_scores(query, key, weight)
    out[f"{at}selected"], chosen = select(out[f"{at}index_score"], c.index_topk)
    return chosen


def index_scores(query: Array, key: Array, weight: Array) -> Array:
    """query [T, I, C], key [S, C], weight [T, I] -> [T, S]; row t sees keys up to S - T + t, the rest is -inf."""
    T, S = len(query), len(key)
    scores = np.full((T, S), -np.inf, query.dtype)
    for t in range(T):
        for s in range(S - T + t + 1):
            scores[t, s] = np.sum(weight[t] * np.maximum(query[t] @ key[s], 0))
    return scores


def select(scores: Array, topk: int) -> tuple[NDArray[np.int32], list[list[int]]]:
    """The top-k of each row, among equal scores those of the lowest position: int32 [T, K] ascending, -1 last; and as lists."""
    chosen = []
    for row in scores:
        seen = [s for s in range(len(row)) if row[s] > -np.inf]
        chosen.append(sorted(sorted(seen, key=lambda s: (-row[s], s))[:topk]))
    padded = [row + [-1] * (topk - len(row)) for row in chosen]
    return np.array(padded, np.int32), chosen


# Mixture of experts


def moe(w: Arrays, c: ModelConfig, at: str, x: Array, out: Arrays) -> Array:
    """y = sum_e g_e E_e(x) + SharedExperts(x)."""
    scores = 1 / (1 + np.exp(-(x @ w[f"{at}ffn.router.weight"].T)))
    choice = scores + w[f"{at}ffn.router.expert_bias"]
    group_scores, groups, experts = choose_experts(c, choice)
    gates = np.take_along_axis(scores, experts, 1)
    if c.norm_topk_prob:
        gates = gates / (gates.sum(1, keepdims=True) + c.route_eps)
    gates = gates * x.dtype.type(c.route_scale)
    routed = np.zeros_like(x)
    for t in range(len(x)):
        for k, e in enumerate(experts[t]):
            own = {f"w{i}.weight": w[f"{at}ffn.experts.w{i}"][e] for i in (1, 2, 3)}
            routed[t] += gates[t, k] * swiglu(own, "", x[t : t + 1])[0]
    shared = swiglu(w, f"{at}ffn.shared_experts.", x)
    out |= {f"{at}router_scores": scores, f"{at}router_choice": choice, f"{at}group_scores": group_scores}
    out |= {f"{at}groups": groups.astype(np.int32), f"{at}experts": experts.astype(np.int32), f"{at}gates": gates}
    out |= {f"{at}routed_output": routed, f"{at}shared_output": shared}
    return routed + shared


def choose_experts(c: ModelConfig, choice: Array) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """Group scores (the sum of a group's two best), the best groups, and within them the best experts; both ascending."""
    size = c.n_routed_experts // c.n_expert_groups
    group_scores, groups, experts = [], [], []
    for row in choice:
        of_group = [np.sort(row[g * size : (g + 1) * size])[::-1][:2].sum() for g in range(c.n_expert_groups)]
        best = sorted(sorted(range(c.n_expert_groups), key=lambda g: (-of_group[g], g))[: c.n_limited_groups])
        allowed = [e for e in range(c.n_routed_experts) if e // size in best]
        experts.append(sorted(sorted(allowed, key=lambda e: (-row[e], e))[: c.n_activated_experts]))
        group_scores.append(of_group)
        groups.append(best)
    return np.array(group_scores, choice.dtype), np.array(groups), np.array(experts)
