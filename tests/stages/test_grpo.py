"""The RL stage on a task small enough to watch: it learns what is rewarded, not what is shuffled; killed, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from rorqual.chat import encode_with_sources
from rorqual.engine import EngineConfig
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.parallel.world import World
from rorqual.rollout.agent import AgentConfig
from rorqual.rollout.collect import GroupConfig
from rorqual.rollout.speaker import ChatMode
from rorqual.rollout.trajectory import End, Trajectory
from rorqual.runlog import RunLog, read_metrics
from rorqual.stages import grpo
from rorqual.tasks.verdict import Outcome, Verdict, failed, passed
from rorqual.train.loop import Pace, Site
from rorqual.train.optimizer import OptimizerConfig
from rorqual.train.policy_step import DomainObjective, PolicyConfig
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
SHAPE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, dim=32, n_layers=2, n_dense_layers=1, inter_dim=48, max_positions=256, n_heads=2,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, yarn=None, index_n_heads=2,
    index_head_dim=16, index_topk=4, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=16, n_expert_groups=1,
    n_limited_groups=1, n_mtp_layers=0, init_std=0.1,
)  # fmt: skip
LETTERS = "abcdefgh"


@dataclass
class Letter:
    """Asked for a letter; a and b are right."""

    id: str
    messages: tuple = ({"role": "user", "content": "Say."},)
    tools: tuple = ()
    is_over: bool = False
    calls: list = field(default_factory=list)

    @property
    def task(self):
        return self

    async def reset(self):
        return self

    async def call(self, name, arguments):
        return ""

    async def finish(self, text=None):
        return passed() if text in ("a", "b") else failed("another letter")


POOL = grpo.TaskPool({"letters": ["t0", "t1", "t2"], "more": ["u0"]}, Letter)
CONFIG = grpo.Config(
    pace=Pace(steps=12, checkpoint_every=6),
    prompts=4,
    groups=GroupConfig(8),
    agent=AgentConfig(max_turns=1, max_turn_tokens=4, window=200),
    mode=ChatMode(thinking=False),
    optimizer=OptimizerConfig(learning_rate=0.004, schedule="constant", weight_decay=0.0),
    engine=EngineConfig(block_size=8, cache_tokens=2048, record_selection=True),
    policy=PolicyConfig(default=DomainObjective(beta=0.01)),
)


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    return save_taught(tmp_path_factory.mktemp("init") / "model", SHAPE)


def save_taught(path: Path, shape: ModelConfig) -> Path:
    """A model that answers with one of eight letters, about evenly: trained on that in a second or two."""
    torch.manual_seed(0)
    model = Transformer(shape, seed=4)
    rows = []
    for letter in LETTERS:
        chat = encode_with_sources(
            [{"role": "user", "content": "Say."}, {"role": "assistant", "content": letter}], TOKENIZER, False
        )
        rows.append((chat.tokens, chat.loss_mask))
    tokens, mask = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = losses[mask[:, 1:]].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    save_model(model, path, dtype="float32")
    TOKENIZER.backend.save(str(path / "tokenizer.json"))
    return path


def train(config, init, directory) -> dict[str, list[float]]:
    log = RunLog(directory, quiet=True)
    grpo.main(config, init, POOL, Site(directory, World(0, 1, torch.device("cpu")), log))
    log.close()
    names = ("rollout/success", "train/mismatch_abs", "train/clip_share", "train/kl", "train/index_loss", "train/entropy")
    return {name: [value for _, value in read_metrics(directory, name)] for name in names}


def test_success_rises_with_true_rewards_and_stays_with_shuffled_ones(init, tmp_path):
    learnt = train(CONFIG, init, tmp_path / "true")
    shuffled = train(replace(CONFIG, shuffle_rewards=True), init, tmp_path / "shuffled")
    start = sum(learnt["rollout/success"][:2]) / 2
    assert 0.05 < start < 0.55
    assert sum(learnt["rollout/success"][-2:]) / 2 > 0.8, learnt["rollout/success"]
    assert sum(shuffled["rollout/success"][-2:]) / 2 < 0.5, shuffled["rollout/success"]
    assert max(learnt["train/mismatch_abs"]) < 1e-5, "one update per batch: what was sampled is what is trained"
    assert learnt["train/kl"][-1] > learnt["train/kl"][0] == pytest.approx(0, abs=1e-6)


def test_several_updates_on_a_batch_go_off_policy_and_say_so(init, tmp_path):
    found = train(replace(CONFIG, updates=3, pace=Pace(steps=2)), init, tmp_path)
    assert max(found["train/mismatch_abs"]) > 1e-3


RUN = """
import sys, torch, pathlib
from tests.stages.test_grpo import *
from dataclasses import replace
torch.set_num_threads(1)
train(replace(CONFIG, pace=Pace(steps=6, checkpoint_every=2)), pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


def start_run(init, directory):
    return subprocess.Popen([sys.executable, "-c", RUN, str(init), str(directory)], env={**os.environ, "PYTHONPATH": "."})


def wait_for(condition, process, seconds=100.0):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, "the run ended, or never got there"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("step", "files"), [(0, 7), pytest.param(3, 1, marks=pytest.mark.slow), pytest.param(4, 20, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_ends_with_the_same_bits_and_plays_nothing_twice(init, tmp_path, step, files):
    """Killed as soon as so many attempts of an iteration are archived: before the first checkpoint, after one, between two."""
    whole = start_run(init, tmp_path / "whole")
    assert whole.wait(120) == 0
    killed = start_run(init, tmp_path / "killed")
    archive = tmp_path / "killed" / "rollouts" / f"{step:08d}"
    wait_for(lambda: len(list(archive.glob("[!.]*.npz"))) >= files, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "rollouts").rglob("*.npz")}
    assert start_run(init, tmp_path / "killed").wait(120) == 0
    for path, time_ns in written.items():
        assert not path.exists() or path.stat().st_mtime_ns == time_ns, f"{path.name} was played twice"
    a, b = (load_model(tmp_path / name / "model", "float32").state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_attempts_without_a_reward_and_flat_groups_teach_nothing():
    def attempt(sample, verdict, end=End.ANSWERED):
        return Trajectory("t0", sample, (), end, verdict, ({"role": "user", "content": "q"},))

    broken = Verdict(Outcome.INVALID, None, ("raised",))
    groups = [
        [attempt(0, passed()), attempt(1, broken), attempt(2, failed("x")), attempt(3, None, End.WORLD_FAILED)],
        [attempt(0, passed()), attempt(1, passed())],
    ]
    items, metrics = grpo.learnable(groups, POOL, CONFIG, 0)
    assert items == [] and metrics["rollout/no_reward"] == pytest.approx(2 / 6) and metrics["rollout/flat_groups"] == 0.5


def test_tasks_are_drawn_by_domain_as_a_function_of_the_seed():
    drawn = POOL.draw(3, {"letters": 1.0}, "s")
    assert drawn == POOL.draw(3, {"letters": 1.0}, "s") and sorted(drawn) == ["t0", "t1", "t2"]
    assert set(POOL.draw(50, {"more": 1.0}, "s")) == {"u0"}


def test_mini_batches_keep_trajectories_whole():
    class Of:
        def __init__(self, trajectory):
            self.trajectory = trajectory

    items = [Of(t) for t in (1, 1, 2, 3, 3, 3, 4)]
    batches = grpo.mini_batches(items, 2, "s")
    assert sorted(i.trajectory for b in batches for i in b) == [1, 1, 2, 3, 3, 3, 4]
    assert not {i.trajectory for i in batches[0]} & {i.trajectory for i in batches[1]}


def test_a_directory_of_another_configuration_is_refused(init, tmp_path):
    train(replace(CONFIG, pace=Pace(steps=0)), init, tmp_path)
    with pytest.raises(UserError, match=r"prompts \(was 4, is 5\)"):
        train(replace(CONFIG, prompts=5, pace=Pace(steps=0)), init, tmp_path)
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["kind"] == "begin"
