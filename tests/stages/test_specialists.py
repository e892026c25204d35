"""Specialists: one run per domain and mode; in turn or side by side the same bits; a failure harms no neighbour."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.chat import encode_with_sources
from rorqual.config import load
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.parallel.world import World
from rorqual.runlog import RunLog, read_events, read_metrics
from rorqual.stages import specialists
from rorqual.stages.specialists import Specialist, read_specialists
from rorqual.stages.task_set import open_tasks
from rorqual.tasks import Store, Task, TaskRow, task_record
from rorqual.train.lineage import read_lineage
from rorqual.train.loop import Pace, Site
from tests.byte_tokenizer import byte_tokenizer
from tests.stages.test_grpo import CONFIG as GRPO
from tests.stages.test_grpo import LETTERS, SHAPE

TOKENIZER = byte_tokenizer()
ASKED = {"logic": "One?", "maths": "Two?"}
RIGHT = {"logic": "a", "maths": "b"}
RUNS = replace(GRPO, pace=Pace(steps=6, checkpoint_every=3))
CONFIG = specialists.Config(grpo=RUNS, modes=("direct",), by_domain={"maths": {"policy": {"default": {"beta": 0.0}}}})


def make_store(directory: Path) -> Path:
    """Three tasks in each of two domains that ask for a letter each."""
    store = Store(directory)
    for n, (domain, asked) in enumerate(ASKED.items()):
        for m in range(3):
            payload = {"check": {"kind": "exact", "value": RIGHT[domain]}, "gold": RIGHT[domain]}
            task = Task(f"{domain}-{m}", domain, ({"role": "user", "content": asked},), payload=payload)
            store.append(task_record(TaskRow(task), (n, m)))
    store.seal({})
    return directory


def make_model(path: Path, answers: dict[str, str], steps: int = 40) -> Path:
    """A model that answers each domain's question with one of its letters, about evenly."""
    torch.manual_seed(0)
    model, rows = Transformer(SHAPE, seed=4), []
    for domain, letters in answers.items():
        for letter in letters:
            messages = [{"role": "user", "content": ASKED[domain]}, {"role": "assistant", "content": letter}]
            chat = encode_with_sources(messages, TOKENIZER, False)
            rows.append((chat.tokens, chat.loss_mask))
    tokens, mask = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        adam.zero_grad()
        losses[mask[:, 1:]].mean().backward()
        adam.step()
    save_model(model, path, dtype="float32")
    TOKENIZER.backend.save(str(path / "tokenizer.json"))
    return path


def site(directory: Path) -> Site:
    return Site(directory, World(0, 1, torch.device("cpu")), RunLog(directory, quiet=True))


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_model(model, "float32").state_dict()


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("given")
    return make_model(root / "init", dict.fromkeys(ASKED, LETTERS)), make_store(root / "tasks")


@pytest.fixture(scope="module")
def in_turn(given, tmp_path_factory) -> Path:
    return specialists.main(CONFIG, given[0], open_tasks(given[1], "inline", "all"), site(tmp_path_factory.mktemp("turn")))


def test_each_specialist_learns_its_domain_from_the_one_base(given, in_turn):
    found = read_specialists(in_turn)
    assert [(s.name, s.thinking) for s in found] == [("logic-direct", False), ("maths-direct", False)]
    for each in found:
        success = [value for _, value in read_metrics(each.model.parent, f"rollout/success/{each.domain}")]
        assert len(success) == 6 and success[-1] > success[0] + 0.2, success
        own, records = read_lineage(each.model)
        assert {p["role"] for p in records[own]["parents"]} == {"init", "tasks"}
    bases = {read_lineage(s.model)[1][read_lineage(s.model)[0]]["parents"][0]["id"] for s in found}
    assert len(bases) == 1


def test_what_is_other_in_a_domain_is_other_there_alone(in_turn):
    assert CONFIG.run("maths", "thinking").policy.default.beta == 0.0 and CONFIG.run("maths", "thinking").mode.thinking
    assert CONFIG.run("logic", "direct") == replace(RUNS, mode=replace(RUNS.mode, thinking=False))
    with pytest.raises(UserError, match=r"by_domain.maths.*no such field"):
        specialists.Config(by_domain={"maths": {"politics": {}}})
    read = load(specialists.Config, None, ["--by_domain.maths.pace.steps=7", "--modes=['thinking', 'direct']"])
    assert read.run("maths", "direct").pace.steps == 7 and read.run("logic", "direct").pace.steps == 100


def test_side_by_side_they_have_the_bits_of_those_in_turn(given, in_turn, tmp_path):
    config = replace(CONFIG, side_by_side=2)
    specialists.main(config, given[0], open_tasks(given[1], "inline", "all"), site(tmp_path))
    for name in ("logic-direct", "maths-direct"):
        a, b = weights(in_turn / name / "model"), weights(tmp_path / name / "model")
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_that_fails_is_named_and_the_others_end(given, tmp_path, side_by_side):
    few = replace(CONFIG, grpo=replace(RUNS, pace=Pace(steps=1)), side_by_side=side_by_side)
    (tmp_path / "logic-direct").mkdir()
    (tmp_path / "logic-direct" / "config.toml").write_text("prompts = 99\n")
    with pytest.raises(UserError, match=r"1 of 2 specialists failed: logic-direct: .*another configuration"):
        specialists.main(few, given[0], open_tasks(given[1], "inline", "all"), site(tmp_path))
    assert (tmp_path / "maths-direct" / "model").is_dir() and not (tmp_path / "specialists.json").exists()
    ended = {event["name"]: event["failure"] for event in read_events(tmp_path, "specialist ended")}
    assert ended["maths-direct"] == "" and "another configuration" in ended["logic-direct"]
    with pytest.raises(UserError, match="no such file"):
        read_specialists(tmp_path)


def test_a_domain_without_tasks_is_refused(given, tmp_path):
    with pytest.raises(UserError, match="no task of the split all for chess; there is logic, maths"):
        specialists.main(
            replace(CONFIG, domains=("chess",)), given[0], open_tasks(given[1], "inline", "all"), site(tmp_path)
        )  # fmt: skip


RUN = """
import sys, pathlib, torch
from tests.stages.test_specialists import *
torch.set_num_threads(1)
init, tasks, out = map(pathlib.Path, sys.argv[1:])
specialists.main(replace(CONFIG, side_by_side=2), init, open_tasks(tasks, "inline", "all"), site(out))
"""


@pytest.mark.slow
def test_a_killed_runner_is_started_again_and_ends_with_the_same_bits(given, in_turn, tmp_path):
    """Its processes may go on after it: the new runner waits for them instead of working in their directories."""
    command = [sys.executable, "-c", RUN, *map(str, given), str(tmp_path)]
    runner = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."})
    while runner.poll() is None and not list(tmp_path.glob("*/checkpoints/step-*")):
        time.sleep(0.02)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, timeout=300, check=False).returncode == 0
    for each in read_specialists(tmp_path):
        a, b = weights(in_turn / each.name / "model"), weights(each.model)
        assert all(torch.equal(a[key], b[key]) for key in a), each.name


def test_a_specialist_s_name_is_its_domain_and_mode():
    assert Specialist("search", "thinking", Path("x")).name == "search-thinking"


def test_ranks_of_one_run_do_not_wait_for_each_others_lock(tmp_path, monkeypatch):
    """Rank 0 holds the run's lock for all; rank 1 trains beside it. (It waited for ever, and rank 0 for it at a barrier.)"""
    trained = []
    monkeypatch.setattr(specialists.grpo, "main", lambda config, init, pool, place: trained.append(place.world.rank))
    tasks = open_tasks(make_store(tmp_path / "tasks"), "inline", "all")
    planned = [Specialist("maths", "direct", tmp_path / "run" / "maths-direct" / "model")]

    def rank(number: int) -> threading.Thread:
        place = Site.open(tmp_path / "run", World(number, 2, torch.device("cpu")), quiet=True)
        return threading.Thread(target=specialists._in_turn, args=(CONFIG, tmp_path, tasks, place, planned), daemon=True)

    with specialists._alone(planned[0].model.parent):
        first, second = rank(0), rank(1)
        second.start()
        second.join(20)
        first.start()
        time.sleep(0.3)
        assert trained == [1], "rank 1 needs no lock, rank 0 waits for that of another run"
    first.join(20)
    assert trained == [1, 0]
