"""Test-time context management of DeepSeek-V3.2 (paper section 4.4): what is left out when a trajectory outgrows its window.

`none` and the two discards are pure functions from OpenAI-shaped messages to messages. What each removes, exactly:

- A *round* is an assistant message with tool calls, with its reasoning and its text, and all the tool results that answer it.
- `discard_all` removes every round.
- `discard_75` removes the oldest ceil(0.75 n) of the n rounds.
- Both keep everything else, in order: system and developer messages (with their tool definitions), every user message, and
  assistant messages without tool calls. A round is removed whole or kept whole, so no call is parted from its result. A last
  round whose results have not all come is still being played: it is kept, and not counted among the n.
- `none` removes nothing.

They are triggered when the context exceeds a share of the window (`exceeds`; the paper's 80 %), and may be applied again and
again; budgets of steps and tokens count on across resets, in the rollout.

`summary` asks a policy to sum up what would be lost, then restarts from the question and that summary. `parallel_fewest_step`
changes no context: it plays N independent runs and takes the shortest that ended with an answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rorqual.errors import UserError
from rorqual.policy import ChatPolicy, Message, SamplingParams

TRIGGER_SHARE = 0.8
"""The paper triggers context management above 80 % of the window."""

SUMMARY_REQUEST = (
    "Your context window is nearly full. Write down all that is needed to go on without the tool calls and results above: "
    "what is asked, what has been established and from which source, what was tried without success, and what to do next. "
    "Answer with this summary only."
)
SUMMARY_HEADING = "Summary of the work so far, whose tool calls and results are no longer shown:"


class ContextError(UserError):
    """Messages that are no conversation: the text names the message's index and what is wrong with it."""


def exceeds(context_tokens: int, window: int, share: float = TRIGGER_SHARE) -> bool:
    """Whether a context of so many tokens calls for management: strictly more than `share` of the window."""
    return context_tokens > share * window


def none(messages: Sequence[Message]) -> list[Message]:
    """The messages as they are."""
    return list(messages)


def discard_all(messages: Sequence[Message]) -> list[Message]:
    """The messages without any complete round of calls and results."""
    return _without(messages, rounds(messages))


def discard_75(messages: Sequence[Message]) -> list[Message]:
    """The messages without the oldest ceil(0.75 n) of their n complete rounds of calls and results."""
    found = rounds(messages)
    return _without(messages, found[: math.ceil(0.75 * len(found))])


@dataclass(frozen=True)
class Round:
    """The indices of one assistant message with calls and of the results that answer it, all of them there."""

    call: int
    results: tuple[int, ...]


def rounds(messages: Sequence[Message]) -> list[Round]:
    """The complete rounds in order. Raises ContextError for a result without a call, or a lost one before later messages."""
    found: list[Round] = []
    at = 0
    while at < len(messages):
        if messages[at].get("role") == "tool":
            raise ContextError(f"message {at}: a tool result with no assistant message with calls before it")
        if not messages[at].get("tool_calls"):
            at += 1
            continue
        end = at + 1
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        wanted, given = len(messages[at]["tool_calls"]), end - at - 1
        if given > wanted or (given < wanted and end < len(messages)):
            raise ContextError(f"message {at}: {wanted} tool calls, but {given} results follow")
        if given == wanted:
            found.append(Round(at, tuple(range(at + 1, end))))
        at = end
    return found


def _without(messages: Sequence[Message], removed: Sequence[Round]) -> list[Message]:
    gone = {index for each in removed for index in (each.call, *each.results)}
    return [message for index, message in enumerate(messages) if index not in gone]


async def summary(
    messages: Sequence[Message], policy: ChatPolicy, params: SamplingParams | None = None, request: str = SUMMARY_REQUEST
) -> list[Message]:
    """Ask `policy` for a summary of the whole context, and restart with it in place of every complete round.

    The request is a user message after the context (the policy sees no tools, so it cannot go on calling); its answer comes
    back as one user message at the end, under a heading. An earlier summary is part of the context summed up, and replaced.
    Raises ContextError where the policy gives no text, so that the caller can fall back knowingly.
    """
    asked = [*messages, {"role": "user", "content": request}]
    reply = await policy.reply(asked, (), params or SamplingParams(max_tokens=1024))
    text = (reply.message.get("content") or "").strip()
    if not text:
        raise ContextError(f"the summary came back empty (stopped by {reply.stop_reason})")
    kept = [message for message in discard_all(messages) if not _is_summary(message)]
    return [*kept, {"role": "user", "content": f"{SUMMARY_HEADING}\n{text}"}]


def _is_summary(message: Message) -> bool:
    return message.get("role") == "user" and str(message.get("content") or "").startswith(SUMMARY_HEADING)


class Run(Protocol):
    """What is compared among parallel runs: how many steps one took, and whether it ended with an answer."""

    @property
    def steps(self) -> int: ...

    @property
    def answered(self) -> bool: ...


R = TypeVar("R", bound=Run)


async def parallel_fewest_step(play: Callable[[int], Awaitable[R]], count: int) -> tuple[R, list[R]]:
    """Play runs 0..count-1 at once; give the one `fewest_steps` chooses, and all of them (their cost is everyone's)."""
    if count < 1:
        raise ContextError(f"parallel-fewest-step needs at least 1 run, found {count}")
    runs = list(await asyncio.gather(*(play(index) for index in range(count))))
    return runs[fewest_steps(runs)], runs


def fewest_steps(runs: Sequence[Run]) -> int:
    """The index of the run with the fewest steps among those that ended with an answer, ties to the lowest index.

    Where none ended with an answer, 0: the choice then makes no difference to the score, and it is stable.
    """
    answered = [index for index, run in enumerate(runs) if run.answered]
    return min(answered, key=lambda index: (runs[index].steps, index), default=0)
