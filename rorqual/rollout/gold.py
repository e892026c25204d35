"""A program that plays a gold plan as a policy would: thoughts from the plan's state, calls, the answer.

For the cold start of a model that has no ability yet [V3.2, 3.2.2]. The thoughts are generated, not reasoned: each says what
the plan's state is (what was learnt, where a value comes from, what comes next), in a choice of words that the seed draws.
Whoever keeps such a trajectory labels it so.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.policy import ChatReply, Message, SamplingParams, StopReason
from rorqual.tasks.plans import Move, Plan

Detail = Literal["brief", "full"]
BEGIN = ("Let me see.", "First things first.", "I begin.")
NEXT = ("Next", "Now", "So next")
END = ("That was all.", "All is there now.", "Nothing is left to do.")
LONGEST_VALUE = 60
"""Of a value that a thought repeats, in characters."""
SMALL = 100
"""Numbers below stand in many places by chance, so where they came from is not told."""


@dataclass(frozen=True)
class GoldPolicy:
    """A ChatPolicy for one attempt at one task. It keeps no state: where it stands follows from the messages."""

    plan: Plan
    thinking: bool = True
    detail: Detail = "brief"
    seed: str = ""

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        step = sum(message["role"] == "assistant" for message in messages)
        seen = [str(message.get("content") or "") for message in messages if message["role"] == "tool"]
        message: Message = {"role": "assistant", "content": ""}
        if self.thinking:
            message["reasoning_content"] = self.thought(step, seen)
        if step < len(self.plan.moves):
            move = self.plan.moves[step]
            function = {"name": move.name, "arguments": json.dumps(move.arguments, ensure_ascii=False)}
            message["tool_calls"] = [{"id": f"call_{step + 1}", "type": "function", "function": function}]
        else:
            message["content"] = final_text(self.plan, seen)
        return ChatReply(message, StopReason.STOP)

    def thought(self, step: int, seen: Sequence[str]) -> str:
        """What the plan's state says before its `step`-th message, from 0. seen: the observations so far."""
        draw = random.Random(f"{self.seed}/{step}")
        moves = self.plan.moves
        if step >= len(moves):
            return closing(self.plan, seen, draw)
        parts = [opening(moves, draw)] if step == 0 and self.detail == "full" else []
        if seen and self.detail == "full" and (size := _size(seen[-1])):
            parts.append(f"{moves[step - 1].name} gave {size}.")
        parts += grounds(moves[step], moves, seen)
        verb = draw.choice(NEXT) if step else "First"
        parts.append(f"{verb} {moves[step].name}{f', to {moves[step].note}' if moves[step].note else ''}.")
        return " ".join(parts)


def opening(moves: Sequence[Move], draw: random.Random) -> str:
    """The whole plan: which calls, how often."""
    counts = Counter(move.name for move in moves)
    shown = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counts.items())
    return f"{draw.choice(BEGIN)} The plan: {shown}."


def grounds(move: Move, moves: Sequence[Move], seen: Sequence[str]) -> list[str]:
    """Where the values of a call come from: those that stand in an observation, with the call that gave it."""
    found = []
    for name, value in move.arguments.items():
        text = _as_text(value)
        at = next((i for i in reversed(range(len(seen))) if text and _stands_in(text, seen[i])), None)
        if at is not None and at < len(moves):
            found.append(f"{name} {text}, from {moves[at].name}.")
    return found


def closing(plan: Plan, seen: Sequence[str], draw: random.Random) -> str:
    """The last thought: the task's own work where it has some, else that all is done."""
    if plan.work:
        return plan.work
    if not plan.moves:
        return "I know the answer and write it down."
    answer = (final_text(plan, seen)).removeprefix("Answer:").strip()
    source = next((m.name for m, text in reversed(list(zip(plan.moves, seen, strict=False))) if _stands_in(answer, text)), "")
    told = f" {answer} stands in what {source} gave." if source and len(answer) <= LONGEST_VALUE else ""
    return draw.choice(END) + told


def final_text(plan: Plan, seen: Sequence[str]) -> str:
    """The last message."""
    if plan.answer is not None:
        return plan.answer
    lines = [line for line in (seen[-1] if seen else "").splitlines() if line.strip()]
    return lines[-1] if lines else "I found no answer."


def _as_text(value: Any) -> str:
    """A value that a thought may trace: a string, or a number that is no mere count. Empty for others."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, int | float) and abs(value) < SMALL:
        return ""
    return str(value) if len(str(value)) <= LONGEST_VALUE else ""


def _stands_in(text: str, observation: str) -> bool:
    """As a whole word or value: 3 does not stand in 37."""
    at = observation.find(text)
    while text and at >= 0:
        before, after = observation[at - 1 : at], observation[at + len(text) : at + len(text) + 1]
        if not (before.isalnum() and text[0].isalnum()) and not (after.isalnum() and text[-1].isalnum()):
            return True
        at = observation.find(text, at + 1)
    return False


def _size(observation: str) -> str:
    try:
        value = json.loads(observation)
    except json.JSONDecodeError:
        return ""
    if isinstance(value, list):
        return f"{len(value)} rows"
    if isinstance(value, dict) and "error" in value:
        return f"the error {value['error']}"
    if isinstance(value, dict) and isinstance(value.get("rows"), list):
        more = ", and there is another page" if value.get("next_page") else ""
        return f"{len(value['rows'])} rows{more}"
    return ""
