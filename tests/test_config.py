"""Configs: TOML and overrides in, one error per bad field out, and the round trip through TOML."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from rorqual.config import ConfigError, dump, load
from rorqual.model.config import ModelConfig, YarnConfig


@dataclass(frozen=True)
class Outer:
    model: ModelConfig = field(default_factory=ModelConfig)
    rates: tuple[float, ...] = (0.1, 0.2)
    note: str | None = "x"


def test_every_bad_field_is_named_with_its_source_and_the_accepted_values(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[model]\nn_heads = 0\nindex_topk = 0\nq_lora_rnak = 3\n")
    with pytest.raises(ConfigError) as caught:
        load(Outer, path, ["--rates=[1, 'a']"])
    text = str(caught.value)
    assert f"{path}: model.n_heads: expected at least 1, found 0" in text
    assert f"{path}: model.index_topk: expected at least 1, found 0" in text
    assert f"{path}: model.q_lora_rnak: no such field; accepted: vocab_size" in text
    assert "rates.1" in text and "found 'a'" in text


def test_overrides_reach_nested_fields_and_win_over_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("note = 'file'\n[model]\nn_heads = 4\n")
    config = load(Outer, path, ["--model.n-heads=8", "--model.yarn.factor=2.5", "--note=cli"])
    assert (config.model.n_heads, config.model.yarn.factor, config.note) == (8, 2.5, "cli")


def test_toml_round_trip_keeps_none_where_the_default_is_not(tmp_path):
    config = Outer(ModelConfig(yarn=None, q_lora_rank=None, indexers=("none",) * 61), note=None)
    path = tmp_path / "r.toml"
    path.write_text(dump(config))
    assert load(Outer, path) == config
    assert load(Outer, path, ["--model.yarn.factor=4"]).model.yarn == YarnConfig(factor=4)


def test_none_for_an_indexer_is_a_kind_and_not_a_missing_value():
    assert load(ModelConfig, None, ["--indexers=none"]).indexers == "none"


def test_invalid_toml_and_unknown_recipe_are_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("a = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load(Outer, path)
    with pytest.raises(ConfigError, match="no such file or recipe"):
        load(Outer, "nowhere")
    with pytest.raises(ConfigError, match=r"has no table \[pretrain\]"):
        path.write_text("[model]\nn_heads = 4\n")
        load(Outer, path, table="pretrain")
