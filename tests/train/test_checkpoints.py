"""Checkpoints: what is saved comes back bit for bit; damage, a full disk and other shapes lose nothing and are named."""

from __future__ import annotations

import errno
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rorqual.errors import UserError
from rorqual.parallel.world import ParallelConfig, start
from rorqual.runlog import RunLog, read_events
from rorqual.train.checkpoints import Checkpoints


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(5, 7, generator=generator),
        "model.b": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(float(seed)),
        "random.cpu": torch.randint(0, 255, (16,), generator=generator, dtype=torch.uint8),
    }


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", start(ParallelConfig(), "cpu"), RunLog(tmp_path, quiet=True))


def test_what_is_saved_comes_back_bit_for_bit_with_its_facts(checkpoints):
    checkpoints.save(7, tensors(1), {"stage": "x"})
    found = tensors(2)
    assert checkpoints.load(found) == {"stage": "x", "step": 7}
    assert all(torch.equal(found[name], value) for name, value in tensors(1).items())


def test_no_checkpoint_is_no_error(checkpoints):
    assert checkpoints.load(tensors(0)) is None


def test_only_the_newest_ones_stay(checkpoints):
    for step in (1, 2, 3, 4):
        checkpoints.save(step, tensors(step), {})
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "facts"])
def test_a_damaged_checkpoint_is_passed_over_and_logged_and_the_one_before_is_used(checkpoints, damage):
    for step in (1, 2):
        checkpoints.save(step, tensors(step), {})
    newest = checkpoints.directory / "step-00000002"
    data = next(newest.glob("*.distcp"))
    match damage:
        case "cut":
            data.write_bytes(data.read_bytes()[:-5])
        case "flip":
            data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        case "remove":
            data.unlink()
        case "facts":
            (newest / "files.json").write_text("{")
    found = tensors(9)
    facts = checkpoints.load(found)
    assert facts is not None and facts["step"] == 1 and torch.equal(found["model.a"], tensors(1)["model.a"])
    assert [e["path"] for e in read_events(checkpoints.log.directory, "damaged checkpoint passed over")] == ["step-00000002"]


@pytest.mark.parametrize("where", ["tensors", "facts", "flush", "rename"])
def test_a_full_disk_while_saving_is_an_error_and_the_last_checkpoint_still_stands(checkpoints, monkeypatch, where):
    checkpoints.save(1, tensors(1), {})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    match where:
        case "tensors":
            monkeypatch.setattr(dcp, "save", full)
        case "facts":
            monkeypatch.setattr(json, "dumps", full)
        case "flush":
            monkeypatch.setattr("os.fsync", full)
        case "rename":
            monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"could not be saved .*No space left.*earlier checkpoints: \[1\]"):
        checkpoints.save(2, tensors(2), {})
    monkeypatch.undo()
    assert checkpoints.steps() == [1] and not list(checkpoints.directory.glob(".*"))
    found = tensors(9)
    assert checkpoints.load(found)["step"] == 1 and torch.equal(found["model.b"], tensors(1)["model.b"])
    checkpoints.save(2, tensors(2), {})
    assert checkpoints.steps() == [1, 2]


def test_tensors_of_another_model_are_refused_by_name(checkpoints):
    checkpoints.save(1, tensors(1), {})
    with pytest.raises(UserError, match=r"step-00000001: does not fit this model: .*model\.c"):
        checkpoints.load({**tensors(1), "model.c": torch.zeros(2)})
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoints.load({**tensors(1), "model.a": torch.zeros(2, 2)})
