"""The agent loop: think, call a tool, observe, until the answer or a budget's end. One call of `play` is one trajectory."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from rorqual.errors import require
from rorqual.policy import ChatPolicy, Message, SamplingParams, StopReason, TokenPolicy
from rorqual.rollout.context import TRIGGER_SHARE, ContextError, discard_75, discard_all, exceeds, none, summary
from rorqual.rollout.speaker import ChatOfTokens, ChatSpeaker, Speaker, Spoken, TokenSpeaker
from rorqual.rollout.trajectory import End, Observation, Trajectory, Turn
from rorqual.tasks.verdict import Verdict

Strategy = Literal["none", "summary", "discard_75", "discard_all"]


@dataclass(frozen=True)
class AgentConfig:
    """Budgets of one trajectory. They count across context resets: a reset buys room, never more steps."""

    max_turns: int = 32
    max_tokens: int = 32768
    """Sampled tokens in all."""
    max_turn_tokens: int = 8192
    """Sampled tokens of one message."""
    max_calls: int = 64
    time_s: float | None = None
    """Wall-clock; None for none (a run that is to be repeated bit for bit counts steps, not seconds)."""
    tool_timeout_s: float = 120.0
    max_observation_chars: int = 20000
    """A longer tool answer is cut, and says so."""
    window: int = 131072
    """The context's length in tokens."""
    strategy: Strategy = "none"
    trigger_share: float = TRIGGER_SHARE

    def __post_init__(self) -> None:
        counts = ("max_turns", "max_tokens", "max_turn_tokens", "max_observation_chars", "window")
        require(
            self,
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
            max_calls=(self.max_calls >= 0, "at least 0"),
            tool_timeout_s=(self.tool_timeout_s > 0, "more than 0"),
            trigger_share=(0 < self.trigger_share <= 1, "in (0, 1]"),
        )


class Episode(Protocol):
    """What the loop needs of a task's episode (rorqual.tasks.episode.AsyncEpisode has it)."""

    @property
    def task(self) -> Any: ...
    @property
    def is_over(self) -> bool: ...
    async def reset(self) -> Any: ...
    async def call(self, name: str, arguments: dict[str, Any] | str) -> str: ...
    async def finish(self, text: str | None = None) -> Verdict: ...


@dataclass
class _Play:
    """One trajectory under way. `shown` is the context as the strategies left it; `spoken` is all that was said."""

    episode: Episode
    speaker: Speaker
    config: AgentConfig
    params: SamplingParams
    shown: list[Message]
    said: list[Message]
    summarise: Callable[[Sequence[Message]], Awaitable[list[Message]]]
    turns: list[Turn] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    detail: str = ""

    @property
    def sampled_tokens(self) -> int:
        return sum(turn.sampled_tokens for turn in self.turns)

    @property
    def num_calls(self) -> int:
        return sum(len(turn.observations) for turn in self.turns)


def turn_seed(run_seed: int, task_id: str, sample: int, turn: int) -> int:
    """The seed of one message's noise: a function of what it is for, not of when it is drawn."""
    name = f"{run_seed}/{task_id}/{sample}/{turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


async def play(
    episode: Episode,
    make_speaker: Callable[[Sequence[Mapping[str, Any]]], Speaker],
    config: AgentConfig,
    params: SamplingParams,
    *,
    sample: int = 0,
    run_seed: int = 0,
    summariser: ChatPolicy | None = None,
) -> Trajectory:
    """Play one attempt to its end and have it judged. What goes wrong is the trajectory's `end`; nothing raises but bugs.

    make_speaker: from the task's tools to the speaker. params: of each message; max_tokens is lowered to what the budgets
    leave, the seed is that of `turn_seed`. summariser: who sums up under the `summary` strategy; None: not that strategy.
    """
    try:
        opening = await episode.reset()
    except Exception as error:
        return Trajectory(episode.task.id, sample, (), End.WORLD_FAILED, detail=f"{type(error).__name__}: {error}")
    messages = [dict(message) for message in opening.messages]

    async def summarise(shown: Sequence[Message]) -> list[Message]:
        if summariser is None:
            raise ContextError("the summary strategy needs a policy to sum up")
        return await summary(shown, summariser)

    game = _Play(episode, make_speaker(opening.tools), config, params, messages, list(messages), summarise)
    seeds = (turn_seed(run_seed, episode.task.id, sample, turn) for turn in range(config.max_turns))
    end = await _to_the_end(game, seeds)
    verdict = await _judge(game, end)
    if verdict is None and end is not End.WORLD_FAILED:
        end = End.WORLD_FAILED
    return Trajectory(episode.task.id, sample, tuple(game.turns), end, verdict, tuple(game.said), game.detail)


async def _to_the_end(game: _Play, seeds: Any) -> End:
    for seed in seeds:
        spent = _budget_spent(game)
        if spent is not None:
            return spent
        is_reset, room = await _make_room(game)
        if room <= 0:
            return End.CONTEXT
        left, limit = _tokens_left(game, room)
        began = time.monotonic()
        spoken = await game.speaker.speak(game.shown, replace(game.params, max_tokens=left, seed=seed))
        end, observations = await _take(game, spoken)
        end = limit if end is End.CUT else end
        game.turns.append(
            Turn(
                spoken.message, spoken.completion, observations, spoken.context_tokens, spoken.sampled_tokens, is_reset,
                time.monotonic() - began,
            )
        )  # fmt: skip
        if end is not None:
            return end
    return End.MAX_TURNS


def _budget_spent(game: _Play) -> End | None:
    config = game.config
    if game.sampled_tokens >= config.max_tokens:
        return End.MAX_TOKENS
    if config.time_s is not None and time.monotonic() - game.began > config.time_s:
        return End.TIME
    return None


def _tokens_left(game: _Play, room: int) -> tuple[int, End]:
    """How many tokens the next message may have, and what its end is called if it runs into that."""
    own = min(game.config.max_turn_tokens, game.params.max_tokens)
    limits = [(own, End.CUT), (game.config.max_tokens - game.sampled_tokens, End.MAX_TOKENS), (room, End.CONTEXT)]
    return min(limits, key=lambda limit: limit[0])


async def _make_room(game: _Play) -> tuple[bool, int]:
    """Apply the strategy where the context has outgrown its share. Whether it did, and how many tokens may be sampled."""
    config, length = game.config, game.speaker.context_tokens(game.shown)
    is_reset = False
    if config.strategy != "none" and exceeds(length, config.window, config.trigger_share):
        before = len(game.shown)
        game.shown = await _managed(game)
        length = game.speaker.context_tokens(game.shown)
        is_reset = len(game.shown) != before
    return is_reset, config.window - length


async def _managed(game: _Play) -> list[Message]:
    match game.config.strategy:
        case "discard_all":
            return discard_all(game.shown)
        case "discard_75":
            return discard_75(game.shown)
        case "summary":
            try:
                return await game.summarise(game.shown)
            except ContextError as error:
                game.detail = str(error)
                return game.shown
    return none(game.shown)


async def _take(game: _Play, spoken: Spoken) -> tuple[End | None, tuple[Observation, ...]]:
    """What a message leads to: an end, or the observations of its calls, which are shown next."""
    if spoken.stop_reason not in (StopReason.STOP, StopReason.LENGTH, StopReason.CONSTRAINT):
        game.detail = str(spoken.message.get("failure") or spoken.stop_reason)
        return (End.CONTEXT if spoken.stop_reason is StopReason.TOO_LONG else End.POLICY_FAILED), ()
    game.shown.append(spoken.message)
    game.said.append(spoken.message)
    if spoken.stop_reason is StopReason.LENGTH:
        return End.CUT, ()
    if spoken.malformed:
        game.detail = spoken.malformed
        return End.MALFORMED, ()
    calls = spoken.message.get("tool_calls") or ()
    if not calls:
        return await _heard(game, spoken.message.get("content") or ""), ()
    return await _play_calls(game, calls)


async def _heard(game: _Play, text: str) -> End | None:
    """A message without calls ends the attempt, unless the episode is a dialogue whose user says more."""
    follow_up = getattr(game.episode, "follow_up", None)
    said = await follow_up(text) if follow_up is not None else None
    if said is None:
        return End.ANSWERED
    message = {"role": "user", "content": said}
    game.shown.append(message)
    game.said.append(message)
    return None


async def _play_calls(game: _Play, calls: Sequence[Mapping[str, Any]]) -> tuple[End | None, tuple[Observation, ...]]:
    made: list[Observation] = []
    for number, call in enumerate(calls):
        if game.num_calls + len(made) >= game.config.max_calls:
            return End.MAX_CALLS, tuple(made)
        observation = await _call(game, call, f"call_{len(game.turns)}_{number}")
        made.append(observation)
        shown = {"role": "tool", "tool_call_id": observation.call_id, "content": observation.content}
        game.shown.append(shown)
        game.said.append(shown)
        if observation.failure in ("timeout", "crashed"):
            game.detail = f"{observation.name}: {observation.failure}: {observation.content}"
            return End.WORLD_FAILED, tuple(made)
        if game.episode.is_over:
            return End.SUBMITTED, tuple(made)
    return None, tuple(made)


async def _call(game: _Play, call: Mapping[str, Any], default_id: str) -> Observation:
    function, began = call.get("function") or {}, time.monotonic()
    name, call_id = str(function.get("name")), str(call.get("id") or default_id)
    content, failure = "", ""
    try:
        content = await asyncio.wait_for(
            game.episode.call(name, function.get("arguments") or "{}"), timeout=game.config.tool_timeout_s
        )
    except TimeoutError:
        content, failure = f"no answer within {game.config.tool_timeout_s} s", "timeout"
    except Exception as error:
        content, failure = f"{type(error).__name__}: {error}", "crashed"
    limit = game.config.max_observation_chars
    if len(content) > limit:
        content, failure = f"{content[:limit]}\n[cut: {len(content) - limit} more characters]", failure or "too_long"
    return Observation(call_id, name, content, time.monotonic() - began, failure)


async def _judge(game: _Play, end: End) -> Verdict | None:
    if end is End.WORLD_FAILED:
        return None
    text = game.turns[-1].message.get("content") if game.turns and end is End.ANSWERED else None
    try:
        return await game.episode.finish(text)
    except Exception as error:
        game.detail = f"the verdict could not be had: {type(error).__name__}: {error}"
        return None


def speaker_of(policy: TokenPolicy | ChatPolicy, tokenizer: Any = None, mode: Any = None) -> Callable[..., Speaker]:
    """make_speaker for a policy of either kind; a TokenPolicy needs a tokenizer."""
    from rorqual.rollout.speaker import ChatMode

    if hasattr(policy, "complete"):
        return lambda tools: TokenSpeaker(policy, tokenizer, tools, mode or ChatMode())  # type: ignore[arg-type]
    return lambda tools: ChatSpeaker(policy, tools)  # type: ignore[arg-type]


__all__ = ["AgentConfig", "ChatOfTokens", "Strategy", "play", "speaker_of", "turn_seed"]
