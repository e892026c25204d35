"""inspect's figures are those of the report and of the model itself: counted by hand, by shape, and on the meta device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.config import load
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer, cost
from rorqual.model.inspection import figures, render
from rorqual.model.names import entries
from rorqual.model.parameters import count_parameters
from rorqual.model.weights import save_model
from tests.model.small_models import SMALL, small_model

PAPER = load(ModelConfig, "paper", table="model")


def test_the_paper_recipe_is_the_released_model() -> None:
    assert ModelConfig() == PAPER


def test_the_671b_counts_are_exact() -> None:
    counts = count_parameters(PAPER)
    assert counts.without_indexers == 671_026_419_200
    assert counts.without_indexers - 58 * 256 == 671_026_404_352  # without the router correction biases
    assert counts.indexers == 61 * 13_959_424 == 851_524_864
    assert counts.mtp_indexer == 13_959_424
    assert counts.mtp_without_indexer == 11_610_068_224
    assert counts.checkpoint == 685_355_329_792
    assert round(counts.activated / 1e9, 2) == 37.55
    assert round(counts.activated_without_embedding / 1e9, 2) == 36.63


@pytest.fixture(scope="module")
def paper_on_meta() -> Transformer:
    with torch.device("meta"):
        return Transformer(PAPER)


def test_the_671b_transformer_on_the_meta_device_has_these_parameters(paper_on_meta: Transformer) -> None:
    counts = count_parameters(PAPER)
    state = paper_on_meta.state_dict()
    main = {name: tensor.numel() for name, tensor in state.items() if not name.startswith("mtp.")}
    indexers = sum(size for name, size in main.items() if ".indexer." in name)
    assert (sum(main.values()) - indexers, indexers) == (671_026_419_200, 851_524_864)
    mtp = {name: tensor.numel() for name, tensor in state.items() if name.startswith("mtp.")}
    assert sum(mtp.values()) == counts.mtp_without_indexer + counts.mtp_indexer


def shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The Transformer's state dict as the table of names has it."""
    found: dict[str, list[int]] = {}
    for entry in entries(config):
        if entry.copy_of is None:
            stacked = [config.n_routed_experts] if entry.expert is not None else []
            found[entry.ours] = [*stacked, *entry.shape]
    return found


def test_the_table_of_names_has_every_tensor_of_the_671b_model(paper_on_meta: Transformer) -> None:
    assert shapes(PAPER) == {name: list(tensor.shape) for name, tensor in paper_on_meta.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "indexers": ("none", "full", "shared")},
        {"tie_embeddings": True},
        {"n_shared_experts": 0, "n_mtp_layers": 0},
        {"indexers": "none", "n_dense_layers": 3, "n_shared_experts": 2},
    ],
)
def test_the_table_of_names_has_every_tensor_of_any_config(changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del expected["head.weight"]
    assert shapes(model.config) == expected
    counts = count_parameters(model.config)
    every = sum(math.prod(shape) for shape in expected.values())
    assert counts.checkpoint - counts.copies == every
    names = [entry.name for entry in entries(model.config)]
    assert len(names) == len(set(names))


def test_activated_parameters_are_those_that_touch_one_token() -> None:
    """Counted by a backward: only the weights of chosen experts get a gradient from one token."""
    model = small_model(n_mtp_layers=0, indexers="none")
    model(torch.tensor([[5]])).square().sum().backward()
    touched = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1).any(1) if ".experts." in name else torch.ones(1, dtype=torch.bool)
        touched += int(rows.sum()) * (parameter[0].numel() if ".experts." in name else parameter.numel())
    biases = 2 * SMALL["n_routed_experts"]
    assert count_parameters(model.config).activated == touched + biases


def test_cache_bytes_are_those_of_the_released_layouts() -> None:
    assert [cost.entry_bytes(PAPER, layout) for layout in ("bf16", "fp8")] == [1152, 656]
    assert [cost.index_key_bytes(PAPER, layout) for layout in ("bf16", "fp8")] == [256, 132]
    assert [cost.cache_bytes(PAPER, layout) for layout in ("bf16", "fp8")] == [85_888, 48_068]


def test_fp8_cache_bytes_are_those_the_kernels_pack() -> None:
    from rorqual.kernels import pack_index_key, pack_latent

    assert pack_latent(torch.ones(1, 512), torch.ones(1, 64)).numel() == cost.entry_bytes(PAPER, "fp8")
    assert pack_index_key(torch.ones(1, 128)).numel() == cost.index_key_bytes(PAPER, "fp8")


def test_costs_by_hand_at_single_positions() -> None:
    pairs = 128 * 2 * (512 + 64 + 512)  # operations of one query with one key, absorbed, all heads
    index = 64 * 2 * (128 + 1)
    assert cost.dense_flops(PAPER, 9999) == 61 * 10_000 * pairs
    assert cost.dense_flops(PAPER, 9999, "expanded") == 61 * 10_000 * 128 * 2 * (192 + 128)
    assert cost.sparse_flops(PAPER, 9999) == 61 * (2048 * pairs + 10_000 * index)
    assert cost.sparse_flops(PAPER, 99) == 61 * 100 * (pairs + index)
    assert cost.dense_read(PAPER, 9999, "fp8") == 61 * 10_000 * 656
    assert cost.sparse_read(PAPER, 9999, "fp8") == 61 * (2048 * 656 + 10_000 * 132)
    assert cost.sparse_read(PAPER, 99, "bf16") == 61 * 100 * 1408


def test_shared_and_dense_layers_cost_what_they_do() -> None:
    config = ModelConfig(**{**SMALL, "n_layers": 3, "indexers": ("none", "full", "shared"), "max_positions": 4096})
    pairs = config.n_heads * 2 * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    index = config.index_n_heads * 2 * (config.index_head_dim + 1)
    assert cost.sparse_flops(config, 99) == 100 * pairs + 2 * config.index_topk * pairs + 100 * index
    entry, key = 2 * (config.kv_lora_rank + config.qk_rope_head_dim), 2 * config.index_head_dim
    assert cost.cache_bytes(config, "bf16") == 3 * entry + key


@pytest.mark.parametrize("topk", [1, 9, 60])
def test_crossovers_are_the_first_positions_that_save(topk: int) -> None:
    config = ModelConfig(**{**SMALL, "index_topk": topk, "max_positions": 700})
    found = cost.crossovers(config)
    for value, saves in {
        found.decode_flops: lambda p: cost.sparse_flops(config, p) < cost.dense_flops(config, p),
        found.prefill_flops: lambda p: cost.sparse_flops(config, p) < cost.dense_flops(config, p, "expanded"),
        found.read_bf16: lambda p: cost.sparse_read(config, p, "bf16") < cost.dense_read(config, p, "bf16"),
        found.read_fp8: lambda p: cost.sparse_read(config, p, "fp8") < cost.dense_read(config, p, "fp8"),
    }.items():
        assert value == next((p for p in range(700) if saves(p)), None)


def test_crossovers_of_the_671b_model() -> None:
    found = cost.crossovers(PAPER)
    assert (found.decode_flops, found.prefill_flops, found.read_bf16, found.read_fp8) == (2177, 8721, 2633, 2563)


def test_models_without_indexers_or_savings_never_cross() -> None:
    none = cost.crossovers(ModelConfig(**{**SMALL, "indexers": "none"}))
    assert none.decode_flops is None and none.read_fp8 is None
    costly = cost.crossovers(ModelConfig(**{**SMALL, "index_n_heads": 500, "max_positions": 4096}))
    assert costly.decode_flops is None


def test_every_figure_of_a_checkpoint_is_shown_and_the_text_names_each_total(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path / "m", "fp8")
    found = figures(tmp_path / "m")
    assert found["architecture"] == "deepseek_v32"
    assert found["parameters"] == figures(tmp_path / "m" / "config.json")["parameters"]
    assert found["stored"]["bytes"].keys() == {"BF16", "F32", "F8_E4M3"}
    text = render(found)
    for name in ("without_indexers", "activated_with_embedding_and_head", "activated_without_embedding", "checkpoint"):
        assert f"{found['parameters'][name]:,}" in text
    assert "Opens in Rorqual only" not in text
    assert "q_lora_rank is none beside an indexer" in render(figures(_saved(tmp_path / "r", q_lora_rank=None)))
    assert "No indexers" in render(figures(_saved(tmp_path / "d", indexers="none")))


def _saved(path: Path, **changes: Any) -> Path:
    save_model(small_model(**changes), path)
    return path


def test_recipes_take_overrides_and_positions_and_checkpoints_do_not(tmp_path: Path) -> None:
    found = figures("paper", ["--model.index_topk=1024"], [4095, 100_000])
    assert [row["position"] for row in found["cost"]] == [4095, 100_000]
    assert found["index_topk"] == 1024 and found["crossover"]["decode_flops"] < 2177
    with pytest.raises(UserError, match="overrides change a recipe"):
        figures(_saved(tmp_path / "m"), ["--model.index_topk=4"])
    with pytest.raises(UserError, match=r"expected 0 to 163839.*found 163840"):
        figures("paper", [], [163_840])
    with pytest.raises(UserError, match="index_topk"):
        figures("paper", ["--model.index_topk=0"])
    with pytest.raises(UserError, match="no such file or recipe"):
        figures("papyrus")
