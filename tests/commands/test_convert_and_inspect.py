"""`rorqual convert` and `rorqual inspect` from the command line: what they print, write, and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rorqual.cli import main
from rorqual.model import load_model
from rorqual.model.weights import save_model
from tests.model.small_models import small_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path / "m", "float32")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "float32"])
def test_convert_writes_what_opens(checkpoint: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "n"), "--dtype", dtype, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stored = sum(file.stat().st_size for file in (tmp_path / "n").glob("*.safetensors"))
    assert 0 < said["weight_bytes"] < stored and said["rorqual_only"] == []
    assert load_model(tmp_path / "n").config == load_model(checkpoint).config


def test_convert_splits_shards_and_overwrites_only_when_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["convert", str(checkpoint), str(tmp_path / "n"), "--dtype", "bf16", "--shard-gb", "5e-5"]
    assert main(command) == 0
    assert len(list((tmp_path / "n").glob("model-*-of-*.safetensors"))) > 3
    assert main(command) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["convert", str(checkpoint), str(tmp_path / "o"), "--dtype", "bf16", "--shard-gb", "0"]) == 2


def test_convert_says_when_a_model_opens_in_rorqual_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(small_model(q_lora_rank=None), tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "n"), "--dtype", "bf16"]) == 0
    assert "opens in Rorqual only: q_lora_rank is none beside an indexer" in capsys.readouterr().out
    assert json.loads((tmp_path / "n" / "config.json").read_text())["model_type"] == "rorqual"
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="rorqual"):
        AutoConfig.from_pretrained(tmp_path / "n")


def test_failures_are_one_line_and_exit_with_1(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    for command in (["convert", str(checkpoint), str(tmp_path / "n"), "--dtype", "bf16"], ["inspect", str(checkpoint)]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "model.safetensors: not a complete safetensors file" in error
    assert not (tmp_path / "n").exists()


def test_inspect_paper_prints_the_known_totals(capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", "paper"]) == 0
    text = capsys.readouterr().out
    for figure in ("671,026,419,200", "851,524,864", "685,355,329,792", "37,552,297,472", "36,625,618,432", "48,068", "2,177"):
        assert figure in text
    assert main(["inspect", "paper", "--json", "--positions", "131071"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"]["without_indexers"] == 671_026_419_200
    assert [row["position"] for row in said["cost"]] == [131_071]
    assert main(["inspect", "paper", "--model.n_layers=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["indexers"] == 3 * 13_959_424
