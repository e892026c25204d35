"""Accepted attempts as a file of conversations: what was kept, where it came from, and what was left out and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import UserError
from rorqual.runlog import write_atomically

Source = Literal["sampled", "gold", "given"]
"""gold: a program that follows the task's own solution, its thoughts generated from the plan's state."""
THOUGHTS = {"sampled": "sampled by the model", "gold": "generated from the plan's state", "given": "as given"}


@dataclass(frozen=True)
class Accepted:
    """One conversation to train on, with its labels."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    thinking: bool
    source: Source
    domain: str = ""
    kind: str = ""
    task: str = ""
    sample: int = 0
    reward: float = 0.0
    model: str = ""
    """Whose attempt it is: a specialist's name, for the distillation."""

    def to_json(self) -> dict[str, Any]:
        """A line for `read_conversations`; `thoughts` says where the reasoning comes from."""
        labels = {name: getattr(self, name) for name in ("source", "domain", "kind", "task", "sample", "reward", "model")}
        thoughts = THOUGHTS[self.source] if self.thinking else "none"
        shown = {"messages": list(self.messages), "tools": list(self.tools), "thinking": self.thinking}
        return {**shown, **labels, "thoughts": thoughts}


def trained_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Up to the last message of the assistant: what comes after teaches nothing."""
    last = max((n for n, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    return tuple(messages[: last + 1])


def write_accepted(path: Path, rows: Iterable[Accepted], more: Iterable[Mapping[str, Any]] = ()) -> dict[str, int]:
    """Write the file, whole or not at all; how many conversations there are, by domain, kind and source.

    more: records as they are, of conversations that were given.
    """
    records = [row.to_json() for row in rows] + [{"source": "given", **record} for record in more]
    counts = Counter(f"{r.get('domain') or 'any'}/{r.get('kind') or 'any'}/{r['source']}" for r in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return dict(sorted(counts.items()))


def read_given(path: Path) -> list[dict[str, Any]]:
    """The records of a file of conversations. Raises UserError where it can't be read."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: could not be read as conversations: {error}") from None
