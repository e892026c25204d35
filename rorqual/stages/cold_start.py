"""The cold start [V3.2, 3.2.2]: thinking in tool use, out of reasoning data without tools and agent data without reasoning.

    seeds (reasoning; agent) -> a model primed on them -> attempts under the merged system prompt -> verifiers -> SFT

The system prompts are the paper's device (rorqual/rollout/system_prompts.py): a model that has learnt to reason under one and
to call tools under another does both, sometimes rightly, under a third. What the verifiers accept is what the model is then
fine-tuned on. A model with no ability yet gets gold trajectories instead: the tasks' own solutions, played through the same
episodes and judged by the same verifiers, with thoughts generated from the plan's state, and labelled as such.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from rorqual.data.accepted import Accepted, read_given, trained_messages, write_accepted
from rorqual.errors import UserError, require
from rorqual.policy import SamplingParams
from rorqual.rollout.agent import AgentConfig, play, speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.gold import Detail, GoldPolicy
from rorqual.rollout.system_prompts import THINKS, USES_TOOLS, Kind, system_prompt, with_system_prompt
from rorqual.rollout.trajectory import Trajectory
from rorqual.stages import sft
from rorqual.stages.sampling import AttemptConfig, attempts
from rorqual.stages.task_set import TaskSet
from rorqual.tasks.episode import AsyncEpisode, Opening
from rorqual.tasks.plans import gold_plan
from rorqual.tasks.task import TaskError
from rorqual.train.lineage import Making, publish
from rorqual.train.loop import Site
from rorqual.train.setup import begin

DATA = "data"
GOLD_ROOM = 1 << 30
"""Gold trajectories are as long as they are; rows that are too long for training are left out there, and counted."""


@dataclass(frozen=True)
class Config:
    kinds: tuple[Kind, ...] = ("reasoning", "answering", "agent", "merged")
    """Data to make: of tasks without tools with and without thinking, of tasks with tools without and with thinking."""
    source: Literal["sampled", "gold", "both"] = "sampled"
    """both: gold for the tasks of which no attempt was accepted."""
    prime: bool = True
    """Fine-tune on the seeds before the merged attempts are drawn; else the given checkpoint draws them."""
    merge_given: tuple[Path, ...] = ()
    """Files of conversations that are trained on along with the rest, and primed on."""
    tasks_per_domain: int | None = None
    """None: all."""
    tasks_by_domain: Mapping[str, int] = field(default_factory=dict)
    """In place of `tasks_per_domain`, for the domains that it names."""
    kept_per_task: int = 1
    """Accepted attempts at one task that are kept, of each kind: the best by score, then the shortest."""
    surfaces: int | None = None
    """So many conversations with tools show them, evenly spread over all; the others are trained on as if no tools had been
    listed. The format's own words about tools are hundreds of tokens that a small model need not read every time. None: all."""
    keep_prompts: bool = False
    """Leave the system prompts in the training data. Without them the model learns to do unasked what it was asked to."""
    detail: Detail = "brief"
    """Of the gold thoughts."""
    attempts: AttemptConfig = field(default_factory=AttemptConfig)
    sft: sft.Config = field(default_factory=sft.Config)
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            kinds=(bool(self.kinds), "at least one kind"),
            tasks_per_domain=((self.tasks_per_domain or 1) >= 1, "at least 1, or none"),
            kept_per_task=(self.kept_per_task >= 1, "at least 1"),
        )


def main(config: Config, init: Path, tasks: TaskSet, site: Site) -> Path:
    """Make the data and fine-tune `init` on it; the finished checkpoint's directory."""
    begin(config, site, init)
    data = conversations(config, init, tasks, site)
    return sft.main(config.sft, init, data / sft.CONVERSATIONS, site.below("sft"))


def conversations(config: Config, init: Path, tasks: TaskSet, site: Site) -> Path:
    """The directory of the training data, with its lineage; made once."""
    final = site.directory / DATA
    if not final.is_dir():
        rows = with_surfaces(make(config, init, tasks, site), config.surfaces)
        given = [record for path in config.merge_given for record in read_given(path)]
        if not rows and not given:
            raise UserError(f"{site.directory}: the verifiers accepted no attempt; start with --source=both, or gold")
        if site.world.is_main:
            part = final.with_name(f".{DATA}.made")
            counts = write_accepted(part / sft.CONVERSATIONS, rows, given)
            site.log.event("conversations made", **counts)
            files = {f"given {n}": path for n, path in enumerate(config.merge_given)}
            publish(part, final, Making("cold_start", config, {"init": init, **tasks.sources, **files}, tasks.settings))
        site.world.barrier()
    return final


def with_surfaces(rows: Sequence[Accepted], most: int | None) -> list[Accepted]:
    """`most` of the conversations with tools, evenly spread, keep their list of tools; None: all do."""
    with_tools = [n for n, row in enumerate(rows) if row.tools]
    if most is None or most >= len(with_tools):
        return list(rows)
    bare = set(with_tools) - {with_tools[n * len(with_tools) // most] for n in range(most)}
    return [replace(row, tools=()) if n in bare else row for n, row in enumerate(rows)]


def make(config: Config, init: Path, tasks: TaskSet, site: Site) -> list[Accepted]:
    """Accepted conversations of every kind: the seeds first, then under the merged prompt."""
    seeds = [row for kind in config.kinds if kind != "merged" for row in _of_kind(config, kind, init, tasks, site)]
    if "merged" not in config.kinds:
        return seeds
    model = init
    if config.prime and config.source != "gold" and seeds:
        model = _primed(config, init, seeds, site)
    return seeds + _of_kind(config, "merged", model, tasks, site)


def _primed(config: Config, init: Path, seeds: Sequence[Accepted], site: Site) -> Path:
    """`init` fine-tuned on the seeds, under their own system prompts."""
    path = site.directory / "seeds.jsonl"
    if site.world.is_main and not path.exists():
        prompted = [replace(row, messages=_prompted(row)) for row in seeds] if not config.keep_prompts else seeds
        write_accepted(path, prompted, [record for given in config.merge_given for record in read_given(given)])
    site.world.barrier()
    return sft.main(config.sft, init, path, site.below("primed"))


def _prompted(row: Accepted) -> tuple[Mapping[str, Any], ...]:
    return with_system_prompt(row.messages, system_prompt(cast(Kind, row.kind), row.domain))


def _of_kind(config: Config, kind: Kind, model: Path, tasks: TaskSet, site: Site) -> list[Accepted]:
    """Accepted conversations of one kind."""
    ids = chosen_tasks(config, kind, tasks)
    rows: list[Accepted] = []
    if config.source != "gold":
        groups = attempts(
            config.attempts, model, ids, lambda name: PromptedEpisode(tasks.open(name), kind), THINKS[kind],
            site.directory / "attempts" / kind, config.seed, site,
        )  # fmt: skip
        rows += [row for group in groups for row in accepted(config, kind, group, tasks, "sampled")]
        _log_attempts(site, kind, [t for group in groups for t in group])
    if config.source != "sampled":
        done = {row.task for row in rows}
        played = gold(config, kind, [name for name in ids if name not in done], tasks, site)
        rows += [row for trajectory in played for row in accepted(config, kind, [trajectory], tasks, "gold")]
    return rows


def chosen_tasks(config: Config, kind: Kind, tasks: TaskSet) -> list[str]:
    """The ids of the tasks that a kind is made of: those with tools or those without."""
    found: list[str] = []
    for domain, ids in tasks.by_domain.items():
        fitting = [name for name in ids if bool(tasks.tasks[name].tools) == USES_TOOLS[kind]]
        found += fitting[: config.tasks_by_domain.get(domain, config.tasks_per_domain)]
    return found


def accepted(
    config: Config, kind: Kind, group: Iterable[Trajectory], tasks: TaskSet, source: Literal["sampled", "gold"]
) -> list[Accepted]:
    """The best attempts at one task that its verifier passed, as conversations."""
    passed = [t for t in group if t.answered and t.verdict is not None and t.verdict.passed]
    passed.sort(key=lambda t: (-(t.verdict.score or 0.0), t.sampled_tokens, t.sample))  # type: ignore[union-attr]
    rows = []
    for trajectory in passed[: config.kept_per_task]:
        task = tasks.tasks[trajectory.task_id]
        messages = trained_messages(trajectory.messages)
        if not config.keep_prompts:
            messages = (*task.messages, *messages[_opening_len(messages) :])
        rows.append(
            Accepted(
                messages, task.tools, THINKS[kind], source, task.family, kind, task.id, trajectory.sample,
                float(trajectory.verdict.score or 0.0),  # type: ignore[union-attr]
            )
        )  # fmt: skip
    return rows


def _opening_len(messages: Sequence[Mapping[str, Any]]) -> int:
    return next(n for n, message in enumerate(messages) if message["role"] == "assistant")


def gold(config: Config, kind: Kind, ids: Sequence[str], tasks: TaskSet, site: Site) -> list[Trajectory]:
    """Gold plans played through the tasks' episodes. A task whose plan can't be had is left out, with an event in the log."""
    archive = Archive(site.directory / "gold" / kind)
    mine = set(ids[site.world.rank :: site.world.size])
    found, missing = [], Counter()
    for name in [n for n in ids if n in mine]:
        if archive.load(name, 0) is None:
            try:
                archive.save(asyncio.run(_play_gold(config, kind, name, tasks)))
            except TaskError as error:
                missing[str(error)] += 1
    site.world.barrier()
    found = [t for name in ids if (t := archive.load(name, 0)) is not None]
    refused = Counter(t.verdict.reasons[:1] if t.verdict else t.detail for t in found if not (t.verdict and t.verdict.passed))
    site.log.event(
        "gold", of_kind=kind, played=len(found), without_plan=dict(missing), refused={str(k): n for k, n in refused.items()}
    )
    return found


async def _play_gold(config: Config, kind: Kind, name: str, tasks: TaskSet) -> Trajectory:
    plan = gold_plan(tasks.tasks[name], tasks.world(name), tasks.isolation)
    policy = GoldPolicy(plan, THINKS[kind], config.detail, f"{config.seed}/{kind}/{name}")
    budget = AgentConfig(
        max_turns=len(plan.moves) + 2, max_calls=len(plan.moves) + 2, max_tokens=GOLD_ROOM, window=GOLD_ROOM,
        max_observation_chars=config.attempts.agent.max_observation_chars,
    )  # fmt: skip
    episode = PromptedEpisode(tasks.open(name), kind)
    try:
        return await play(episode, speaker_of(policy), budget, SamplingParams())
    finally:
        await episode.close()


class PromptedEpisode:
    """An episode that opens with the system prompt of a kind."""

    def __init__(self, episode: AsyncEpisode, kind: Kind):
        self.episode = episode
        self.kind: Kind = kind

    @property
    def task(self) -> Any:
        return self.episode.task

    @property
    def is_over(self) -> bool:
        return self.episode.is_over

    async def reset(self) -> Opening:
        opening = await self.episode.reset()
        prompt = system_prompt(self.kind, self.task.family, min(20, self.task.max_calls or 20))
        return Opening(with_system_prompt(opening.messages, prompt), opening.tools)

    async def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return await self.episode.call(name, arguments)

    async def finish(self, text: str | None = None) -> Any:
        return await self.episode.finish(text)

    async def close(self) -> None:
        await self.episode.close()


def _log_attempts(site: Site, kind: Kind, found: Sequence[Trajectory]) -> None:
    passed = sum(bool(t.verdict and t.verdict.passed) for t in found)
    site.log.event("attempts", of_kind=kind, played=len(found), passed=passed, ends=dict(Counter(str(t.end) for t in found)))
