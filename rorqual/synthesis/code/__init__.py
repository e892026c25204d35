"""Code tasks: faults put into tested functions of real projects, kept by execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.errors import require
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, run


@dataclass(frozen=True)
class CodeConfig:
    """Which projects, and how many changes."""

    seed: int = 0
    projects: tuple[str, ...] = ("toolz==1.0.0", "more-itertools==10.5.0", "inflection==0.5.1")
    """Each a source archive (.tar.gz), a directory, or name==version, which pip downloads once as source."""
    per_function: int = 20
    """Changes of one function, at most."""
    most_tests: int = 60
    """Tests that are run for a change: the covering ones, in order."""

    def __post_init__(self) -> None:
        require(
            self,
            projects=(bool(self.projects) and len(self.projects) <= 40, "1 to 40 projects"),
            per_function=(1 <= self.per_function <= 20, "1 to 20"),
            most_tests=(self.most_tests >= 1, "at least 1"),
        )


def synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("code", CodeConfig, "rorqual.synthesis.code.candidates:make"), request)


def regate(task: Any, world: Any, isolation: str) -> Any:
    from rorqual.synthesis.code.candidates import gates

    return gates(task, world, isolation)


MAKER = Maker("code", synthesize, regate)
