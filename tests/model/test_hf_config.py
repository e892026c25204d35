"""config.json is read in both spellings as the same model, written back without loss, and refused by file and field."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig, YarnConfig
from rorqual.model.hf_config import from_hf, model_type, read_config, rorqual_only, to_hf

# What the released DeepSeek-V3.2 config.json holds, field by field (spec 1.1).
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v32", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                                            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.44.2",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 99, "dim": 48, "n_layers": 4, "n_dense_layers": 1, "inter_dim": 64, "max_positions": 256, "n_heads": 3,
    "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 7, "n_routed_experts": 6, "n_activated_experts": 2,
    "moe_inter_dim": 16, "n_expert_groups": 3, "n_limited_groups": 2,
}  # fmt: skip


def small(**fields: Any) -> ModelConfig:
    """A small config; without indexers their sizes mean nothing, and stay the default."""
    config = {**SMALL, **fields}
    return ModelConfig(**{k: v for k, v in config.items() if config.get("indexers") != "none" or not k.startswith("index_")})


def changed(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**RELEASED, **fields}.items() if value is not ...}


def test_the_released_file_is_the_default_config() -> None:
    assert from_hf(RELEASED, "config.json") == ModelConfig(init_std=0.02)


def test_both_spellings_are_the_same_model() -> None:
    rope = {**RELEASED["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    current = changed(
        rope_scaling=..., rope_theta=..., rope_parameters=rope, first_k_dense_replace=..., n_routed_experts=...,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * 58, num_local_experts=256, num_nextn_predict_layers=..., num_mtp_layers=1,
    )  # fmt: skip
    assert from_hf(current, "config.json") == from_hf(RELEASED, "config.json")


@pytest.mark.parametrize("spelling", ["older", "current"])
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "deepseek_v32"),
        ({"yarn": None, "rope_theta": 500.0}, "deepseek_v32"),
        ({"yarn": YarnConfig(4.0, 64, mscale=0.7, mscale_all_dim=0.5), "index_hadamard": True}, "deepseek_v32"),
        ({"indexers": "none", "q_lora_rank": None}, "deepseek_v3"),
        ({"indexers": "none", "tie_embeddings": True, "n_shared_experts": 0, "norm_topk_prob": False}, "deepseek_v3"),
        ({"index_rope_interleaved": True}, "glm_moe_dsa"),
        ({"index_rope_interleaved": True, "indexers": ("full", "shared", "shared", "full")}, "glm_moe_dsa"),
        ({"q_lora_rank": None}, "rorqual"),
        ({"indexers": ("none", "full", "full", "shared")}, "rorqual"),
        ({"indexers": "none", "latent_norm_eps": 1e-5, "route_eps": 1e-12, "n_mtp_layers": 0}, "rorqual"),
    ],
)
def test_what_is_written_is_read_as_the_same_config(tmp_path: Path, fields: dict[str, Any], kind: str, spelling: Any) -> None:
    config = small(**fields)
    written = to_hf(config, "bf16", spelling)
    assert (written["model_type"], bool(rorqual_only(config))) == (kind, kind == "rorqual")
    assert ("rope_parameters" in written) == (spelling == "current")
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == config


OTHER_VALUES: dict[str, Any] = {
    "vocab_size": 98, "dim": 49, "n_layers": 5, "n_dense_layers": 2, "inter_dim": 65, "norm_eps": 1e-5, "latent_norm_eps": 1e-5,
    "max_positions": 257, "init_std": 0.3, "tie_embeddings": True, "n_heads": 5, "q_lora_rank": 21, "kv_lora_rank": 25,
    "qk_nope_head_dim": 13, "qk_rope_head_dim": 6, "v_head_dim": 11, "rope_theta": 77.0, "yarn": YarnConfig(2.0, 9, 31.0, 2.0),
    "indexers": ("full", "none", "full", "full"), "index_n_heads": 5, "index_head_dim": 32, "index_topk": 8,
    "index_rope_interleaved": True, "index_hadamard": True, "n_routed_experts": 9, "n_shared_experts": 2,
    "n_activated_experts": 3, "moe_inter_dim": 17, "n_expert_groups": 2, "n_limited_groups": 3, "route_scale": 1.5,
    "norm_topk_prob": False, "route_eps": 1e-10, "n_mtp_layers": 0, "mtp_reads_normed": False,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_field_survives_being_written_and_read(name: str) -> None:
    config = small(**{name: OTHER_VALUES[name]})
    assert config != small()
    assert from_hf(json.loads(json.dumps(to_hf(config, "bf16"))), "config.json") == config


@pytest.mark.parametrize("spelling", ["older", "current"])
@pytest.mark.parametrize("fields", [{}, {"yarn": None}, {"indexers": "none"}, {"index_rope_interleaved": True}])
def test_transformers_reads_the_same_numbers(tmp_path: Path, fields: dict[str, Any], spelling: Any) -> None:
    from transformers import AutoConfig

    config = small(**fields)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, "float32", spelling)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == model_type(config)
    rope = theirs.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("yarn" if config.yarn else "default", config.rope_theta)
    if config.yarn:
        assert (rope["factor"], rope["original_max_position_embeddings"]) == (40.0, 4096)
    found = (theirs.hidden_size, theirs.n_routed_experts, theirs.num_experts_per_tok, theirs.n_group, theirs.topk_group)
    assert found == (config.dim, config.n_routed_experts, 2, 3, 2)
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == config


def test_glm_schedules_of_shared_layers() -> None:
    glm = changed(model_type="glm_moe_dsa", num_hidden_layers=7, indexer_rope_interleave=...)
    by_freq = from_hf({**glm, "index_topk_freq": 3, "index_skip_topk_offset": 2}, "f")
    assert by_freq.layer_indexers == ("full", "full", "shared", "shared", "full", "shared", "shared")
    assert by_freq.index_rope_interleaved
    assert from_hf({**glm, "index_topk_pattern": "FSSFSSF"}, "f").layer_indexers[3:5] == ("full", "shared")
    assert from_hf(glm, "f").indexers == "full"
    assert not from_hf({**glm, "indexer_rope_interleave": False}, "f").index_rope_interleaved


def test_glm_schedules_equal_transformers() -> None:
    from transformers import GlmMoeDsaConfig

    for freq, offset in [(1, 2), (2, 1), (3, 2), (4, 5)]:
        theirs = GlmMoeDsaConfig(num_hidden_layers=11, index_topk_freq=freq, index_skip_topk_offset=offset)
        glm = changed(model_type="glm_moe_dsa", num_hidden_layers=11, index_topk_freq=freq, index_skip_topk_offset=offset)
        assert list(from_hf(glm, "f").layer_indexers) == theirs.indexer_types


def test_yarn_without_mscales_means_what_transformers_means() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    yarn = from_hf(changed(rope_scaling=scaling), "f").yarn
    assert yarn == YarnConfig(4.0, 64, mscale=1.0, mscale_all_dim=0.0)


BAD = {
    "unknown architecture": ({"model_type": "llama"}, "model_type", "deepseek_v32 or", "'llama'"),
    "no architecture": ({"model_type": ...}, "model_type", "deepseek_v32", "nothing"),
    "missing field": ({"kv_lora_rank": ...}, "kv_lora_rank", "missing", ""),
    "wrong type": ({"hidden_size": "7168"}, "hidden_size", "an integer", "'7168'"),
    "boolean for a number": ({"index_topk": True}, "index_topk", "an integer", "True"),
    "null for a number": ({"hidden_size": None}, "hidden_size", "an integer", "None"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "a number", "nan"),
    "out of range": ({"num_attention_heads": 0, "num_key_value_heads": 0}, "num_attention_heads", "at least 1", "found 0"),
    "groups do not divide": ({"n_group": 7}, "n_group", "divisor of n_routed_experts=256", "found 7"),
    "too many experts": ({"num_experts_per_tok": 200}, "num_experts_per_tok", "in [1, 128]", "found 200"),
    "more dims rotated than there are": ({"index_head_dim": 32}, "index_head_dim", "qk_rope_head_dim=64", "found 32"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act", "silu", "'gelu'"),
    "softmax router": ({"scoring_func": "softmax"}, "scoring_func", "sigmoid", "'softmax'"),
    "biases": ({"attention_bias": True}, "attention_bias", "False", "True"),
    "grouped key heads": ({"num_key_value_heads": 8}, "num_key_value_heads", "128", "found 8"),
    "another rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type", "default or yarn", "'linear'"),
    "bad factor": (
        {"rope_scaling": {**RELEASED["rope_scaling"], "factor": 0.5}}, "rope_scaling.factor", "at least 1", "0.5"),
    "half a rope": (
        {"rope_scaling": {**RELEASED["rope_scaling"], "mscale": None}}, "rope_scaling.mscale", "a number", "None"),
    "half of the rope dims": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1", "found 0.5"),
    "half of the rope dims, current spelling": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor", "1", "found 0.5"),
    "a bound YaRN without rounding": (
        {"rope_scaling": {**RELEASED["rope_scaling"], "truncate": False}}, "rope_scaling.truncate", "True", "False"),
    "dense layers after sparse": (
        {"mlp_layer_types": ["sparse", *["dense"] * 60]}, "mlp_layer_types", "the dense ones first", "sparse"),
    "unknown indexer": (
        {"model_type": "glm_moe_dsa", "indexer_types": ["half"] * 61}, "indexer_types", "none/full/shared", "'half'"),
    "shared before full": (
        {"model_type": "glm_moe_dsa", "indexer_types": ["shared"] * 61}, "indexer_types", "follows a full one", "shared"),
    "wrong number of indexers": (
        {"model_type": "glm_moe_dsa", "indexer_types": ["full"]}, "indexer_types", "num_hidden_layers=61", "full"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_named_with_what_was_expected_and_found(name: str) -> None:
    fields, field, expected, found = BAD[name]
    with pytest.raises(UserError, match=re.escape(f"/somewhere/config.json: {field}: ")) as error:
        from_hf(changed(**fields), "/somewhere/config.json")
    assert expected in str(error.value) and found in str(error.value)


def test_all_fields_out_of_range_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        from_hf(changed(hidden_size=0, v_head_dim=-1), "config.json")
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == ["hidden_size", "v_head_dim"]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path / "absent")
