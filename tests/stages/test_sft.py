"""Fine-tuning: it learns the answers, keeps the best epoch, and a resumed run ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rorqual.chat import encode_tokens
from rorqual.engine import Engine
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.parallel.world import World
from rorqual.policy import SamplingParams
from rorqual.runlog import RunLog, read_events, read_metrics
from rorqual.stages import sft
from rorqual.train.loop import Site
from rorqual.train.optimizer import OptimizerConfig
from tests.byte_tokenizer import byte_tokenizer
from tests.stages.test_grpo import SHAPE

TOKENIZER = byte_tokenizer()
CONFIG = sft.Config(
    epochs=10, rows=2, length=64, held_out_share=0.2, checkpoint_every=3,
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.0, schedule="constant"),
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A random model, and conversations in which the answer is the question's letter doubled."""
    root = tmp_path_factory.mktemp("sft")
    save_model(Transformer(SHAPE, seed=4), root / "init", dtype="float32")
    TOKENIZER.backend.save(str(root / "init" / "tokenizer.json"))
    with open(root / "data.jsonl", "w") as file:
        for n in range(64):
            letter = "abcd"[n % 4]
            messages = [{"role": "user", "content": letter}, {"role": "assistant", "content": letter * 2}]
            file.write(json.dumps({"messages": messages, "thinking": False, "n": n}) + "\n")
    return root


def tune(config, given, directory):
    log = RunLog(directory, quiet=True)
    model = sft.main(config, given / "init", given / "data.jsonl", Site(directory, World(0, 1, torch.device("cpu")), log))
    log.close()
    return model


def test_it_learns_and_keeps_the_epoch_that_is_best_on_held_out_conversations(given, tmp_path):
    model = tune(CONFIG, given, tmp_path)
    losses = [loss for _, loss in read_metrics(tmp_path, "sft/held_out_loss")]
    best = json.loads((tmp_path / "best.json").read_text())
    assert len(losses) == 10 and best["loss"] == pytest.approx(min(losses)) and losses[best["epoch"]] == min(losses)
    assert min(losses) < 0.3 * losses[0]
    engine = Engine(load_model(model, "float32"))
    prompt = encode_tokens([{"role": "user", "content": "c"}], TOKENIZER, thinking=False)
    done = engine.generate([prompt], SamplingParams(max_tokens=4, temperature=0, stop_tokens=(TOKENIZER.eos_id,)))[0]
    assert TOKENIZER.decode(done.tokens[:-1]) == "cc"
    assert read_events(tmp_path, "conversations")[0]["dropped"] == {}


def test_a_run_that_was_stopped_ends_with_the_same_bits(given, tmp_path, monkeypatch):
    whole = tune(CONFIG, given, tmp_path / "whole")
    step, calls = sft.train_step, []

    def failing(*args):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(sft, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(CONFIG, given, tmp_path / "cut")
    monkeypatch.setattr(sft, "train_step", step)
    resumed = tune(CONFIG, given, tmp_path / "cut")
    a, b = (load_model(path, "float32").state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_indexers_go_on_learning_from_their_own_loss(given, tmp_path):
    tune(replace(CONFIG, epochs=1, length=48), given, tmp_path)
    assert len(read_metrics(tmp_path, "train/index_loss")) > 0


@pytest.mark.multi
def test_two_processes_tune_what_one_does(given, tmp_path):
    """Held-out losses too, where one of them has no row of its own left."""
    options = [
        "--init", str(given / "init"), "--data", str(given / "data.jsonl"), "--device", "cpu", "--quiet", "--epochs=2",
        "--rows=2", "--length=64", "--held_out_share=0.2", "--compute.save_dtype=float32", "--optimizer.learning_rate=0.004",
        "--optimizer.schedule=constant", "--optimizer.weight_decay=0", "--optimizer.epsilon=1e-5",
    ]  # fmt: skip
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                                    "--rdzv-endpoint", "localhost:0"]}  # fmt: skip
    losses = {}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, "-m", "rorqual", "sft", *options, "--out", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
        assert result.returncode == 0, result.stderr[-3000:]
        losses[name] = [loss for _, loss in read_metrics(tmp_path / name, "sft/held_out_loss")]
    assert len(losses["one"]) == 2 and losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    ours, theirs = (load_model(tmp_path / name / "model", "float32").state_dict() for name in launchers)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-4
