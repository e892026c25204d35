"""rorqual adapt: dense in, sparse out, a report that says what it can and can't claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.data.store import TokenStore
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.runlog import RunLog, read_events
from rorqual.stages import prepare
from rorqual.stages.adapt import Thresholds, verdict
from tests.train.shapes import shape


def report(**changes) -> dict:
    figures = {"ratio": 1.0, "captured": 0.96, "control": 0.9, "sparse": 0.89, "random": 0.2} | changes
    return {
        "loss": {"control": {"loss": 2.0}, "sparse": {"loss": 2.0 * figures["ratio"]}},
        "selection": {"0": {"captured": 0.9, "oracle": 0.9}, "1": {"captured": figures["captured"] * 0.8, "oracle": 0.8}},
        "retrieval": {
            "control": {"accuracy": figures["control"]},
            "sparse": {"accuracy": figures["sparse"]},
            "random indexer": {"accuracy": figures["random"]},
        },
    }


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, {}),
        ({"ratio": 1.011}, {"loss": False}),
        ({"captured": 0.94}, {"captured": False}),
        ({"sparse": 0.87}, {"retrieval": False}),
        ({"random": 0.5}, {"selection matters": False}),
        ({"control": 0.79, "sparse": 0.79}, {"retrieval": "void", "selection matters": "void"}),
    ],
)
def test_the_verdict_names_each_claim_that_does_not_hold_or_is_void(changes, failing):
    found = verdict(Thresholds(), report(**changes))
    assert {name: claim["holds"] for name, claim in found["claims"].items() if claim["holds"] is not True} == failing
    assert found["quality_held"] == (not failing)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense checkpoint without q_lora_rank, with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    config = prepare.Config((prepare.CorpusConfig("python", limit_mb=0.1),), held_out_share=0.4, vocab_size=400)
    store = prepare.main(config, folder / "data", RunLog(folder, quiet=True))
    model = Transformer(shape(vocab_size=400, indexers="none", q_lora_rank=None), seed=0)
    save_model(model, folder / "model", "float32", companions=store.directory)
    return folder / "model"


def adapt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rorqual", "adapt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SHORT = [
    "--config=adapt-tiny",
    "--quiet",
    "--prepare.corpora=[{name='python', limit_mb=0.2}]",
    "--prepare.held_out_share=0.4",
    "--quality.batches=1",
    "--quality.selection_batches=1",
    "--quality.needles={lengths=[64], depths=[0.5], count=2}",
    "--warm-indexer.index-head-dim=8",
    "--warm-indexer.index-topk=16",
    *(f"--{stage}.pace.steps=2" for stage in ("warm_indexer", "train_sparse")),
    *(f"--{stage}.batch={{rows=2, length=64, recall={{share=0.4}}}}" for stage in ("warm_indexer", "train_sparse")),
]


def test_a_dense_checkpoint_becomes_sparse_with_a_report_and_a_control_on_the_same_tokens(dense, tmp_path):
    result = adapt(str(dense), str(tmp_path / "out"), *SHORT)
    assert result.returncode == 0, result.stderr
    assert "no q_lora_rank" in result.stdout and "opens in Rorqual only" in result.stdout
    model = load_model(tmp_path / "out", "float32")
    assert model.config.layer_indexers == ("full", "full") and model.config.index_topk == 16
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert set(found["selection"]) == {"0", "1"} and found["verdict"]["claims"]["retrieval"]["holds"] == "void"
    assert "quality is not shown to have held" in (tmp_path / "out" / "quality.html").read_text()
    work = tmp_path / "out-work"
    steps = {stage: [e["step"] for e in read_events(work / stage, "metrics")] for stage in ("train-sparse", "control")}
    assert steps["control"] == steps["train-sparse"] == [0, 1]
    first = {stage: read_events(work / stage, "metrics")[0]["train/loss"] for stage in steps}
    assert first["control"] != first["train-sparse"]
    assert TokenStore(work / "data").tokenizer.get_vocab_size() == 400

    again = adapt(str(dense), str(tmp_path / "out"), *SHORT)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_sources_that_cannot_be_adapted_are_refused(dense, tmp_path):
    missing = adapt(str(tmp_path / "nowhere"), str(tmp_path / "out"), *SHORT)
    assert missing.returncode == 1 and "nowhere: no such checkpoint" in missing.stderr
    unfit = adapt(str(dense), str(tmp_path / "out"), *SHORT, "--warm-indexer.index-head-dim=2")
    assert unfit.returncode == 1 and "indexers asked for do not fit" in unfit.stderr and "index_head_dim" in unfit.stderr
    assert not (tmp_path / "out").exists()
