"""Search questions about rare entities of a corpus: built by exploring with the tools, kept where answerers fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.errors import require
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, run


@dataclass(frozen=True)
class SearchConfig:
    """How questions are built. depth: hops from the entity; breadth: neighbours opened at each."""

    seed: int = 0
    corpus: str = "debian"
    """A named corpus, or a JSONL or Parquet file whose texts hold lines `field: value`."""
    backend: str = "fts5"
    depth: int = 1
    breadth: int = 3
    max_links: int = 1
    """An entity that more documents than this refer to is not rare."""
    least_clauses: int = 2
    most_clauses: int = 5
    common: int = 5
    """A clause that fewer entities than this fulfil would give the entity away."""
    languages: tuple[str, ...] = ("en", "de", "fr", "es")
    tries: int = 8
    """Choices of clauses from one exploration, until one is unique and falls to no single query."""
    endpoint: str = ""
    """A model that answers too, with the tools; and, for `prompts`, answers with and without search and judges by rubrics."""
    model: str = ""
    prompts: str = ""
    """A JSONL file of prompts with rubrics ({"prompt", "rubric": [{"name", "text", "weight"}]}): those that search helps join."""
    least_help: float = 0.1
    """By how much the judged score must rise with search."""
    keep_easier: bool = True
    """Keep, under the split `easier`, what some answerer solves while the single query does not."""

    def __post_init__(self) -> None:
        require(
            self,
            depth=(0 <= self.depth <= 3, "0 to 3"),
            breadth=(1 <= self.breadth <= 20, "1 to 20"),
            backend=(self.backend in ("fts5", "tantivy"), "fts5 or tantivy"),
            least_clauses=(1 <= self.least_clauses <= self.most_clauses, "at least 1 and at most most_clauses"),
            languages=(bool(self.languages) and set(self.languages) <= {"en", "de", "fr", "es"}, "of en, de, fr, es"),
            common=(self.common >= 2, "at least 2"),
            tries=(self.tries >= 1, "at least 1"),
            prompts=(not self.prompts or bool(self.endpoint), "only with an endpoint, which answers and judges"),
            least_help=(0 < self.least_help <= 1, "above 0, at most 1"),
        )


def synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("search", SearchConfig, "rorqual.synthesis.search.candidates:make"), request)


def regate(task: Any, world: Any, isolation: str) -> Any:
    from rorqual.synthesis.search.candidates import gates

    return gates(task, world, isolation)


MAKER = Maker("search", synthesize, regate)
