"""A directory of tasks: append-only while it is made, sealed into one canonical order when it is done.

    log.jsonl        while a run is under way: one line per finished piece of work, in the order of arrival, from any process
    tasks.jsonl      sealed: one row per accepted task with the result of each gate
    worlds.jsonl     sealed: what tasks share
    rejected.jsonl   sealed: candidates that a gate refused, with the gate's reason
    manifest.json    what was asked for, and the counts

A line cut short by a crash is skipped by readers, so a kill loses at most what was in hand. Sealed files are written whole and
renamed; their bytes depend on the content alone, never on the order of arrival.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.runlog import write_atomically
from rorqual.tasks.task import Task, TaskError, TaskRow, World, canonical

LOG, MANIFEST = "log.jsonl", "manifest.json"
KINDS = {"world": "worlds.jsonl", "task": "tasks.jsonl", "rejected": "rejected.jsonl"}


@dataclass(frozen=True)
class Record:
    """One line: its kind, its place in the canonical order, and what it holds."""

    kind: str
    """world, task, rejected; or done, which says that a unit of work left nothing more to do (never sealed)."""
    order: tuple[int, ...]
    value: dict[str, Any]


class Store:
    """Opens or makes a directory of tasks. Several processes may append to one at the same time."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)

    @property
    def exists(self) -> bool:
        return any((self.directory / name).exists() for name in (LOG, KINDS["task"], MANIFEST))

    def append(self, *records: Record) -> None:
        """Add a line for each, flushed to the disk, whole even where several processes write."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = b"".join(_line(record, kind=record.kind).encode() for record in records)
        with open(self.directory / LOG, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) and not _ends_in_newline(file):
                lines = b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> Iterator[Record]:
        """All records, sealed ones first; of two with one kind and place only the first."""
        seen = set()
        for record in self._all_records():
            if (record.kind, record.order) not in seen:
                seen.add((record.kind, record.order))
                yield record

    def _all_records(self) -> Iterator[Record]:
        for kind, name in KINDS.items():
            for value in _lines(self.directory / name):
                yield Record(kind, tuple(value.pop("order")), value)
        for value in _lines(self.directory / LOG):
            yield Record(value.pop("kind"), tuple(value.pop("order")), value)

    def seal(
        self, manifest: Mapping[str, Any], select: Callable[[list[Record]], Iterable[Record]] | None = None
    ) -> dict[str, int]:
        """Write the sealed files and the manifest, remove the log. `select` may drop or change records; it sees them in order.

        Returns how many of each kind were written.
        """
        ordered = sorted(self.records(), key=lambda record: (record.order, record.kind))
        chosen = list(select(ordered) if select else ordered)
        counts = {}
        for kind, name in KINDS.items():
            lines = [_line(record) for record in chosen if record.kind == kind]
            counts[kind] = len(lines)
            write_atomically(self.directory / name, "".join(lines))
        write_atomically(self.directory / MANIFEST, json.dumps({**manifest, "counts": counts}, indent=1, sort_keys=True) + "\n")
        (self.directory / LOG).unlink(missing_ok=True)
        return counts

    @property
    def manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def is_sealed(self) -> bool:
        return (self.directory / MANIFEST).exists() and not (self.directory / LOG).exists()

    def rows(self) -> Iterator[TaskRow]:
        """The tasks with their gates, in canonical order once sealed."""
        self._require()
        for record in self.records():
            if record.kind == "task":
                yield TaskRow.from_json(record.value)

    def tasks(self) -> list[Task]:
        return [row.task for row in self.rows()]

    def worlds(self) -> dict[str, World]:
        """id -> world."""
        self._require()
        worlds = (World.from_json(record.value["world"]) for record in self.records() if record.kind == "world")
        return {world.id: world for world in worlds}

    def rejected(self) -> list[dict[str, Any]]:
        return [record.value for record in self.records() if record.kind == "rejected"]

    def _require(self) -> None:
        if not self.exists:
            raise TaskError(f"{self.directory}: no task store here; rorqual synthesize --out {self.directory} makes one")


def task_record(row: TaskRow, order: Sequence[int]) -> Record:
    return Record("task", tuple(order), row.to_json())


def world_record(world: World, order: Sequence[int]) -> Record:
    return Record("world", tuple(order), {"world": world.to_json()})


def _line(record: Record, **extra: str) -> str:
    return canonical({"order": list(record.order), **extra, **record.value}) + "\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict) and "order" in value:
                yield value


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
