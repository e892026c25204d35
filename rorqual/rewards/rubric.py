"""A generative reward model: a policy that judges an attempt by the prompt's own rubric (paper section 3.1).

Each prompt brings its rubric: criteria with weights. The judge is any ChatPolicy; it answers with a JSON object of marks, one
per criterion. An answer that is no such object is asked for again, and then it is a judgement that could not be had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.errors import require
from rorqual.policy import ChatPolicy, Message, SamplingParams

INSTRUCTION = """You judge an answer by a rubric. Give each criterion a mark from 0 (not met) to 10 (fully met).
Reply with one JSON object whose keys are the criteria's names and whose values are the marks, and nothing else."""


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric. A negative weight is a fault to be punished."""

    name: str
    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, name=(bool(self.name), "not empty"), weight=(self.weight != 0, "not 0"))


@dataclass(frozen=True)
class Judgement:
    """score in [0, 1], or None with the reason why it could not be had."""

    score: float | None
    marks: dict[str, float]
    reason: str = ""


async def judge(
    policy: ChatPolicy, question: str, answer: str, rubric: Sequence[Criterion], params: SamplingParams, tries: int = 2
) -> Judgement:
    """Ask `policy` for marks. The score is the weighted mean of marks / 10, faults counted down from their share."""
    criteria = "\n".join(f"- {c.name}: {c.text}" for c in rubric)
    asked: list[Message] = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Question:\n{question}\n\nAnswer:\n{answer}\n\nRubric:\n{criteria}"},
    ]
    reason = ""
    for _ in range(tries):
        reply = await policy.reply(asked, (), params)
        found = _marks(str(reply.message.get("content") or ""), rubric)
        if isinstance(found, dict):
            return Judgement(score(found, rubric), found)
        reason = found
    return Judgement(None, {}, reason)


def score(marks: dict[str, float], rubric: Sequence[Criterion]) -> float:
    """(sum of weight * mark / 10, less the lowest possible) over the span between the lowest and the highest possible."""
    got = sum(c.weight * marks[c.name] / 10 for c in rubric)
    low = sum(min(c.weight, 0.0) for c in rubric)
    high = sum(max(c.weight, 0.0) for c in rubric)
    return (got - low) / (high - low)


def _marks(text: str, rubric: Sequence[Criterion]) -> dict[str, float] | str:
    """The marks by criterion, or why they are none."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    if not found:
        return "the judge gave no JSON object"
    try:
        given = json.loads(found.group())
    except json.JSONDecodeError as error:
        return f"the judge's JSON is broken: {error}"
    missing = [c.name for c in rubric if c.name not in given]
    if missing:
        return f"the judge gave no mark for {', '.join(missing)}"
    marks = {c.name: given[c.name] for c in rubric}
    wrong = [
        name for name, mark in marks.items() if isinstance(mark, bool) or not isinstance(mark, int | float) or not 0 <= mark <= 10
    ]
    return f"marks outside 0 to 10: {', '.join(wrong)}" if wrong else {name: float(mark) for name, mark in marks.items()}
