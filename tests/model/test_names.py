"""The released names and shapes, written out again for the 671B model from the list of its tensors."""

from __future__ import annotations

from rorqual.model import ModelConfig
from rorqual.model.names import entries, fused_names

D, H, Q, L, R, I, C, E, F, V = 7168, 128, 1536, 512, 64, 64, 128, 256, 2048, 129280


def released() -> dict[str, tuple[tuple[int, ...], bool]]:
    """name -> shape, and whether a weight_scale_inv stands beside it."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {
        "model.embed_tokens.weight": ((V, D), False), "model.norm.weight": ((D,), False), "lm_head.weight": ((V, D), False),
    }  # fmt: skip
    for n in range(62):
        own = {
            "input_layernorm.weight": ((D,), False), "post_attention_layernorm.weight": ((D,), False),
            "self_attn.q_a_proj.weight": ((Q, D), True), "self_attn.q_a_layernorm.weight": ((Q,), False),
            "self_attn.q_b_proj.weight": ((24576, Q), True), "self_attn.kv_a_proj_with_mqa.weight": ((576, D), True),
            "self_attn.kv_a_layernorm.weight": ((L,), False), "self_attn.kv_b_proj.weight": ((32768, L), True),
            "self_attn.o_proj.weight": ((D, 16384), True), "self_attn.indexer.wq_b.weight": ((8192, Q), True),
            "self_attn.indexer.wk.weight": ((C, D), True), "self_attn.indexer.k_norm.weight": ((C,), False),
            "self_attn.indexer.k_norm.bias": ((C,), False), "self_attn.indexer.weights_proj.weight": ((I, D), False),
        }  # fmt: skip
        own |= swiglu("mlp.", 18432) if n < 3 else experts()
        if n == 61:
            own |= {
                "enorm.weight": ((D,), False), "hnorm.weight": ((D,), False), "eh_proj.weight": ((D, 2 * D), False),
                "embed_tokens.weight": ((V, D), False), "shared_head.norm.weight": ((D,), False),
                "shared_head.head.weight": ((V, D), False),
            }  # fmt: skip
        found |= {f"model.layers.{n}.{name}": what for name, what in own.items()}
    return found


def swiglu(prefix: str, inner: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {
        f"{prefix}gate_proj.weight": ((inner, D), True),
        f"{prefix}up_proj.weight": ((inner, D), True),
        f"{prefix}down_proj.weight": ((D, inner), True),
    }


def experts() -> dict[str, tuple[tuple[int, ...], bool]]:
    found: dict[str, tuple[tuple[int, ...], bool]] = {
        "mlp.gate.weight": ((E, D), False),
        "mlp.gate.e_score_correction_bias": ((E,), False),
    }
    found |= swiglu("mlp.shared_experts.", F)
    for e in range(E):
        found |= swiglu(f"mlp.experts.{e}.", F)
    return found


def test_names_shapes_and_what_is_quantised_are_those_of_the_release() -> None:
    ours = {entry.name: (entry.shape, entry.is_quantised) for entry in entries(ModelConfig())}
    assert ours == released()


def test_only_the_router_bias_stays_float32() -> None:
    wide = {entry.name for entry in entries(ModelConfig()) if entry.is_float32}
    assert wide == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in range(3, 62)}


def test_fused_names_stack_gate_over_up() -> None:
    found = {
        entry.name: fused_names(entry, F) for entry in entries(ModelConfig()) if entry.name.startswith("model.layers.7.mlp.")
    }
    prefix = "model.layers.7.mlp.experts."
    gate, up, down = (found[f"{prefix}200.{part}_proj.weight"] for part in ("gate", "up", "down"))
    assert gate and up and down
    assert (gate.name, gate.start, gate.stop) == (f"{prefix}gate_up_proj", 0, F)
    assert (up.name, up.start, up.stop) == (f"{prefix}gate_up_proj", F, 2 * F)
    assert (down.name, down.start, down.stop) == (f"{prefix}down_proj", 0, D)
    assert found["model.layers.7.mlp.shared_experts.up_proj.weight"] is None
