"""What the pages of documentation promise: their fenced blocks and the commands they name.

In README.md and docs/tutorials, a fenced block of sh or python stands under a comment that says what becomes of it in a test:

    <!-- runs -->                     it is run, in the order of the page, in the directory where the page began
    <!-- runs with ray -->            the same, where that module can be imported
    <!-- serves: some text -->        it is started, and the page goes on when it has printed the text
    <!-- not run: why not -->         it is not
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (runs|runs with (?P<module>\w+)|serves: (?P<ready>.+)|not run: (?P<why>.+)) -->\n\Z")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    mark: re.Match[str] | None
    """What the comment above it says; None where there is none."""

    @property
    def runs(self) -> bool:
        return self.mark is not None and self.mark["why"] is None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that hold commands or programs."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        if fence[1] in ("sh", "bash", "console", "python"):
            found.append(Block(fence[1], fence[2], before.count("\n") + 1, MARK.search(before)))
    return found


def commands(page: Path) -> list[str]:
    """Every command that a page names: in a fenced or indented block, or inline between backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    for inline in re.findall(r"`([^`\n]+)`", text):
        lines.append(inline.strip())
    starts = ("rorqual ", ".venv/bin/rorqual ", "make ", "pytest ", "python -m benchmarks.prove ", "torchrun ")
    return sorted({line for line in lines if line.startswith(starts)})
