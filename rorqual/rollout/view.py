"""What is going on while a batch is played: one line, for the progress bar."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rorqual.rollout.trajectory import Trajectory


@dataclass
class RolloutView:
    """Call it with every trajectory that is there; `show` gets the line."""

    show: Callable[[str], object]
    ends: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    tokens: int = 0
    calls: int = 0
    began: float = field(default_factory=time.monotonic)

    def __call__(self, trajectory: Trajectory) -> None:
        self.ends[str(trajectory.end)] += 1
        self.passed += bool(trajectory.verdict and trajectory.verdict.passed)
        self.tokens += trajectory.sampled_tokens
        self.calls += trajectory.num_calls
        self.show(self.line)

    @property
    def line(self) -> str:
        """Such as `passed 7 of 12, 1,024 tokens (310/s), 9 calls; answered 10, cut 2`."""
        ends = ", ".join(f"{end} {count}" for end, count in self.ends.most_common())
        pace = self.tokens / max(time.monotonic() - self.began, 1e-9)
        return f"passed {self.passed} of {self.ends.total()}, {self.tokens:,} tokens ({pace:,.0f}/s), {self.calls} calls; {ends}"
