"""Reasoning tasks for the other specialists: maths, logic, programming, writing; from reasoning-gym, grammars and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, run
from rorqual.tasks import validate


@dataclass(frozen=True)
class ReasoningConfig:
    """What these four families are made from."""

    seed: int = 0
    problems: str = ""
    """maths: a JSONL file with fields question and answer (after ####); programming: one in HumanEval's shape (.gz too).
    Half of the tasks then come from it."""

    @property
    def has_file(self) -> bool:
        return bool(self.problems)


def _maker(family: str) -> Maker:
    def synthesize(request: Request) -> Mapping[str, Any]:
        return run(Line(family, ReasoningConfig, f"rorqual.synthesis.reasoning.candidates:{family}"), request)

    def regate(task: Any, world: Any, isolation: str) -> Any:
        from rorqual.synthesis.reasoning.candidates import gates

        # A primer's answer is one of a few, so a guess may well be right: there the family's own proof is all.
        return validate(task, world, isolation) if task.tags.get("source") == "primer" else gates(task, isolation)

    return Maker(family, synthesize, regate)


MATHS, LOGIC, PROGRAMMING, WRITING = map(_maker, ("maths", "logic", "programming", "writing"))
