"""Configs: TOML and overrides in, one error per bad field out, and the round trip through TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from rorqual.config import ConfigError, dump, load
from rorqual.model.config import ModelConfig, YarnConfig


@dataclass(frozen=True)
class Outer:
    model: ModelConfig = field(default_factory=ModelConfig)
    rates: tuple[float, ...] = (0.1, 0.2)
    note: str | None = "x"


@dataclass(frozen=True)
class Many:
    by_name: Mapping[str, Outer] = field(default_factory=dict)
    in_order: tuple[Outer, ...] = ()
    limits: Mapping[str, int | None] = field(default_factory=dict)


def test_fields_inside_mappings_and_tuples_are_checked_and_none_is_read_there(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('limits = { x = "none", y = 2 }\n[by_name.a]\nnote = "none"\n[[in_order]]\nmodel = { yarn = "none" }\n')
    config = load(Many, path)
    assert config.by_name["a"].note is None and config.in_order[0].model.yarn is None and config.limits == {"x": None, "y": 2}
    path.write_text(dump(config))
    assert load(Many, path) == config
    path.write_text("[by_name.a]\nnoet = 1\n[[in_order]]\nmodel = { dmi = 1 }\n")
    with pytest.raises(ConfigError) as caught:
        load(Many, path)
    assert "by_name.a.noet: no such field" in str(caught.value) and "in_order.0.model.dmi: no such field" in str(caught.value)


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
