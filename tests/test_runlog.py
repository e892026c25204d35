"""The run log: append-only, readable after a crash, and the source of every curve."""

from __future__ import annotations

import json
import math

from rorqual.model.config import ModelConfig
from rorqual.runlog import EVENTS, RunLog, read_events, read_metrics, write_atomically


def test_a_line_cut_short_by_a_crash_is_skipped_and_the_next_one_stands_alone(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.metrics(0, **{"train/loss": 3.0})
    log.close()
    with open(tmp_path / EVENTS, "a") as file:
        file.write('{"kind": "metrics", "step": 1, "train/lo')
    log = RunLog(tmp_path, quiet=True)
    log.metrics(1, **{"train/loss": 2.0})
    log.close()
    assert read_metrics(tmp_path, "train/loss") == [(0, 3.0), (1, 2.0)]


def test_after_a_resume_the_last_value_of_a_step_counts(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    for step, loss in [(0, 3.0), (1, 9.0), (1, 2.0)]:
        log.metrics(step, **{"train/loss": loss})
    assert read_metrics(tmp_path, "train/loss") == [(0, 3.0), (1, 2.0)]


def test_begin_writes_config_and_environment_without_names_of_the_machine(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.begin(ModelConfig())
    assert "dim = 7168" in (tmp_path / "config.toml").read_text()
    assert set(json.loads((tmp_path / "environment.json").read_text())) <= {
        "rorqual", "python", "system", "cores", "commit", "torch", "device",
    }  # fmt: skip
    assert [event["kind"] for event in read_events(tmp_path)] == ["begin"]


def test_tensors_and_non_finite_numbers_survive(tmp_path):
    import torch

    log = RunLog(tmp_path, quiet=True)
    log.metrics(0, **{"train/loss": torch.tensor(1.5), "train/kl": math.inf})
    assert read_metrics(tmp_path, "train/loss") == [(0, 1.5)]
    assert read_metrics(tmp_path, "train/kl") == [(0, math.inf)]


def test_progress_off_a_terminal_prints_the_last_line(tmp_path, capsys):
    with RunLog(tmp_path).progress("pretrain", total=3, done=1) as progress:
        progress.advance()
        progress.advance(note="loss 2.0")
    assert "pretrain: 3/3 loss 2.0" in capsys.readouterr().err


def test_atomic_write_leaves_no_part_behind(tmp_path):
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
