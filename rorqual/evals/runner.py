"""Playing a benchmark: N attempts at each task under one context strategy, every finished attempt on disk at once.

    OUT/evaluation.json     what was asked for, and of what policy
    OUT/attempts/KEY/...    finished attempts, by what they depend on: task, policy, protocol, strategy, seed
    OUT/results.json        the table: a pure function of the attempts

An attempt is stored under a digest of everything it depends on, so a run that was killed goes on where it was, a larger limit
or more samples add to what there is, and a changed task or policy is played anew. Nothing is ever overwritten but by the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import require
from rorqual.evals.benchmark import Benchmark, Suite
from rorqual.evals.policies import PLAYED, Played, Player
from rorqual.policy import ChatPolicy, ChatReply, Message, SamplingParams
from rorqual.rollout.agent import AgentConfig, Strategy, turn_seed
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import GroupConfig, collect
from rorqual.rollout.trajectory import End, Trajectory
from rorqual.tasks.episode import AsyncEpisode
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, invalid

Context = Literal["none", "summary", "discard-75", "discard-all", "parallel-fewest-step"]
PARALLEL = "parallel-fewest-step"
_STRATEGIES: dict[str, Strategy] = {
    "none": "none", PARALLEL: "none", "summary": "summary", "discard-75": "discard_75", "discard-all": "discard_all",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One evaluation. Where a field is None the benchmark's protocol decides."""

    context: Context = "none"
    runs: int = 4
    """N of parallel-fewest-step: independent runs of which the one with the fewest steps counts."""
    samples: int = 1
    """n: attempts at each task that count."""
    seed: int = 0
    concurrency: int = 16
    temperature: float | None = None
    top_p: float | None = None
    thinking: bool | None = None
    max_tokens: int | None = None
    """Sampled tokens of one attempt, resets included."""
    max_turn_tokens: int | None = None
    max_turns: int | None = None
    window: int | None = None
    trigger_share: float = 0.8
    retry_failures: bool = False
    """Play attempts anew that ended because the policy or the world failed."""

    def __post_init__(self) -> None:
        require(
            self,
            runs=(self.runs >= 1, "at least 1"),
            samples=(self.samples >= 1, "at least 1"),
            concurrency=(self.concurrency >= 1, "at least 1"),
        )

    @property
    def attempts(self) -> int:
        """Attempts played at each task."""
        return self.samples * (self.runs if self.context == PARALLEL else 1)

    def agent(self, benchmark: Benchmark) -> AgentConfig:
        protocol = benchmark.protocol
        tokens, turns = _given(self.max_tokens, protocol.max_tokens), _given(self.max_turns, protocol.max_turns)
        return AgentConfig(
            max_turns=turns, max_tokens=tokens, max_turn_tokens=_given(self.max_turn_tokens, tokens),
            max_calls=max(64, 4 * turns), window=_given(self.window, protocol.window),
            strategy=_STRATEGIES[self.context], trigger_share=self.trigger_share,
        )  # fmt: skip

    def params(self, benchmark: Benchmark) -> SamplingParams:
        protocol = benchmark.protocol
        temperature, top_p = _given(self.temperature, protocol.temperature), _given(self.top_p, protocol.top_p)
        return SamplingParams(max_tokens=_given(self.max_tokens, protocol.max_tokens), temperature=temperature, top_p=top_p)

    def thinks(self, benchmark: Benchmark) -> bool:
        return _given(self.thinking, benchmark.protocol.thinking)


def _given(value: Any, protocols: Any) -> Any:
    return protocols if value is None else value


@dataclass
class Cache:
    """The attempts of one evaluation, each under a digest of what it depends on. It stands where `collect` takes an Archive."""

    directory: Path
    keys: Mapping[str, str]
    """task id -> digest of task and settings."""
    retry_failures: bool = False
    measures: dict[int, dict[str, float]] = field(default_factory=dict)
    """What an attempt under way has measured, by its asyncio task."""

    def load(self, task_id: str, sample: int) -> Trajectory | None:
        found = self._archive(task_id).load(task_id, sample)
        if found is not None and self.retry_failures and found.end in (End.POLICY_FAILED, End.WORLD_FAILED):
            return None
        return found

    def save(self, trajectory: Trajectory) -> None:
        mine = self.measures.pop(id(asyncio.current_task()), {})
        self._archive(trajectory.task_id).save(replace(trajectory, measures={**trajectory.measures, **mine}))

    def _archive(self, task_id: str) -> Archive:
        key = self.keys[task_id]
        return Archive(self.directory / key[:2] / key)


def cache(directory: Path, benchmark: Benchmark, suite: Suite, config: Config, identity: str) -> Cache:
    settings = {
        "policy": identity,
        "benchmark": benchmark.name,
        "agent": dataclasses.asdict(config.agent(benchmark)),
        "params": dataclasses.asdict(config.params(benchmark)),
        "thinking": config.thinks(benchmark),
        "seed": config.seed,
    }
    keys = {task_id: digest({**settings, "task": task.to_json()}, 24) for task_id, task in suite.tasks.items()}
    _clear_parts(directory / "attempts")
    return Cache(directory / "attempts", keys, config.retry_failures)


def _clear_parts(directory: Path) -> None:
    """Remove what writers that were killed left half written; a part's name ends in .PID.part."""
    for part in directory.rglob(".*.part"):
        if not Path("/proc", part.name.split(".")[-2]).exists():
            part.unlink(missing_ok=True)


@dataclass
class _Summariser:
    """Counts what summing up costs, and gives it a seed of its own, so that a run is repeated with the same summaries."""

    policy: ChatPolicy
    cache: Cache

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        seed = turn_seed(0, digest(list(messages)), 0, 0) if params.seed is None else params.seed
        reply = await self.policy.reply(messages, tools, replace(params, seed=seed))
        mine = self.cache.measures.setdefault(id(asyncio.current_task()), {})
        for name, count in (("summaries", 1), ("summary_prompt_tokens", reply.usage.get("prompt_tokens", 0)),
                            ("summary_tokens", reply.usage.get("completion_tokens", 0))):  # fmt: skip
            mine[name] = mine.get(name, 0.0) + count
        return reply


async def run(
    benchmark: Benchmark,
    suite: Suite,
    player: Player,
    config: Config,
    store: Cache,
    advanced: Callable[[Trajectory], None] = lambda trajectory: None,
) -> dict[str, list[Trajectory]]:
    """Play what is not there yet; every attempt of every task, in order, as the disk holds it."""

    def opened(task_id: str) -> AsyncEpisode:
        PLAYED.set(Played(suite.tasks[task_id], suite))
        return AsyncEpisode(suite.open_episode(suite.tasks[task_id]))

    await collect(
        list(suite.tasks), opened, player.make_speaker,  # type: ignore[arg-type]
        GroupConfig(config.attempts, config.concurrency), config.agent(benchmark), config.params(benchmark), config.seed,
        store, _Summariser(player.summariser, store), advanced,  # type: ignore[arg-type]
    )  # fmt: skip
    store.retry_failures = False
    return stored(suite, config, store)


def stored(suite: Suite, config: Config, store: Cache) -> dict[str, list[Trajectory]]:
    """The attempts on disk; a task with none, or with fewer than asked for, has a shorter list."""
    found = {name: [store.load(name, sample) for sample in range(config.attempts)] for name in suite.tasks}
    return {name: [each for each in attempts if each is not None] for name, attempts in found.items()}


async def rescore(
    suite: Suite, attempts: Mapping[str, Sequence[Trajectory]], concurrency: int = 16
) -> dict[str, list[Trajectory]]:
    """Judge stored attempts anew, with no policy: their calls are played again in a fresh world, then the end is judged."""
    slots = asyncio.Semaphore(concurrency)

    async def judged(trajectory: Trajectory) -> Trajectory:
        async with slots:
            return replace(trajectory, verdict=await _replayed(suite, trajectory))

    names = [name for name in attempts if name in suite.tasks]
    flat = await asyncio.gather(*(asyncio.gather(*map(judged, attempts[name])) for name in names))
    return {name: list(found) for name, found in zip(names, flat, strict=True)}


async def _replayed(suite: Suite, trajectory: Trajectory) -> Verdict | None:
    if trajectory.end is End.WORLD_FAILED:
        return trajectory.verdict
    episode = AsyncEpisode(suite.open_episode(suite.tasks[trajectory.task_id]))
    try:
        await episode.reset()
        for turn in trajectory.turns:
            for call, seen in zip(turn.message.get("tool_calls") or (), turn.observations, strict=False):
                answer = await episode.call(seen.name, call["function"].get("arguments") or "{}")
                if not seen.failure and answer != seen.content:
                    return invalid(f"played again, {seen.name} answers otherwise than it did")
            if not turn.message.get("tool_calls"):
                await episode.follow_up(turn.message.get("content") or "")
        text = trajectory.turns[-1].message.get("content") if trajectory.turns and trajectory.end is End.ANSWERED else None
        return await episode.finish(text)
    except Exception as error:
        return invalid(f"{type(error).__name__}: {error}")
    finally:
        await episode.close()
