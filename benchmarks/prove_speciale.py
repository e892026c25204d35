"""Speciale's length penalty against the standard one at equal steps: does reasoning grow longer, and held-out success with it?

The two runs differ in one number: the weight of the length penalty (`speciale.Config.length_share`). Base, tasks, steps and seeds
are the same; both are judged on the same held-out tasks. Nothing is asserted about who wins: `verdict` says what came, from
Student's intervals over seeds of the difference between the two runs of a seed. How strict the standard penalty is decides how
much there is to win, and the paper does not publish it: three weights are shown, the last of which costs more than a right answer
gains over a guess. The base is the harness's own smallest: sums
modulo 5, one term after another in its thoughts, and in half of its training data the thoughts break off early, so that how far
it thinks is its choice, and an answer without them is a guess.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from benchmarks.prove import jobs, workspace
from rorqual.chat import SPECIAL_TOKENS
from rorqual.engine import EngineConfig
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.parallel.world import World
from rorqual.rewards.domains import DomainReward, RewardConfig
from rorqual.rewards.terms import LengthPenalty
from rorqual.rollout.agent import AgentConfig
from rorqual.rollout.collect import GroupConfig
from rorqual.rollout.speaker import ChatMode
from rorqual.rollout.trajectory import Trajectory
from rorqual.runlog import RunLog, read_metrics, write_atomically
from rorqual.stages import grpo, sft, speciale
from rorqual.stages.mismatch_lab import interval
from rorqual.stages.sampling import AttemptConfig, attempts
from rorqual.stages.task_set import TaskSet, open_tasks
from rorqual.tasks import Store, Task, TaskRow, task_record
from rorqual.train.loop import Pace, Site
from rorqual.train.optimizer import OptimizerConfig
from rorqual.train.policy_step import DomainObjective, PolicyConfig
from rorqual.workers import Workers, open_pool

SECONDS = 3600
QUICK_SECONDS = 60
MODULUS, TERMS = 5, 6
WEIGHTS, LENGTH_SHARE = (0.5, 1.0, 2.0), 0.1
"""Of the standard recipe's length penalty, and what Speciale keeps of it."""
ARMS = ("standard", "speciale")
CPU = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Size:
    """How large an experiment is."""

    seeds: int
    steps: int
    prompts: int
    held_out: int
    conversations: int
    epochs: int


FULL = Size(seeds=6, steps=40, prompts=8, held_out=300, conversations=8000, epochs=3)
QUICK = Size(seeds=1, steps=2, prompts=2, held_out=8, conversations=64, epochs=1)


# --- the smallest base


def terms_of(rng: random.Random) -> list[int]:
    return [rng.randrange(MODULUS) for _ in range(TERMS)]


def question(terms: list[int]) -> str:
    """As wide as the thoughts: a term and the thought about it are always equally far apart, which a tiny model can learn."""
    return "".join(f"{term}  " for term in terms)


def thoughts(terms: list[int], count: int) -> str:
    """Each term with the sum so far, and a full stop, which may come early."""
    return " ".join(f"{term}{sum(terms[: n + 1]) % MODULUS}" for n, term in enumerate(terms[:count])) + "."


def sum_tasks(directory: Path, count: int, seed: int) -> Path:
    """A store of `count` different sums."""
    store, rng, seen = Store(directory), random.Random(f"tasks/{seed}"), set[str]()
    if store.is_sealed:
        return directory
    while len(seen) < count:
        terms = terms_of(rng)
        if question(terms) not in seen:
            payload = {"check": {"kind": "exact", "value": str(sum(terms) % MODULUS)}, "gold": str(sum(terms) % MODULUS)}
            task = Task(
                f"sum-{''.join(map(str, terms))}", "maths", ({"role": "user", "content": question(terms)},), payload=payload
            )
            store.append(task_record(TaskRow(task), (len(seen),)))
            seen.add(question(terms))
    store.seal({})
    return directory


def conversations(path: Path, count: int, held_out: set[str]) -> Path:
    """Sums with their thoughts, half of them broken off early, none of them held out."""
    rng, lines = random.Random("conversations"), []
    while len(lines) < count:
        terms = terms_of(rng)
        if question(terms) in held_out:
            continue
        known = len(terms) if rng.random() < 0.5 else rng.randrange(len(terms))
        reply = {"role": "assistant", "reasoning_content": thoughts(terms, known), "content": str(sum(terms) % MODULUS)}
        lines.append(json.dumps({"messages": [{"role": "user", "content": question(terms)}, reply], "thinking": True}))
    path.write_text("\n".join(lines) + "\n")
    return path


def own_base(directory: Path, size: Size, held_out: set[str]) -> Path:
    """A model of some ten thousand parameters, fine-tuned from nothing on the conversations."""
    backend = Backend(models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    shape = ModelConfig(
        vocab_size=backend.get_vocab_size(), dim=48, n_layers=2, n_dense_layers=1, inter_dim=128, max_positions=64, n_heads=4,
        q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=12, v_head_dim=12, rope_theta=100.0, yarn=None,
        index_n_heads=2, index_head_dim=16, index_topk=64, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=48,
        n_expert_groups=1, n_limited_groups=1, n_mtp_layers=0, init_std=0.1,
    )  # fmt: skip
    start = directory / "start"
    save_model(Transformer(shape, seed=1), start, dtype="float32")
    backend.save(str(start / "tokenizer.json"))
    data = conversations(directory / "sums.jsonl", size.conversations, held_out)
    config = sft.Config(
        epochs=size.epochs,
        rows=32,
        length=64,
        held_out_share=0.02,
        optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.0),
    )
    return sft.main(config, start, data, site(directory / "sft"))


# --- the two recipes


def recipe(size: Size, seed: int, weight: float) -> grpo.Config:
    """The standard one: a strict length penalty."""
    penalty = LengthPenalty(free_tokens=6, full_tokens=30)
    return grpo.Config(
        pace=Pace(size.steps, checkpoint_every=max(size.steps, 1)), prompts=size.prompts, groups=GroupConfig(8, 64),
        agent=AGENT, rewards=RewardConfig(DomainReward(length=weight, language=0.0, penalty=penalty)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0), engine=ENGINE,
        policy=PolicyConfig(default=DomainObjective(beta=0.0)), mode=ChatMode(thinking=True), seed=seed,
    )  # fmt: skip


AGENT = AgentConfig(max_turns=1, max_tokens=40, max_turn_tokens=40, window=64)
ENGINE = EngineConfig(block_size=16, cache_tokens=8192, record_selection=True)


def trained(name: str, base: Path, tasks: TaskSet, config: grpo.Config, directory: Path) -> Path:
    """The base after one of the two recipes: they differ in what is left of the length penalty."""
    if name == "standard":
        return grpo.main(config, base, grpo.pool_of(tasks), site(directory))
    domains = tuple(tasks.by_domain)
    whole = speciale.Config(iterations=0, reasoning=config, domains=domains, length_share=LENGTH_SHARE, seed=config.seed)
    return speciale.main(whole, base, tasks, site(directory))


def measured(model: Path, tasks: TaskSet, config: grpo.Config, directory: Path) -> list[tuple[float, float]]:
    """(success, sampled tokens) of one attempt at each held-out task."""
    plan = AttemptConfig(GroupConfig(1, 64), config.agent, config.sampling, replace(config.engine, record_selection=False))
    place = site(directory)
    played = attempts(plan, model, list(tasks.tasks), tasks.open, config.mode.thinking, directory / "attempts", 99, place)
    return [_of(trajectory) for group in played for trajectory in group]


def _of(trajectory: Trajectory) -> tuple[float, float]:
    return float(bool(trajectory.verdict and trajectory.verdict.passed)), float(trajectory.sampled_tokens)


def site(directory: Path) -> Site:
    return Site(directory, CPU, RunLog(directory, quiet=True))


# --- what is run, and what comes of it


@dataclass(frozen=True)
class Cell:
    """One run of one recipe. weight: of the standard length penalty."""

    arm: str
    weight: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.weight}-{self.seed}"


@dataclass(frozen=True)
class Found:
    """Means over the held-out tasks, and the length of thoughts in training by iteration."""

    success: float
    tokens: float
    curve: tuple[float, ...] = ()


def play(cell: Cell, base: Path, train: TaskSet, held_out: TaskSet, size: Size, root: Path) -> Found:
    """Train and measure one cell, in a process of its own; what was found is kept, and not looked for again."""
    kept = root / "found" / f"{cell.name}.json"
    if kept.exists():
        return Found(**json.loads(kept.read_text()))
    torch.set_num_threads(1)
    config, place = recipe(size, cell.seed, cell.weight), root / cell.name
    model = trained(cell.arm, base, train, config, place)
    curve = next(found for path in (place, place / "reasoning") if (found := read_metrics(path, "rollout/sampled_tokens")))
    found = means(measured(model, held_out, config, root / f"measured-{cell.name}"), [value for _, value in curve])
    kept.parent.mkdir(exist_ok=True)
    write_atomically(kept, json.dumps(asdict(found)))
    return found


def means(attempts: Sequence[tuple[float, float]], curve: Sequence[float] = ()) -> Found:
    return Found(fmean(s for s, _ in attempts), fmean(t for _, t in attempts), tuple(round(value, 2) for value in curve))


def main(quick: bool) -> dict:
    size, weights = (QUICK, WEIGHTS[:1]) if quick else (FULL, WEIGHTS)
    cells = [Cell(arm, weight, seed) for seed in range(size.seeds) for weight in weights for arm in ARMS]
    with workspace("speciale") as root:
        base, train, held_out = given(root, size)
        start = means(measured(base, held_out, recipe(size, 0, 0.0), root / "measured-base"))
        with open_pool(Workers(jobs())) as pool:
            running = {cell: pool.submit(play, cell, base, train, held_out, size, root) for cell in cells}
            found = {cell: future.result() for cell, future in running.items()}
    return report(start, found, size)


def given(root: Path, size: Size) -> tuple[Path, TaskSet, TaskSet]:
    """Base, tasks to learn from, tasks held out."""
    stores = {
        name: sum_tasks(root / name, count, n)
        for n, (name, count) in enumerate({"held_out": size.held_out, "train": 400}.items())
    }
    held_out = open_tasks(stores["held_out"], "inline", "all")
    train = open_tasks(stores["train"], "inline", "all")
    unseen = {name: task for name, task in train.tasks.items() if name not in held_out.tasks}
    base = own_base(root / "base", size, {task.prompt for task in held_out.tasks.values()})
    return base, replace(train, tasks=unseen), held_out


def report(start: Found, found: Mapping[Cell, Found], size: Size) -> dict:
    assert all(each.tokens > 0 for cell, each in found.items() if cell.arm == "speciale"), "it ended by saying nothing"
    weights = sorted({cell.weight for cell in found})
    return {
        **asdict(size), "length_share": LENGTH_SHARE, "base": {"success": start.success, "tokens": start.tokens},
        "by_weight": {str(weight): _compared(weight, found) for weight in weights},
    }  # fmt: skip


def _compared(weight: float, found: Mapping[Cell, Found]) -> dict:
    """Both recipes at one weight: means and differences with Student's intervals over seeds, and what they say."""
    seeds = sorted({cell.seed for cell in found})
    shown: dict[str, dict] = {}
    for measure in ("success", "tokens"):
        values = {arm: [getattr(found[Cell(arm, weight, seed)], measure) for seed in seeds] for arm in ARMS}
        differences = [other - one for one, other in zip(values["standard"], values["speciale"], strict=True)]
        shown[measure] = {arm: interval(values[arm]) for arm in ARMS} | {"speciale less standard": interval(differences)}
    curves = {
        arm: [round(fmean(step), 2) for step in zip(*(found[Cell(arm, weight, s)].curve for s in seeds), strict=True)]
        for arm in ARMS
    }
    says = {name: shown[name]["speciale less standard"]["low"] > 0 for name in shown}
    verdict = {"reasoning is longer": says["tokens"], "held-out success is higher": says["success"]}
    return {**shown, "tokens_by_iteration": curves, "verdict": verdict}
