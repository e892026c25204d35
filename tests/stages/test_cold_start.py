"""The cold start on tasks small enough to watch: gold teaches a model, whose own attempts the verifier then sifts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.data.accepted import Accepted
from rorqual.data.conversations import read_conversations
from rorqual.engine import EngineConfig
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.parallel.world import World
from rorqual.rollout.agent import AgentConfig
from rorqual.rollout.collect import GroupConfig
from rorqual.runlog import RunLog, read_events
from rorqual.stages import cold_start, sft
from rorqual.stages.grpo import SamplingConfig
from rorqual.stages.sampling import AttemptConfig
from rorqual.stages.task_set import open_tasks
from rorqual.tasks import Store, Task, TaskRow, task_record, world_record
from rorqual.train.lineage import content, read_lineage
from rorqual.train.loop import Site
from rorqual.train.optimizer import OptimizerConfig
from tests.byte_tokenizer import byte_tokenizer
from tests.stages.test_grpo import SHAPE
from tests.tasks.worlds import task, world

TOKENIZER = byte_tokenizer()
SHAPE = replace(SHAPE, max_positions=384)
ATTEMPTS = AttemptConfig(
    groups=GroupConfig(4), agent=AgentConfig(max_turns=1, max_turn_tokens=24, window=384),
    sampling=SamplingConfig(temperature=0.7), engine=EngineConfig(block_size=8, cache_tokens=8192),
)  # fmt: skip
TUNE = sft.Config(
    epochs=10, rows=4, length=160, held_out_share=0.0,
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.0, schedule="constant"),
)  # fmt: skip
CONFIG = cold_start.Config(kinds=("reasoning", "answering"), source="gold", attempts=ATTEMPTS, sft=TUNE)


def letter(n: int, right: str) -> Task:
    payload = {"check": {"kind": "exact", "value": right}, "gold": right, "work": "ok"}
    return Task(f"l{n}", "logic", ({"role": "user", "content": f"Say {right}."},), payload=payload)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Tasks that ask for a letter; a world with one task; an untrained model."""
    root = tmp_path_factory.mktemp("cold")
    texts, general = Store(root / "texts"), Store(root / "general")
    for n in range(8):
        texts.append(task_record(TaskRow(letter(n, "abcd"[n % 4])), (n,)))
    texts.seal({})
    general.append(world_record(world(), (0,)))
    general.append(task_record(TaskRow(task()), (1,)))
    broken = task(id="t2", solution="def solution(tools):\n    return [][1]\n")
    general.append(task_record(TaskRow(broken), (2,)))
    wrong = task(id="t3", solution="def solution(tools):\n    return '0'\n")
    general.append(task_record(TaskRow(wrong), (3,)))
    general.seal({})
    save_model(Transformer(SHAPE, seed=4), root / "init", dtype="float32")
    TOKENIZER.backend.save(str(root / "init" / "tokenizer.json"))
    return root / "texts", root / "general", root / "init"


def site(directory: Path) -> Site:
    return Site(directory, World(0, 1, torch.device("cpu")), RunLog(directory, quiet=True))


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "data" / sft.CONVERSATIONS).read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(stores, tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("gold")
    return directory, cold_start.main(CONFIG, stores[2], open_tasks(stores[0], "inline", "all"), site(directory))


def test_gold_of_text_tasks_comes_in_both_modes_and_is_labelled(taught):
    rows = lines(taught[0])
    assert len(rows) == 16 and {(r["kind"], r["thinking"]) for r in rows} == {("reasoning", True), ("answering", False)}
    assert {r["source"] for r in rows} == {"gold"} and {r["domain"] for r in rows} == {"logic"}
    assert {r["thoughts"] for r in rows} == {"generated from the plan's state", "none"}
    assert all(m["role"] != "system" for r in rows for m in r["messages"]), "the device is taken out again"


def test_the_model_s_own_attempts_are_kept_where_the_verifier_accepts_them(taught, stores, tmp_path):
    """The prompts stay in the data here, so that the taught model is asked as it was taught."""
    tasks = open_tasks(stores[0], "inline", "all")
    prompted = replace(CONFIG, kinds=("answering",), keep_prompts=True)
    model = cold_start.main(prompted, stores[2], tasks, site(tmp_path / "taught"))
    sampled = replace(prompted, source="sampled", kept_per_task=2)
    cold_start.main(sampled, model, tasks, site(tmp_path / "own"))
    rows = lines(tmp_path / "own")
    event = read_events(tmp_path / "own", "attempts")[0]
    assert event["played"] == 32 and len(rows) >= 6 and len(rows) <= 16
    assert {r["source"] for r in rows} == {"sampled"} and all(r["reward"] == 1.0 for r in rows)
    for row in rows:
        assert row["messages"][-1]["content"].strip(" .") == row["messages"][-2]["content"][4], "only right answers are kept"
        assert row["messages"][0]["role"] == "system"


def test_gold_fills_what_no_attempt_solved(stores, tmp_path):
    config = replace(CONFIG, kinds=("answering",), source="both", sft=replace(TUNE, epochs=1))
    cold_start.main(config, stores[2], open_tasks(stores[0], "inline", "all"), site(tmp_path))
    rows = lines(tmp_path)
    assert len(rows) == 8 and sum(r["source"] == "gold" for r in rows) >= 6, "the untrained model can hardly say a letter"


def test_nothing_accepted_is_an_error_that_says_what_to_do(stores, tmp_path):
    config = replace(CONFIG, source="sampled", kinds=("reasoning",))
    with pytest.raises(UserError, match=r"accepted no attempt; start with --source=both"):
        cold_start.main(config, stores[2], open_tasks(stores[0], "inline", "all"), site(tmp_path))


def test_tools_come_with_and_without_thoughts_and_what_the_verifier_refuses_is_left_out(stores, tmp_path):
    tasks = open_tasks(list(stores[:2]), "inline", "all")
    config = replace(CONFIG, kinds=("agent", "merged"), source="gold")
    data = cold_start.conversations(config, stores[2], tasks, site(tmp_path))
    rows = lines(tmp_path)
    assert [(r["kind"], r["task"], r["thinking"]) for r in rows] == [("agent", "t1", False), ("merged", "t1", True)]
    for row in rows:
        said = [m for m in row["messages"] if m["role"] == "assistant"]
        assert [m["tool_calls"][0]["function"]["name"] for m in said] == ["list_slots", "book", "submit"]
        assert all(bool(m.get("reasoning_content")) == row["thinking"] for m in said)
        assert row["messages"][-1]["role"] == "assistant" and row["tools"]
    event = read_events(tmp_path, "gold")[0]
    assert any("its solution fails" in reason for reason in event["without_plan"]) and event["played"] == 2
    found = read_conversations(data / sft.CONVERSATIONS, TOKENIZER, 100_000, 0.0)
    text = TOKENIZER.decode(found.train[1].tokens[found.train[1].trained].tolist())
    assert "slot S-3, from list_slots." in text and "capacity" not in text, "loss on the agent's words, not on observations"


def test_surfaces_stay_on_so_many_conversations_evenly_spread():
    rows = [Accepted((), ({"n": n},) if n % 3 else (), True, "gold") for n in range(30)]
    kept = [n for n, row in enumerate(cold_start.with_surfaces(rows, 4)) if row.tools]
    assert kept == [1, 8, 16, 23] and len(cold_start.with_surfaces(rows, 4)) == 30
    assert cold_start.with_surfaces(rows, None) == cold_start.with_surfaces(rows, 20) == rows
    assert not any(row.tools for row in cold_start.with_surfaces(rows, 0))


def test_data_and_model_know_where_they_come_from(taught, stores):
    own, records = read_lineage(taught[1])
    roles = {parent["role"]: records[parent["id"]] for parent in records[own]["parents"]}
    assert roles["data"]["stage"] == "cold_start" and roles["init"]["stage"] == "given"
    tasks = {p["role"]: p for p in roles["data"]["parents"]}["tasks"]
    assert tasks["content"] == content(stores[0]) and roles["data"]["settings"] == {"isolation": "inline", "split": "all"}


def test_given_conversations_are_trained_on_along(stores, tmp_path):
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "Z"}]}) + "\n")
    config = replace(CONFIG, merge_given=(given,))
    cold_start.conversations(config, stores[2], open_tasks(stores[0], "inline", "all"), site(tmp_path / "run"))
    assert lines(tmp_path / "run")[-1]["source"] == "given" and len(lines(tmp_path / "run")) == 17


RUN = """
import sys, pathlib, torch
from tests.stages.test_cold_start import *
torch.set_num_threads(1)
config = replace(CONFIG, source="both", kinds=("answering",), sft=replace(TUNE, epochs=3, checkpoint_every=1))
init, texts, out = map(pathlib.Path, sys.argv[1:])
cold_start.main(config, init, open_tasks(texts, "inline", "all"), site(out))
"""


def start(stores, directory):
    command = [sys.executable, "-c", RUN, str(stores[2]), str(stores[0]), str(directory)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."})


@pytest.fixture(scope="module")
def whole(stores, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    assert start(stores, directory).wait(300) == 0
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("until", ["attempts/answering/*.npz", "sft/checkpoints/step-*"])
def test_killed_it_ends_with_the_same_bits_and_plays_nothing_twice(stores, whole, tmp_path, until):
    process = start(stores, tmp_path / "killed")
    while process.poll() is None and not list((tmp_path / "killed").glob(until)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.npz")}
    assert written and start(stores, tmp_path / "killed").wait(240) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in written.items()), "an attempt was played twice"
    a, b = (load_model(directory / "sft" / "model", "float32").state_dict() for directory in (whole, tmp_path / "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_rebuilt_from_the_checkpoint_s_record_data_and_model_have_the_same_hashes(taught, stores, tmp_path):
    from rorqual.stages import rebuild

    report = rebuild.main(taught[1], tmp_path, [stores[2], stores[0]], World(0, 1, torch.device("cpu")))
    assert report["same"] and [r["stage"] for r in report["records"].values()] == ["cold_start", "sft"]
