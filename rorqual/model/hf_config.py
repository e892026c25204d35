"""Hugging Face's config.json <-> ModelConfig: `deepseek_v32`, `deepseek_v3` and `glm_moe_dsa`, in two spellings.

The older spelling (the released files) has `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`, and for
experts `mlp_layer_types` and `num_local_experts`. Both are read; which one is written is a choice (see `to_hf`).

A model that none of the three architectures can express is written as model_type `rorqual`: the same fields and a few more.
It opens in Rorqual only; `rorqual_only` says why.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import FieldErrors, UserError
from rorqual.model.config import IndexerKind, ModelConfig, YarnConfig

FILE = "config.json"
ARCHITECTURES = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "rorqual": "RorqualForCausalLM",
}
Spelling = Literal["older", "current"]
LATENT_NORM_EPS = 1e-6
ROUTE_EPS = 1e-20
"""Constants of the Hugging Face code, which its config cannot express."""

BLOCK_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

# ours -> theirs. A field without a default must be in the file: a guessed shape is a wrong model.
SHAPE = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers", "inter_dim": "intermediate_size",
    "max_positions": "max_position_embeddings", "n_heads": "num_attention_heads", "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}  # fmt: skip
INDEX = {"index_n_heads": "index_n_heads", "index_head_dim": "index_head_dim", "index_topk": "index_topk"}
EXPERTS = {
    "n_routed_experts": "n_routed_experts", "n_activated_experts": "num_experts_per_tok",
    "moe_inter_dim": "moe_intermediate_size", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "n_shared_experts": "n_shared_experts",
}  # fmt: skip
SCALARS = {
    "norm_eps": "rms_norm_eps", "init_std": "initializer_range", "route_scale": "routed_scaling_factor",
    "latent_norm_eps": "latent_norm_eps", "route_eps": "route_eps", "rope_theta": "rope_theta",
}  # fmt: skip
FLAGS = {
    "tie_embeddings": "tie_word_embeddings", "norm_topk_prob": "norm_topk_prob",
    "index_rope_interleaved": "indexer_rope_interleave", "index_hadamard": "index_hadamard",
    "mtp_reads_normed": "mtp_reads_normed",
}  # fmt: skip
OTHERS = {"n_dense_layers": "first_k_dense_replace", "n_mtp_layers": "num_nextn_predict_layers", "indexers": "indexer_types"}
THEIRS = {**SHAPE, **INDEX, **EXPERTS, **SCALARS, **FLAGS, **OTHERS}
YARN = {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim", "original_max_positions": "original_max_position_embeddings"}  # fmt: skip
ALIASES = {
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "n_group": ("num_expert_group",),
}
NULLABLE = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}
"""Fields that may be null, and what that means."""

FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1,),
}
"""Fields that change the computation, of which the architecture here has one value."""


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config of a checkpoint directory, or of a config.json itself."""
    path = config_path(path)
    return from_hf(read_json(path), str(path))


def config_path(path: str | os.PathLike) -> Path:
    """PATH/config.json, or PATH itself where it is a file. Raises UserError where there is none."""
    path = Path(path)
    found = path / FILE if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{found}: no such file; expected a checkpoint directory with a {FILE}, or such a file")
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of the fields of a config.json. `where` names the file in errors.

    Raises UserError that names the file and the field: an unknown architecture, a missing field, one of a wrong type or out
    of range, or one that asks for what this architecture doesn't have.
    """
    fields = _Fields(values, where)
    model_type = fields.choice("model_type", tuple(ARCHITECTURES))
    for name, accepted in FIXED.items():
        if values.get(name) is not None:
            fields.choice(name, accepted)
    ours = {name: fields.integer(theirs) for name, theirs in SHAPE.items()}
    ours |= {"norm_eps": fields.number("rms_norm_eps"), "init_std": fields.number("initializer_range", 0.02)}
    ours |= {"latent_norm_eps": fields.number("latent_norm_eps", LATENT_NORM_EPS)}
    ours |= {"tie_embeddings": fields.boolean("tie_word_embeddings", False)}
    ours |= {"n_mtp_layers": fields.integer("num_nextn_predict_layers", 0)}
    ours |= {"mtp_reads_normed": fields.boolean("mtp_reads_normed", True)}
    ours |= _rope(fields) | _experts(fields) | _indexers(fields, model_type)
    if values.get("num_key_value_heads") is not None:
        fields.choice("num_key_value_heads", (ours["n_heads"],))  # fewer would be another attention: MLA has one latent for all
    return _checked(fields, ours)


def _checked(fields: _Fields, ours: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**ours)
    except FieldErrors as error:
        raise UserError("\n".join(fields.line(_spelled(name), _spelled(text)) for name, text in error.problems.items())) from None


def _spelled(text: str) -> str:
    """Our field names in a message, replaced by those of the file."""
    return re.sub(r"\b[a-z_]+\b", lambda word: THEIRS.get(word[0], word[0]), text)


def _experts(fields: _Fields) -> dict[str, Any]:
    n_layers = fields.integer("num_hidden_layers")
    n_dense = min(_dense_layers(fields, n_layers), n_layers)
    if n_dense == n_layers and not fields.has("n_routed_experts"):
        return {"n_dense_layers": n_dense, "n_mtp_layers": 0}
    ours: dict[str, Any] = {name: fields.integer(theirs) for name, theirs in EXPERTS.items()}
    ours["n_dense_layers"] = n_dense
    ours["route_scale"] = fields.number("routed_scaling_factor")
    ours["route_eps"] = fields.number("route_eps", ROUTE_EPS)
    ours["norm_topk_prob"] = fields.boolean("norm_topk_prob", True)
    return ours


def _dense_layers(fields: _Fields, n_layers: int) -> int:
    """`first_k_dense_replace`, or the dense layers that lead `mlp_layer_types`."""
    kinds = fields.values.get("mlp_layer_types")
    if kinds is None:
        return fields.integer("first_k_dense_replace")
    n_dense = list(kinds).count("dense")
    if list(kinds) != ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense):
        fields.fail("mlp_layer_types", f"{n_layers} of dense/sparse, the dense ones first", kinds)
    return n_dense


def _indexers(fields: _Fields, model_type: str) -> dict[str, Any]:
    kinds = _indexer_kinds(fields, model_type)
    if kinds == "none" or all(kind == "none" for kind in kinds):
        return {"indexers": "none"}
    return {
        "indexers": kinds,
        "index_rope_interleaved": fields.boolean("indexer_rope_interleave", model_type == "glm_moe_dsa"),
        "index_hadamard": fields.boolean("index_hadamard", False),
        **{name: fields.integer(theirs) for name, theirs in INDEX.items()},
    }


def _indexer_kinds(fields: _Fields, model_type: str) -> IndexerKind | tuple[IndexerKind, ...]:
    if model_type == "deepseek_v3":
        return "none"
    kinds = _listed_kinds(fields) if model_type != "deepseek_v32" else None
    if kinds is None:
        return "full"
    if bad := [kind for kind in kinds if kind not in ("none", "full", "shared")]:
        fields.fail("indexer_types", "a list of none/full/shared", bad[0])
    return kinds[0] if len(set(kinds)) == 1 and kinds[0] == "full" else tuple(kinds)


def _listed_kinds(fields: _Fields) -> list | None:
    """`indexer_types`, or what GLM's schedule fields mean: a pattern of F and S, or every freq-th layer from offset - 1 on."""
    values, n_layers = fields.values, fields.integer("num_hidden_layers")
    if (kinds := values.get("indexer_types") or values.get("index_topk_pattern")) is not None:
        if isinstance(kinds, str):
            kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in kinds]
        if not isinstance(kinds, list) or len(kinds) != n_layers:
            fields.fail("indexer_types", f"a list of num_hidden_layers={n_layers} kinds", kinds)
        return kinds
    if values.get("index_topk_freq") is None:
        return None
    freq, offset = max(fields.integer("index_topk_freq"), 1), fields.integer("index_skip_topk_offset", 2)
    return ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(n_layers)]


def _rope(fields: _Fields) -> dict[str, Any]:
    """rope_theta and YaRN from `rope_parameters` (current) or `rope_theta` and `rope_scaling` (older)."""
    name = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.values.get(name) or {}
    if not isinstance(rope, Mapping):
        fields.fail(name, "an object", rope)
    inner = _Fields(rope, fields.where, f"{name}.")
    theta = inner.number("rope_theta") if "rope_theta" in rope else fields.number("rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "partial_rotary_factor" in rope:
        inner.choice("partial_rotary_factor", (1,))
    if kind == "default":
        return {"rope_theta": theta, "yarn": None}
    if kind != "yarn":
        inner.fail("rope_type" if "rope_type" in rope else "type", "default or yarn", kind)
    return {"rope_theta": theta, "yarn": _yarn(inner, fields)}


def _yarn(rope: _Fields, fields: _Fields) -> YarnConfig:
    """What transformers makes of the same fields: without both mscales, cos and sin carry m(1) and the scale is plain."""
    for name, accepted in {"truncate": (True,), "attention_factor": (None,)}.items():
        if name in rope.values:
            rope.choice(name, accepted)
    original = rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    default = None if rope.values.get("factor") is not None else fields.integer("max_position_embeddings") / original
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if mscale_all_dim and not mscale:
        rope.fail("mscale", "a number beside mscale_all_dim", rope.values.get("mscale"))
    try:
        return YarnConfig(
            factor=rope.number("factor", default),
            original_max_positions=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=mscale if mscale_all_dim else 1.0,
            mscale_all_dim=mscale_all_dim,
        )
    except FieldErrors as error:
        raise UserError("\n".join(rope.line(YARN.get(name, name), text) for name, text in error.problems.items())) from None


def rorqual_only(config: ModelConfig) -> list[str]:
    """Why no other software can open this model: what none of the three Hugging Face architectures has. Empty if one can."""
    kinds = set(config.layer_indexers)
    reasons = []
    if config.has_indexer and config.q_lora_rank is None:
        reasons.append("q_lora_rank is none beside an indexer")
    if "none" in kinds and len(kinds) > 1:
        reasons.append("only some layers have an indexer")
    if "shared" in kinds and not config.index_rope_interleaved:
        reasons.append("layers share selections made with half-split index RoPE")
    if config.latent_norm_eps != LATENT_NORM_EPS:
        reasons.append(f"latent_norm_eps is {config.latent_norm_eps:g}, not {LATENT_NORM_EPS:g}")
    if config.route_eps != ROUTE_EPS:
        reasons.append(f"route_eps is {config.route_eps:g}, not {ROUTE_EPS:g}")
    return reasons


def model_type(config: ModelConfig) -> str:
    """The Hugging Face architecture that computes what this config says; `rorqual` where none does."""
    if rorqual_only(config):
        return "rorqual"
    if not config.has_indexer:
        return "deepseek_v3"
    return "glm_moe_dsa" if config.index_rope_interleaved else "deepseek_v32"


def to_hf(config: ModelConfig, dtype: str, spelling: Spelling = "older") -> dict[str, Any]:
    """The fields of config.json. dtype: float32, bf16 or fp8 (block FP8, whose other tensors are bf16).

    spelling: older as in the released files (every engine reads it), or current as transformers 5 writes.
    """
    kind = model_type(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "num_key_value_heads": config.n_heads,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "num_nextn_predict_layers": config.n_mtp_layers,
        **({} if config.mtp_reads_normed else {"mtp_reads_normed": False}),
        **_experts_to_hf(config),
        **_indexers_to_hf(config, kind),
        **_rope_to_hf(config, spelling),
        "torch_dtype" if spelling == "older" else "dtype": "float32" if dtype == "float32" else "bfloat16",
    }
    return values | ({"quantization_config": dict(BLOCK_FP8)} if dtype == "fp8" else {})


def _experts_to_hf(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in EXPERTS.items()}
    values |= {
        "first_k_dense_replace": config.n_dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.route_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return values | ({"route_eps": config.route_eps} if config.route_eps != ROUTE_EPS else {})


def _indexers_to_hf(config: ModelConfig, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.latent_norm_eps != LATENT_NORM_EPS:
        values["latent_norm_eps"] = config.latent_norm_eps
    if not config.has_indexer:
        return values | ({"indexer_types": ["none"] * config.n_layers} if kind == "rorqual" else {})
    values |= {theirs: getattr(config, ours) for ours, theirs in INDEX.items()}
    if config.index_hadamard:
        values["index_hadamard"] = True
    if kind != "deepseek_v32":
        values |= {
            "indexer_types": list(config.layer_indexers),
            "indexer_rope_interleave": config.index_rope_interleaved,
        }
    return values


def _rope_to_hf(config: ModelConfig, spelling: Spelling) -> dict[str, Any]:
    yarn = {theirs: getattr(config.yarn, ours) for ours, theirs in YARN.items()} if config.yarn else {}
    if spelling == "older":
        return {"rope_theta": config.rope_theta, "rope_scaling": {"type": "yarn", **yarn} if yarn else None}
    return {"rope_parameters": {"rope_type": "yarn" if yarn else "default", "rope_theta": config.rope_theta, **yarn}}


class _Fields:
    """The fields of a JSON object, read with their types, errors naming file and field."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix

    def integer(self, name: str, default: int | None = None) -> Any:
        """An integer; null where the field may be null."""
        value = self._get(name, default)
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and name in NULLABLE)):
            self.fail(name, "an integer", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(name, "a number", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def choice(self, name: str, accepted: tuple[Any, ...]) -> Any:
        value = self._get(name, None) if name in self.values else None
        if value not in accepted:
            self.fail(name, " or ".join(map(str, accepted)), value if name in self.values else "nothing")
        return value

    def has(self, name: str) -> bool:
        return any(key in self.values for key in (name, *ALIASES.get(name, ())))

    def fail(self, name: str, expected: str, found: Any) -> None:
        raise UserError(self.line(name, f"expected {expected}, found {found!r}"))

    def line(self, name: str, text: str) -> str:
        return f"{self.where}: {self.prefix}{name}: {text}"

    def _get(self, name: str, default: Any) -> Any:
        present = next((key for key in (name, *ALIASES.get(name, ())) if key in self.values), None)
        if present is not None:
            value = self.values[present]
            return NULLABLE.get(name, default) if value is None else value
        if default is None and name not in ("n_group", "topk_group"):
            raise UserError(self.line(name, "missing"))
        return NULLABLE.get(name, default) if default is None else default
