"""Code tasks: changes between releases and commits of real projects, and faults in their tested functions; kept by execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.errors import require
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, run

RELEASES = (
    "toolz==0.12.0..1.0.0",
    "more-itertools==10.2.0..10.3.0",
    "inflection==0.5.0..0.5.1",
)
PROJECTS = (
    "toolz==1.0.0", "more-itertools==10.5.0", "inflection==0.5.1", "sqlparse==0.5.3", "idna==3.10", "cachetools==5.5.2",
    "tomlkit==0.13.2", "marko==2.1.2", "mistune==3.1.2", "attrs==25.1.0", "boltons==25.0.0", "networkx==3.4",
)  # fmt: skip


@dataclass(frozen=True)
class CodeConfig:
    """Which projects, and how many changes. Pairs come first, then faults, both project by project, until there are enough."""

    seed: int = 0
    releases: tuple[str, ...] = RELEASES
    """Pairs of releases, name==OLD..NEW, which pip downloads once as source."""
    histories: tuple[str, ...] = ()
    """Local git repositories, whose commits that mend a numbered issue are taken."""
    instances: str = ""
    """A JSONL file of issue-and-patch pairs in the shape of SWE-bench."""
    clones: str = ""
    """The directory of local clones for `instances`: OWNER__NAME or NAME."""
    projects: tuple[str, ...] = PROJECTS
    """For faults: each a source archive (.tar.gz), a directory, or name==version."""
    parts: bool = True
    """Also the single functions and classes that a pair changes, each as a task of its own."""
    most_parts: int = 60
    """Parts of a pair, at most."""
    per_function: int = 20
    """Changes of one function, at most."""
    most_tests: int = 60
    """Tests that are run for a change: the covering ones, in order."""
    grading: str = "fresh"
    """fresh: every gate of a fault in a sandbox of its own. warm: in forked processes of one sandbox per project, each with the
    faulty function in place; one in `recheck` tasks is graded afresh as well. Pairs are always graded afresh."""
    recheck: int = 50
    endpoint: str = ""
    """A model that filters issue-and-patch pairs, and sets up projects at which the ladder fails."""
    model: str = ""

    def __post_init__(self) -> None:
        names = {wish.partition("==")[0] for wish in (*self.releases, *self.projects) if "==" in wish}
        require(
            self,
            projects=(len(names) <= 40, "at most 40 named packages, releases among them"),
            most_parts=(self.most_parts >= 1, "at least 1"),
            per_function=(1 <= self.per_function <= 20, "1 to 20"),
            most_tests=(self.most_tests >= 1, "at least 1"),
            grading=(self.grading in ("fresh", "warm"), "fresh or warm"),
            recheck=(self.recheck >= 1, "at least 1"),
            clones=(not self.instances or bool(self.clones), "a directory, where there are instances"),
            releases=(all("==" in r and ".." in r for r in self.releases), "each name==OLD..NEW"),
        )


def synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("code", CodeConfig, "rorqual.synthesis.code.candidates:make"), request)


def regate(task: Any, world: Any, isolation: str) -> Any:
    from rorqual.synthesis.code.candidates import gates

    return gates(task, world, isolation)


MAKER = Maker("code", synthesize, regate)
