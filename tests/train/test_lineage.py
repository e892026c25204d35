"""A record names what was made by its content and by its parents; whatever was changed afterwards shows."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.train.lineage import FILE, Making, content, lineage_of, publish, read_lineage, tree, write_record
from tests.stages.test_grpo import SHAPE


@dataclass(frozen=True)
class Batch:
    seed: int = 7


@dataclass(frozen=True)
class Config:
    seed: int = 0
    batch: Batch = field(default_factory=Batch)


def made(path, seed, parents=None, stage="sft", **save):
    part = path.with_name(path.name + ".part")
    save_model(Transformer(SHAPE, seed=seed), part, dtype="float32", **save)
    return publish(part, path, Making(stage, Config(seed), parents or {}))


def test_the_hash_of_weights_does_not_depend_on_shards_and_sees_every_tensor(tmp_path):
    one, many = made(tmp_path / "one", 1), made(tmp_path / "many", 1, shard_bytes=20_000)
    assert len(list(many.glob("*.safetensors"))) > 1 and content(one)["weights"] == content(many)["weights"]
    tensors = load_file(one / "model.safetensors")
    for name in (min(tensors), max(tensors)):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[0] += 1
        save_file(changed, one / "model.safetensors")
        assert content(one)["weights"] != content(many)["weights"], name


def test_records_of_all_ancestors_come_along_once(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    base = made(tmp_path / "base", 1, {"data": data}, "pretrain")
    left, right = (made(tmp_path / n, s, {"init": base}) for n, s in (("left", 2), ("right", 3)))
    own, records = read_lineage(made(tmp_path / "both", 4, {"teacher a": left, "teacher b": right}, "distill"))
    assert sorted(r["stage"] for r in records.values()) == ["distill", "given", "pretrain", "sft", "sft"]
    assert records[own]["seeds"] == {"seed": 4, "batch.seed": 7}
    lines = tree(own, records)
    assert len([line for line in lines if "pretrain" in line]) == 2 and sum("(above)" in line for line in lines) == 1
    assert [p["content"]["weights"] for p in records[own]["parents"]] == [content(m)["weights"] for m in (left, right)]


def test_the_same_content_from_the_same_parents_has_the_same_id_wherever_it_was_made(tmp_path):
    first = made(tmp_path / "a" / "x", 1)
    second = made(tmp_path / "b" / "y", 1)
    assert read_lineage(first)[0] == read_lineage(second)[0]
    assert read_lineage(made(tmp_path / "z", 2))[0] != read_lineage(first)[0]


def test_a_checkpoint_changed_outside_any_stage_says_so(tmp_path):
    model = made(tmp_path / "model", 1)
    before, _ = read_lineage(model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: t + 1 if t.dtype == torch.float32 else t for name, t in tensors.items()}, model / "model.safetensors")
    own, records = lineage_of(model)
    assert own != before and records[own]["stage"] == "given" and records[own]["parents"][0]["id"] == before


def test_a_file_of_a_stage_s_directory_belongs_to_its_record(tmp_path):
    (tmp_path / "conversations.jsonl").write_text("{}\n")
    own = write_record(tmp_path, Making("cold_start", Config()))
    assert lineage_of(tmp_path / "conversations.jsonl")[0] == own
    (tmp_path / "conversations.jsonl").write_text("{}\n{}\n")
    assert lineage_of(tmp_path / "conversations.jsonl")[0] != own


def test_a_forged_or_missing_record_is_refused(tmp_path):
    model = made(tmp_path / "model", 1)
    value = json.loads((model / FILE).read_text())
    value["records"][value["id"]]["config"]["seed"] = 99
    (model / FILE).write_text(json.dumps(value))
    with pytest.raises(UserError, match="do not have the content that their ids name"):
        read_lineage(model)
    with pytest.raises(UserError, match="no such file"):
        read_lineage(tmp_path)


def test_a_record_and_its_checkpoint_appear_together(tmp_path, monkeypatch):
    from rorqual.train import lineage

    made(tmp_path / "model", 1)
    shutil.copytree(tmp_path / "model", tmp_path / "before")
    monkeypatch.setattr(lineage, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        made(tmp_path / "model", 2)
    assert content(tmp_path / "model") == content(tmp_path / "before") and (tmp_path / "model" / FILE).exists()
