"""Code-interpreter tasks: computing puzzles, word problems, questions over real tables; each needs the tool, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.errors import require
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, run


@dataclass(frozen=True)
class InterpreterConfig:
    """Shares need not add up to one. Without a file of word problems their share goes to the others."""

    seed: int = 0
    puzzles: float = 0.4
    """Families of the reasoning-gym library with sizes that no head computes."""
    tables: float = 0.6
    """Questions over samples of this machine's records, answered by hidden programs."""
    words: float = 0.2
    """Of `problems`."""
    problems: str = ""
    """A JSONL file of word problems: question, and answer with <<expression=value>> and a last #### line."""
    questions_per_table: int = 8
    rows: int = 300
    """Of a sample."""
    endpoint: str = ""
    """A model that answers without the tool; what it gets right is refused."""
    model: str = ""

    def __post_init__(self) -> None:
        require(
            self,
            puzzles=(self.puzzles >= 0, "at least 0"),
            tables=(self.tables >= 0, "at least 0"),
            words=(self.words >= 0, "at least 0"),
            rows=(self.rows >= 20, "at least 20"),
            questions_per_table=(self.questions_per_table >= 1, "at least 1"),
        )


def synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("interpreter", InterpreterConfig, "rorqual.synthesis.interpreter.candidates:make"), request)


def regate(task: Any, world: Any, isolation: str) -> Any:
    from rorqual.synthesis.interpreter.candidates import gates

    return gates(task, world, isolation)


MAKER = Maker("interpreter", synthesize, regate)
