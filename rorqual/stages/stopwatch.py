"""Where an iteration's time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """`with watch("train"): ...`; `shares` of one iteration, which begins anew with each call of it."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - began

    def shares(self) -> dict[str, float]:
        """time/step_s, and for each part time/NAME, its share of the step; time/idle is what none of them took."""
        now = time.monotonic()
        whole = max(now - self.began, 1e-9)
        found = {f"time/{name}": seconds / whole for name, seconds in self.seconds.items()}
        self.began = now
        self.seconds.clear()
        return {"time/step_s": whole} | found | {"time/idle": max(0.0, 1.0 - sum(found.values()))}
