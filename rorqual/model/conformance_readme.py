"""The README that goes with golden vectors: every tensor with its shape, dtype, meaning and formula."""

from __future__ import annotations

from numpy.typing import NDArray

MEANINGS = {
    "tokens": "the input, one sequence",
    "positions": "of the tokens, from 0",
    "ties.index_query": "whole numbers",
    "ties.index_key": "whole numbers",
    "ties.index_weight": "as index_weight, of few values",
    "ties.index_score": "as index_score; row t of 12 sees the keys up to 50 - 12 + t",
    "frequencies": "RoPE under YaRN, radians per position: f = theta^(-2i/R); f (1 - ramp) + f / factor * ramp",
    "cos": "cos(position * frequency); YaRN's magnitude m(mscale) / m(mscale_all_dim) is 1 here",
    "sin": "sin(position * frequency)",
    "softmax_scale": "(nope + R)^-0.5 m^2, m = 0.1 mscale_all_dim ln(factor) + 1",
    "embedding": "rows of the embedding: the residual stream before layer 0",
    "hidden": "RMSNorm of the last layer's output: what the head reads",
    "logits": "head W hidden",
    "attn_norm": "x = RMSNorm(h) = w h / sqrt(mean(h^2) + eps): the input of attention and of the indexer",
    "q_latent": "c_q = RMSNorm(W_q_a x): the input of q_b and of the indexer's wq_b",
    "q_nope": "the first dims of each head of W_q_b c_q: not rotated",
    "q_rope": "the last dims of each head, rotated in INTERLEAVED pairs (x0, x1), (x2, x3), ..., which stay in place",
    "latent": "c = RMSNorm of the first L of W_kv_a x: what the cache holds",
    "k_rope": "the last R of W_kv_a x, rotated in interleaved pairs, not normalised: one key for all heads, in the cache",
    "index_query": "W_wq_b c_q by index heads; the FIRST R dims rotated HALF-SPLIT: pairs (x_i, x_{i + R/2})",
    "index_key": "LayerNorm(W_wk x) with weight and bias, eps 1e-6; the first R dims rotated half-split",
    "index_weight": "W_weights_proj x * I^-0.5 * C^-0.5: both constants are in it; may be negative",
    "index_score": "report eq. 1: I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s); -inf for s after t",
    "selected": "report eq. 2: the top-k of the row's scores, among equals the lowest positions; ascending, -1 last",
    "absorbed_query": "W_UK^T q_nope of each head; W_UK: the first `nope` rows of the head in kv_b",
    "absorbed_latent_output": "sum_s p_s c_s over the selected s; p = softmax((absorbed_query . c_s + q_rope . k_rope_s) scale)",
    "absorbed_head_output": "W_UV absorbed_latent_output; W_UV: the last V rows of the head in kv_b (multi-query form)",
    "lse": "natural log of sum_s exp(score) over the selected s",
    "expanded_k_nope": "W_UK c of each head",
    "expanded_v": "W_UV c of each head",
    "expanded_head_output": "multi-head form: softmax((q_nope . k_nope_s + q_rope . k_rope_s) scale) v; equals the absorbed form",
    "attention_output": "W_o of the heads side by side, before it is added to the residual stream",
    "ffn_norm": "RMSNorm of the residual stream after attention: the input of the FFN or of the router and the experts",
    "router_scores": "s = sigmoid(W_gate x)",
    "router_choice": "s + e_score_correction_bias: decides which experts, not with what weight",
    "group_scores": "the sum of the two largest router_choice of each group",
    "groups": "the best groups, ascending",
    "experts": "the largest router_choice within those groups, ascending",
    "gates": "s of the experts (without the bias) / (their sum + 1e-20) * routed_scaling_factor; in the order of `experts`",
    "routed_output": "sum_e gate_e W2_e (silu(W1_e x) * W3_e x)",
    "shared_output": "the shared expert of the same input",
    "ffn_output": "the dense FFN, or routed_output + shared_output; before it is added to the residual stream",
    "output": "the residual stream after the layer",
    "input": "eh_proj [RMSNorm(embedding of token t + 1) | RMSNorm(hidden at t)]: embedding first; t < T - 1",
}

TEXT = """# Golden vectors of the DeepSeek-V3.2 architecture

Written by `rorqual conformance`. A small random model with every mechanism of the released one, and every intermediate of a
forward over one sequence, by formulas written apart from Rorqual's own model. To compare your tensors with these:

    rorqual conformance --check YOURS            a directory of safetensors with these names, or one file
    rorqual conformance --check YOURS --against THIS_DIRECTORY

Give what you have under the names below, in any floating dtype (the tolerance follows it); selections and experts as integers
in any order within a row. `--partial` accepts that some are missing.

- `model/` is the checkpoint: Hugging Face layout, `deepseek_v32`, float32 (exact in float64 too). Layer 0 has a dense FFN,
  layer 1 experts; layer 2 is the MTP module.
- `inputs.safetensors` is what goes in, `float64.safetensors` the truth, `float32.safetensors` the same formulas in float32.
- Matrices are as in the checkpoint, y = W x. Rotated dims stay in interleaved order; transformers permutes them for MLA, which
  changes no score.
- Dims: T tokens, D model, H heads, L latent, R rope dims, I index heads, C index dim, K top-k or experts, E experts, V values.
- Cases: the forward itself has top-k 8 below its 40 tokens (rows before 8 see fewer than 8 and select all); `covering.` is
  the same forward with top-k 64, above the length, where sparse attention is dense; `ties.` is selection alone (top-k 7) on
  small whole numbers, whose scores are exact in every dtype and often equal: ties go to the lowest position.
- In the forward, scores at the last selected rank differ from the next by at least {margin:.1e} of the row's largest, so that
  float32 selects what float64 does; bf16 may not.

"""


def readme(tensors: dict[str, dict[str, NDArray]], margin: float) -> str:
    """The text, with a table of the tensors of each file."""
    lines = [TEXT.format(margin=margin)]
    for file in ("inputs", "float64"):
        title = "inputs.safetensors" if file == "inputs" else "float64.safetensors, and float32.safetensors alike"
        lines += [f"## {title}\n", "| tensor | shape | dtype | what it is |", "| --- | --- | --- | --- |"]
        for name, array in tensors[file].items():
            shape = ", ".join(map(str, array.shape))
            lines.append(f"| `{name}` | [{shape}] | {array.dtype} | {_meaning(name)} |")
        lines.append("")
    return "\n".join(lines)


def _meaning(name: str) -> str:
    return MEANINGS.get(name) or MEANINGS[name.rpartition(".")[2]]
