"""Checkpoints that do not fit are refused: file, tensor or field, what was expected and found; nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import UserError
from rorqual.model import load_model
from rorqual.model.weights import save_model
from rorqual.model.writing import convert
from tests.model.small_models import small_model


def contents(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path / "m", "fp8", shard_bytes=30_000)
    return tmp_path / "m"


def edit(directory: Path, name: str, change: Any) -> Path:
    """Apply `change` to the tensors of the shard that holds `name`, and keep the index right; the shard's path."""
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    file = index["weight_map"][name]
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)
    kept = {tensor: place for tensor, place in index["weight_map"].items() if place != file}
    index_file.write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(tensors, file)}}))
    return directory / file


NORM, MATRIX = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.o_proj.weight"
BAD_TENSORS = {
    "missing": (NORM, lambda t: t.pop(NORM), f"{NORM}: missing; expected shape [40]"),
    "missing expert": (
        "model.layers.2.mlp.experts.7.up_proj.weight",
        lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"),
        "model.layers.2.mlp.experts.7.up_proj.weight: missing; expected shape [22, 40]"),
    "extra": (NORM, lambda t: t.update(oddity=torch.ones(2)), "oddity: the config has no such tensor"),
    "extra scale": (
        NORM, lambda t: t.update({NORM + "_scale_inv": torch.ones(1)}),
        f"{NORM}: expected F8_E4M3 beside {NORM}_scale_inv, found BF16"),
    "wrong shape": (NORM, lambda t: t.update({NORM: torch.ones(41)}), f"{NORM}: expected shape [40], found [41]"),
    "wrong dtype": (
        NORM, lambda t: t.update({NORM: torch.ones(40, dtype=torch.int32)}),
        f"{NORM}: expected F32, BF16, F16, F64 or F8_E4M3, found I32"),
    "scale missing": (
        MATRIX, lambda t: t.pop(MATRIX + "_scale_inv"),
        f"{MATRIX}: is F8_E4M3, and its scales {MATRIX}_scale_inv are missing"),
    "scale of a wrong shape": (
        MATRIX, lambda t: t.update({MATRIX + "_scale_inv": torch.ones(2, 1)}),
        f"{MATRIX}_scale_inv: expected F32 [1, 1], found F32 [2, 1]"),
    "scale of a wrong dtype": (
        MATRIX, lambda t: t.update({MATRIX + "_scale_inv": torch.ones(1, 1, dtype=torch.int8)}),
        f"{MATRIX}_scale_inv: expected F32 [1, 1], found I8 [1, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named_and_nothing_is_written(good: Path, tmp_path: Path, name: str) -> None:
    tensor, change, message = BAD_TENSORS[name]
    shard = edit(good, tensor, change)
    for act in (lambda: load_model(good), lambda: convert(good, tmp_path / "out", "bf16")):
        with pytest.raises(UserError) as error:
            act()
        assert message in str(error.value)
        assert str(good if message.startswith(tensor) and "missing; " in message else shard) in str(error.value)
    assert contents(tmp_path) == {"m"}


@pytest.mark.parametrize("damage", ["truncated", "truncated header", "corrupt header", "empty"])
def test_a_damaged_shard_is_named(good: Path, tmp_path: Path, damage: str) -> None:
    shard = sorted(good.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    broken = {
        "truncated": whole[:-100],
        "truncated header": whole[:20],
        "corrupt header": whole[:8] + b"#" + whole[9:],
        "empty": b"",
    }
    shard.write_bytes(broken[damage])
    for act in (lambda: load_model(good), lambda: convert(good, tmp_path / "out", "bf16")):
        with pytest.raises(UserError, match=f"{shard.name}: not a complete safetensors file"):
            act()
    assert contents(tmp_path) == {"m"}


def test_an_index_that_names_an_absent_shard(good: Path) -> None:
    shard = sorted(good.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"index\.json: names the shard {shard.name} \(of model\..*which is not in"):
        load_model(good)


def test_an_index_that_disagrees_with_the_shards(good: Path) -> None:
    index_file = good / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    places = index["weight_map"]
    last = sorted(set(places.values()))[-1]
    index_file.write_text(json.dumps({**index, "weight_map": {**places, "model.embed_tokens.weight": last}}))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight: model\.safetensors\.index\.json says it is in"):
        load_model(good)
    index_file.write_text(json.dumps({**index, "weight_map": {**places, "ghost": last}}))
    with pytest.raises(UserError, match=f"{last}: ghost: missing, though"):
        load_model(good)
    index_file.write_text(json.dumps({**index, "weight_map": {**places, "ghost": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="beside the index"):
        load_model(good)
    index_file.write_text("{}")
    with pytest.raises(UserError, match="not a safetensors index"):
        load_model(good)


def test_a_directory_without_weights_or_config_or_at_all(tmp_path: Path, good: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "absent")
    for file in good.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no weights: expected model\.safetensors\.index\.json or model\.safetensors"):
        load_model(good)
    (good / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_model(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"config\.json: model_type: expected deepseek_v32 or .*found 'mistral'"),
        ({"index_topk": 0}, r"config\.json: index_topk: expected at least 1, found 0"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"config\.json: quantization_config\.quant_method: expected fp8, found awq",
        ),
        ({"hidden_size": 44}, r"expected shape \[97, 44\], found \[97, 40\]"),
    ],
)
def test_a_bad_config_is_named_and_nothing_is_written(good: Path, tmp_path: Path, change: dict, message: str) -> None:
    fields = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(UserError, match=message):
        load_model(good)
    with pytest.raises(UserError, match=message):
        convert(good, tmp_path / "out", "bf16")
    assert contents(tmp_path) == {"m"}


def test_unknown_dtypes_and_layouts_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype: expected float32, bf16 or float64, found fp8"):
        load_model(good, "fp8")
    with pytest.raises(UserError, match="dtype: expected float32, bf16 or fp8, found int4"):
        convert(good, tmp_path / "out", "int4")
    with pytest.raises(UserError, match="layout"):
        convert(good, tmp_path / "out", "fp8", layout="fused")
    with pytest.raises(UserError, match="is the source"):
        convert(good, good, "bf16", overwrite=True)
    assert contents(tmp_path) == {"m"}
