"""The environments of a studio: the tasks of one store, or of all stores of a directory, and the opening of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.tasks import Store, Task, World, open_episode
from rorqual.tasks.episode import AsyncEpisode


@dataclass(frozen=True)
class Shelf:
    """The tasks of one store."""

    name: str
    tasks: Sequence[Task]
    worlds: Mapping[str, World]


class Library:
    """Reads a directory of tasks when first asked, and again when it has changed."""

    def __init__(self, directory: str, isolation: str):
        self.directory, self.isolation = directory, isolation
        self._read: tuple[Any, list[Shelf]] = (None, [])

    def shelves(self) -> list[Shelf]:
        """The stores with their tasks. Raises UserError where there are none."""
        if not self.directory:
            raise UserError("no environments: start the server with --tasks DIR; rorqual synthesize --out DIR makes some")
        root = Path(self.directory)
        stores = [store for path in (root, *sorted(root.glob("*/"))) if (store := Store(path)).exists]
        if not stores:
            raise UserError(f"{root}: no task store here; rorqual synthesize --out {root} makes one")
        state = [(file, file.stat().st_mtime_ns) for store in stores for file in sorted(store.directory.glob("*.jsonl"))]
        if state != self._read[0]:
            self._read = state, [Shelf(store.directory.name, store.tasks(), store.worlds()) for store in stores]
        return self._read[1]

    def search(self, text: str) -> list[tuple[Shelf, Task]]:
        """Tasks that hold all of these words in their id, family, tags or prompt."""
        words = text.lower().split()
        return [(shelf, task) for shelf in self.shelves() for task in shelf.tasks if all(w in _words_of(task) for w in words)]

    def open(self, shelf: Shelf, task: Task) -> AsyncEpisode:
        """A fresh attempt at a task; reset and close it."""
        return AsyncEpisode(open_episode(task, shelf.worlds.get(task.world), self.isolation))


def _words_of(task: Task) -> str:
    return " ".join([task.id, task.family, f"tier {task.tier}", *task.tags.values(), task.prompt]).lower()


def arguments_of(schema: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What a form holds as the arguments of a call: empty optional fields are left out, JSON fields are read.

    Raises UserError naming the field whose text is no JSON of its type.
    """
    import json

    required, found = schema.get("required", ()), {}
    for name, field in schema.get("properties", {}).items():
        value, kind = written.get(name), field.get("type", "string")
        if (value is None or value == "") and name not in required:
            continue
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind in ("array", "object") and isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}: expected JSON of type {kind}: {error}") from None
        found[name] = "" if value is None and kind == "string" else value
    return found
