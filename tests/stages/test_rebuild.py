"""A chain of stages, built again from the record in its last checkpoint, has the same hashes."""

from __future__ import annotations

import json

import pytest
import torch

from rorqual.cli import main
from rorqual.errors import UserError
from rorqual.parallel.world import World
from rorqual.runlog import RunLog
from rorqual.stages import rebuild, sft
from rorqual.stages import run as pipeline
from rorqual.stages.recipe import load_recipe
from rorqual.train.lineage import content, read_lineage
from rorqual.train.loop import Site

WORLD = World(0, 1, torch.device("cpu"))
FEW = [
    "--prepare.corpora=[{name='python', limit_mb=0.15}]", "--prepare.held_out_share=0.3", "--sample.prompts=[]",
    "--pretrain.pace.steps=3", "--extend=none", "--post_training=none",
    "--warm_indexer.pace.steps=2", "--train_sparse.pace.steps=2",
    "--warm_indexer.batch.length=64", "--train_sparse.batch.length=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """prepare -> pretrain -> warm indexer -> sparse -> sft, and the conversations."""
    root = tmp_path_factory.mktemp("chain")
    base = pipeline.main(load_recipe("smoke", FEW), root / "run", WORLD, quiet=True)
    data = root / "conversations.jsonl"
    with open(data, "w") as file:
        for n in range(12):
            messages = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]
            file.write(json.dumps({"messages": messages, "thinking": False}) + "\n")
    config = sft.Config(epochs=1, rows=1, length=48, held_out_share=0.2)
    model = sft.main(config, base, data, Site(root / "sft", WORLD, RunLog(root / "sft", quiet=True)))
    return root, model, data


def test_the_chain_rebuilt_from_its_record_has_the_same_hashes(chain, capsys):
    root, model, data = chain
    assert main(["lineage", str(model), "--rebuild", str(root / "again"), "--given", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same"] and report["id"] == read_lineage(model)[0]
    stages = [found["stage"] for found in report["records"].values()]
    assert stages == ["prepare", "pretrain", "warm_indexer", "train_sparse", "sft"]
    again = report["records"][report["id"]]
    assert again["content"] == content(model) and again["path"] != str(model)


def test_a_published_copy_keeps_its_record_and_inspect_draws_it(chain, capsys):
    root, model, _ = chain
    assert read_lineage(root / "run" / "model")[0] == read_lineage(root / "run" / "train-sparse" / "model")[0]
    assert main(["inspect", str(model), "--lineage"]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert drawn[0].startswith("sft ") and any("init: train_sparse" in line for line in drawn)
    assert any("data: given" in line for line in drawn) and any("data: prepare" in line for line in drawn)


def test_other_settings_give_another_hash(chain, tmp_path):
    root, model, data = chain
    other = sft.Config(epochs=2, rows=2, length=48, held_out_share=0.2)
    changed = sft.main(other, root / "run" / "model", data, Site(tmp_path, WORLD, RunLog(tmp_path, quiet=True)))
    assert content(changed)["weights"] != content(model)["weights"]


def test_an_input_that_no_stage_made_must_be_given(chain, tmp_path):
    _, model, data = chain
    with pytest.raises(UserError, match=r"needs what no stage made.*--given"):
        rebuild.main(model, tmp_path, [], WORLD)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + "\n")
    with pytest.raises(UserError, match="needs what no stage made"):
        rebuild.main(model, tmp_path, [other], WORLD)
