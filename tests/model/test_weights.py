"""Checkpoints: transformers' open here and ours open there, every dtype and layout keeps the weights, nothing is half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import UserError
from rorqual.model import Transformer, load_model
from rorqual.model.weights import save_model
from rorqual.model.writing import convert
from tests.model.small_models import random_tokens, small_model
from tests.model.test_against_transformers import DENSE, FEW_HEADS, SPARSE
from tests.model.test_against_transformers import GLM as GLM_FIELDS
from tests.model.test_against_transformers import INDEX as INDEX_FIELDS
from tests.model.test_against_transformers import SMALL as SMALL_FIELDS
from tests.model.transformers_peer import CLASSES, YARN, our_config, random_peer, same_weights

PEER: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "max_position_embeddings": 512, "rope_parameters": YARN,
}  # fmt: skip
INDEX = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 16}
GLM = {"indexer_types": ["full", "shared", "full"], **INDEX}
FIELDS = {"deepseek_v32": INDEX, "deepseek_v3": {}, "glm_moe_dsa": GLM}
WIDE = {"dim": 136, "inter_dim": 200, "kv_lora_rank": 130, "index_head_dim": 32, "moe_inter_dim": 144, "q_lora_rank": 50}
"""Sizes with edge blocks of FP8 in both dims."""


def assert_same_weights(found: Transformer, expected: Transformer, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor is the expected one as `dtype` holds it, bit for bit."""
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        held = theirs[name] if name.endswith("expert_bias") else theirs[name].to(dtype)
        assert torch.equal(tensor, held.to(tensor.dtype)), name


@pytest.mark.parametrize("original_format", [True, False], ids=["per-expert names", "fused names"])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_what_transformers_writes_opens_here(tmp_path: Path, kind: str, original_format: bool) -> None:
    peer = random_peer(kind, {**PEER, **FIELDS[kind]})
    peer.save_pretrained(tmp_path, max_shard_size="60KB", save_original_format=original_format)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    model = load_model(tmp_path, "float32")
    assert_same_weights(model, same_weights(peer))
    tokens = random_tokens(2, 45, 131)
    torch.testing.assert_close(model(tokens), peer(input_ids=tokens).logits, rtol=0, atol=1e-4)


EVERY_PEER = [
    *(("deepseek_v32", {**INDEX_FIELDS, **fields}) for fields in (*SPARSE.values(), *FEW_HEADS.values())),
    *(("deepseek_v3", fields) for fields in DENSE.values()),
    *(("glm_moe_dsa", {**INDEX_FIELDS, **fields}) for fields in GLM_FIELDS.values()),
]
"""The configurations of which test_against_transformers compares the logits."""


@pytest.mark.parametrize(("kind", "fields"), EVERY_PEER)
def test_weights_and_config_go_from_transformers_here_and_back_bit_for_bit(tmp_path: Path, kind: str, fields: Any) -> None:
    import transformers

    peer = random_peer(kind, {**SMALL_FIELDS, **fields})
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    model = load_model(tmp_path / "theirs", "float32")
    assert_same_weights(model, same_weights(peer))
    index = {} if model.config.has_indexer else {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    free = {"max_positions": 512, "init_std": 0.08, "indexers": model.config.indexers, **index}
    assert model.config.layer_indexers == our_config(peer).layer_indexers
    assert model.config == dataclasses.replace(our_config(peer), **free)
    save_model(model, tmp_path / "ours", "float32", shard_bytes=100_000)
    again = getattr(transformers, CLASSES[kind][1]).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in peer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", ["released", "fused"])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_what_we_write_opens_in_transformers(tmp_path: Path, kind: str, layout: Any) -> None:
    import transformers

    model = same_weights(random_peer(kind, {**PEER, **FIELDS[kind]}))
    model = _with_mtp(model)
    save_model(model, tmp_path / "ours", "float32", shard_bytes=60_000, layout=layout)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 5
    peer, info = getattr(transformers, CLASSES[kind][1]).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    peer.config._experts_implementation = "eager"
    tokens = random_tokens(2, 45, 131, seed=3)
    torch.testing.assert_close(peer(input_ids=tokens).logits, model(tokens), rtol=0, atol=1e-4)


EVEN: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "kv_lora_rank": 128, "q_lora_rank": 128,
    "qk_rope_head_dim": 128, "qk_nope_head_dim": 32, "v_head_dim": 32, "vocab_size": 131,
}  # fmt: skip
"""Multiples of 128: transformers dequantises no edge blocks on a CPU."""


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_transformers_dequantises_our_fp8_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    import transformers

    index = {**FIELDS[kind], "index_head_dim": 128} if FIELDS[kind] else {}
    save_model(same_weights(random_peer(kind, {**PEER, **EVEN, **index})), tmp_path / "m", "fp8")
    peer, info = getattr(transformers, CLASSES[kind][1]).from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(load_model(tmp_path / "m", "float32"), same_weights(peer.float()))


def _with_mtp(model: Transformer) -> Transformer:
    """The same main model beside a random MTP layer."""
    grown = Transformer(dataclasses.replace(model.config, n_mtp_layers=1), seed=5).eval()
    grown.load_state_dict(model.state_dict(), strict=False)
    return grown


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"indexers": "none"},
    "no MTP": {"n_mtp_layers": 0},
    "tied embeddings": {"tie_embeddings": True},
    "no query latent": {"q_lora_rank": None},
    "shared selections": {"indexers": ("full", "shared", "shared"), "index_rope_interleaved": True},
    "indexers in some layers": {"indexers": ("none", "full", "shared")},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2, "n_dense_layers": 0},
    "all dense": {"n_dense_layers": 3, "n_mtp_layers": 0},
}


@pytest.mark.parametrize("layout", ["released", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading_keeps_every_bit_and_the_config(tmp_path: Path, name: str, layout: Any) -> None:
    model = small_model(**CONFIGS[name])
    saved = save_model(model, tmp_path / "m", "float32", shard_bytes=20_000, layout=layout)
    assert len(saved.files) > 2 and saved.weight_bytes == sum(_sizes(tmp_path / "m"))
    loaded = load_model(tmp_path / "m", "float32")
    assert_same_weights(loaded, model)
    loaded_config = loaded.config
    if name == "dense":  # sizes of indexers that are not there mean nothing
        assert not loaded_config.has_indexer
    else:
        assert loaded_config == model.config
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    if model.config.tie_embeddings:
        assert loaded.head.weight is loaded.embed.weight


def _sizes(directory: Path) -> list[int]:
    return [tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]


@pytest.mark.gpu
def test_loading_to_a_gpu_gives_the_same_bits_there(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m", "fp8")
    model = load_model(tmp_path / "m", "bf16", "cuda")
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert_same_weights(model.cpu(), load_model(tmp_path / "m", "bf16"), torch.bfloat16)


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


def test_bf16_is_written_and_loaded_as_rounding_once(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m", "bf16")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)}
    assert_same_weights(load_model(tmp_path / "m", torch.float32), model, torch.bfloat16)
    narrow = load_model(tmp_path / "m", torch.bfloat16)
    assert narrow.embed.weight.dtype == torch.bfloat16
    assert narrow.layers[1].ffn.router.expert_bias.dtype == torch.float32


def block_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of the released weights, block by block: values, scales, dequantised."""
    rows, columns = weight.shape
    values, restored = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            amax = max(weight[block].abs().max().item(), 1e-4)
            scale = 1.0
            while amax / scale > 448:
                scale *= 2
            while amax / (scale / 2) <= 448:
                scale /= 2
            values[block] = (weight[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            restored[block] = values[block].float() * scale
            scales[i, j] = scale
    return values, scales, restored


QUANTISED = ("_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")


def is_quantised(name: str) -> bool:
    """Spec 1.6: not embeddings, head, norms, router, index weights, eh_proj."""
    return name.endswith(QUANTISED) and not name.endswith(("indexer.weights_proj.weight", "eh_proj.weight"))


def test_fp8_follows_the_formula_with_edge_blocks(tmp_path: Path) -> None:
    model = small_model(**WIDE)
    save_model(model, tmp_path / "wide", "float32")
    save_model(model, tmp_path / "fp8", "fp8", shard_bytes=100_000)
    plain = load_file(tmp_path / "wide" / "model.safetensors")
    stored = {k: v for file in (tmp_path / "fp8").glob("*.safetensors") for k, v in load_file(file).items()}
    loaded = _released(load_model(tmp_path / "fp8", "float32"), tmp_path / "back")
    edges = 0
    for name, weight in plain.items():
        if not is_quantised(name):
            assert stored[name].dtype == (torch.float32 if name.endswith("bias") and "gate" in name else torch.bfloat16), name
            assert torch.equal(loaded[name], stored[name].float())
            continue
        values, scales, restored = block_fp8(weight)
        assert torch.equal(stored[name].view(torch.uint8), values.view(torch.uint8)), name
        assert torch.equal(stored[f"{name}_scale_inv"], scales), name
        assert torch.equal(loaded[name], restored), name
        edges += scales.numel() > 1 and weight.shape[0] % 128 != 0 and weight.shape[1] % 128 != 0
    assert edges > 3
    fields = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert (fields["quant_method"], fields["weight_block_size"], fields["scale_fmt"]) == ("fp8", [128, 128], "ue8m0")


def _released(model: Transformer, path: Path) -> dict[str, Tensor]:
    save_model(model, path, "float32")
    return load_file(path / "model.safetensors")


def test_fp8_of_any_scale_is_kept_from_fp8_to_fp8_and_dequantised_to_others(tmp_path: Path) -> None:
    """V3's scales are no powers of two: to quantise again would change values."""
    save_model(small_model(**WIDE), tmp_path / "a", "fp8")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    stored = {name: tensor * 1.1 if name.endswith("_scale_inv") else tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "a" / "model.safetensors")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    del fields["quantization_config"]["scale_fmt"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields))

    convert(tmp_path / "a", tmp_path / "b", "fp8")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(again[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)
    assert "scale_fmt" not in json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]

    convert(tmp_path / "a", tmp_path / "c", "float32")
    name = "model.layers.0.self_attn.o_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:136].repeat_interleave(128, 1)[:, :42]
    assert torch.equal(load_file(tmp_path / "c" / "model.safetensors")[name], stored[name].float() * scale)
    assert_same_weights(load_model(tmp_path / "a", "float32"), load_model(tmp_path / "c", "float32"))


def test_fused_fp8_experts_open(tmp_path: Path) -> None:
    """Experts fused and in block FP8: gate_up_proj [E, 2F, D] with scales [E, ceil(2F / 128), ceil(D / 128)]."""
    model = small_model(**WIDE)
    save_model(model, tmp_path / "m", "float32", layout="fused")
    file = tmp_path / "m" / "model.safetensors"
    stored, restored = load_file(file), {}
    for name in [name for name in stored if ".experts." in name]:
        parts = [block_fp8(expert) for expert in stored[name]]
        stored[name], stored[f"{name}_scale_inv"], restored[name] = (torch.stack(part) for part in zip(*parts, strict=True))
    save_file(stored, file)
    experts = load_model(tmp_path / "m", "float32").layers[1].ffn.experts
    gate_up = restored["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(torch.cat([experts.w1, experts.w3], 1), gate_up)
    assert torch.equal(experts.w2, restored["model.layers.1.mlp.experts.down_proj"])


@pytest.mark.parametrize("source", ["float32", "bf16", "fp8"])
@pytest.mark.parametrize("target", ["float32", "bf16", "fp8"])
def test_converting_equals_loading_and_saving(tmp_path: Path, source: str, target: str) -> None:
    save_model(small_model(), tmp_path / "a", source, shard_bytes=50_000)
    convert(tmp_path / "a", tmp_path / "b", target, shard_bytes=30_000)
    save_model(load_model(tmp_path / "a", "float32"), tmp_path / "c", target)
    assert_same_weights(load_model(tmp_path / "b", "float32"), load_model(tmp_path / "c", "float32"))


def test_fused_becomes_released_and_back_without_loss(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "a", "float32")
    convert(tmp_path / "a", tmp_path / "b", "float32", layout="fused", shard_bytes=30_000)
    convert(tmp_path / "b", tmp_path / "c", "float32")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()


def test_fp16_and_float64_open(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m", "float32")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    for dtype in (torch.float16, torch.float64):
        save_file({name: tensor.to(dtype) for name, tensor in stored.items()}, file)
        loaded = load_model(tmp_path / "m", "float32").state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded[name], tensor.to(dtype).float()), name


def test_layer_n_layers_holds_the_mtp_module_with_copies(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m", "float32")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    mtp = {name.removeprefix("model.layers.3.") for name in stored if name.startswith("model.layers.3.")}
    only = {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
            "shared_head.head.weight"}  # fmt: skip
    block = {name.removeprefix("model.layers.2.") for name in stored if name.startswith("model.layers.2.")}
    assert mtp == only | block
    assert torch.equal(stored["model.layers.3.embed_tokens.weight"], model.embed.weight)
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], model.head.weight)
    assert model.mtp is not None
    assert torch.equal(stored["model.layers.3.eh_proj.weight"], model.mtp.eh_proj.weight)


def test_copies_may_be_left_out_and_must_not_differ(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m", "float32")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    head = stored.pop("model.layers.3.shared_head.head.weight")
    save_file(stored, file)
    assert_same_weights(load_model(tmp_path / "m", "float32"), model)
    save_file({**stored, "model.layers.3.shared_head.head.weight": head + 1}, file)
    with pytest.raises(UserError, match=r"shared_head\.head\.weight: expected a copy of lm_head\.weight"):
        load_model(tmp_path / "m")
    with pytest.raises(UserError, match="expected a copy"):
        convert(tmp_path / "m", tmp_path / "n", "bf16")


def test_weights_without_the_promised_mtp_layer_open_without_it(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m", "float32")
    file = tmp_path / "m" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("model.layers.3.")}, file)
    model = load_model(tmp_path / "m", "float32")
    assert model.mtp is None and model.config.n_mtp_layers == 0
    convert(tmp_path / "m", tmp_path / "n", "bf16")
    assert json.loads((tmp_path / "n" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_tied_checkpoint_may_store_its_head(tmp_path: Path) -> None:
    save_model(small_model(tie_embeddings=True), tmp_path / "m", "float32")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, file)
    load_model(tmp_path / "m")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"] * 2}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight: expected a copy of model\.embed_tokens\.weight"):
        load_model(tmp_path / "m")


def test_conversion_carries_the_companions_and_token_ids(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "a")
    carried = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in carried:
        (tmp_path / "a" / name).write_text(f"{name}!")
    (tmp_path / "a" / "notes.txt").write_text("not part of a checkpoint")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**fields, "bos_token_id": 7, "eos_token_id": [8, 9]}))
    convert(tmp_path / "a", tmp_path / "b", "float32")
    save_model(load_model(tmp_path / "a"), tmp_path / "c", companions=tmp_path / "a")
    for made in (tmp_path / "b", tmp_path / "c"):
        assert sorted(file.name for file in made.iterdir()) == sorted([*carried, "config.json", "model.safetensors"])
        assert all((made / name).read_text() == f"{name}!" for name in carried)
        written = json.loads((made / "config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (7, [8, 9])


# Nothing half-written


def contents(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rorqual.model.shards as shards

    calls = []

    def fail_on_third(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(shards, "save_file", fail_on_third)
    with pytest.raises(OSError, match="no space"):
        save_model(small_model(), tmp_path / "m", shard_bytes=20_000)
    assert len(calls) == 3 and contents(tmp_path) == set()


def test_a_failure_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rorqual.model.shards as shards

    first = small_model(seed=1)
    save_model(first, tmp_path / "m", "float32")
    with pytest.raises(UserError, match="exists"):
        save_model(small_model(seed=2), tmp_path / "m")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            save_model(small_model(seed=2), tmp_path / "m", overwrite=True)
    assert_same_weights(load_model(tmp_path / "m", "float32"), first)
    save_model(small_model(seed=2), tmp_path / "m", "float32", overwrite=True)
    assert_same_weights(load_model(tmp_path / "m", "float32"), small_model(seed=2))
    assert contents(tmp_path) == {"m"}


def test_overwriting_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a checkpoint"):
        save_model(small_model(), tmp_path / "precious", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a checkpoint"):
        save_model(small_model(), tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_model(small_model(), tmp_path / "empty")


WRITER = """
import sys, time
import rorqual.model.shards as shards
from rorqual.model import Transformer, ModelConfig
from rorqual.model.weights import save_model
from tests.model.small_models import small_model
write = shards.save_file
def slow(*args, **kwargs):
    write(*args, **kwargs)
    print("shard", flush=True)
    time.sleep(0.4)
shards.save_file = slow
save_model(small_model(), sys.argv[1], shard_bytes=20_000)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_writer_leaves_no_checkpoint_and_the_next_one_clears_up(tmp_path: Path, kill: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "m")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert writer.stdout is not None
    writer.stdout.readline(), writer.stdout.readline()
    assert len(contents(tmp_path)) == 1 and not (tmp_path / "m").exists()
    writer.send_signal(kill)
    assert writer.wait(timeout=20) != 0
    writer.stdout.close()
    assert len(contents(tmp_path)) == (1 if kill == signal.SIGKILL else 0) and not (tmp_path / "m").exists()
    save_model(small_model(), tmp_path / "m")
    assert contents(tmp_path) == {"m"}


MEASURE = """
import sys, torch
from rorqual.model import load_model
from rorqual.model.writing import convert
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
load_model(sys.argv[1], "float32")  # a small one: what torch imports on the way is not the model's
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = peak()
if sys.argv[3] == "load":
    model = load_model(sys.argv[2], "float32")
else:
    convert(sys.argv[2], sys.argv[3], "bf16", shard_bytes=20_000_000)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of about 430 MB in float32, in one shard, so that mapped pages would show."""
    path = tmp_path_factory.mktemp("big") / "m"
    model = small_model(dim=512, inter_dim=1024, n_layers=4, n_routed_experts=32, moe_inter_dim=512, vocab_size=4096)
    return path, save_model(model, path, "float32").weight_bytes


def _measured(small: Path, path: Path, what: str) -> int:
    save_model(small_model(), small)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(path), what], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_loading_peaks_near_the_models_own_size(big: tuple[Path, int], tmp_path: Path) -> None:
    path, size = big
    assert size > 400e6
    assert _measured(tmp_path / "small", path, "load") < 1.25 * size


def test_converting_holds_a_shard_and_not_the_model(big: tuple[Path, int], tmp_path: Path) -> None:
    path, size = big
    assert _measured(tmp_path / "small", path, str(tmp_path / "n")) < 0.35 * size
    assert_same_weights(load_model(tmp_path / "n", "float32"), load_model(path, "float32"), torch.bfloat16)
