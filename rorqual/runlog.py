"""One event and metric stream per run (JSONL), and its progress on the console; nothing else logs.

A run is a directory: `config.toml` (what was asked for), `environment.json` (where it ran), `events.jsonl` (what came).
Lines are only appended; a line cut short by a crash is skipped by readers, and after a resume the last line written for a
step is the one that counts. Every figure of the report page comes from these files.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual import __version__
from rorqual.config import dump

EVENTS = "events.jsonl"


class RunLog:
    """Appends events to `directory/events.jsonl`. Metrics are named room/quantity, such as train/loss."""

    def __init__(self, directory: str | os.PathLike, quiet: bool = False):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.quiet = quiet
        self._file = _open_for_append(self.directory / EVENTS)

    def begin(self, config: Any) -> None:
        """Write the config and the environment, and the event that the run began (or went on)."""
        write_atomically(self.directory / "config.toml", dump(config))
        write_atomically(self.directory / "environment.json", json.dumps(environment(), indent=1))
        self.event("begin", config=type(config).__name__)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event: a stage that ended, a bad input that was handled, a checkpoint."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, default=_plain) + "\n")
        self._file.flush()

    def metrics(self, step: int, **values: float) -> None:
        """Append the metrics of one step; pass names with slashes as `**{"train/loss": 1.2}`."""
        self.event("metrics", step=step, **values)

    @contextmanager
    def progress(self, description: str, total: int, done: int = 0) -> Iterator[Progress]:
        """A progress bar with the time left; on a stream that is no terminal, a line every ten seconds."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        if self.quiet or not console.is_terminal:
            yield Progress(description, total, done, None if self.quiet else sys.stderr)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, TextColumn("{task.fields[note]}"), console=console) as bars:
            task = bars.add_task(description, total=total, completed=done, note="")
            yield Progress(description, total, done, None, lambda n, note: bars.update(task, completed=n, note=note))

    @contextmanager
    def quietly(self, total: int) -> Iterator[Progress]:
        """A progress that is shown nowhere."""
        yield Progress("", total, 0)

    def close(self) -> None:
        self._file.close()


@dataclass
class Progress:
    """The handle that `RunLog.progress` yields: call `advance` after each unit of work."""

    description: str
    total: int
    done: int
    stream: Any = None
    update: Any = None
    _last: float = 0.0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.update is not None:
            self.update(self.done, note)
        elif self.stream is not None and (time.monotonic() - self._last > 10 or self.done == self.total):
            self._last = time.monotonic()
            print(f"{self.description}: {self.done}/{self.total} {note}".rstrip(), file=self.stream, flush=True)


def read_events(directory: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run in order; a line cut short by a crash is left out."""
    events = []
    path = Path(directory) / EVENTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is None or event["kind"] == kind:
            events.append(event)
    return events


def read_metrics(directory: str | os.PathLike, name: str) -> list[tuple[int, float]]:
    """The curve of one metric: (step, value), the last written value of each step, by ascending step."""
    values = {event["step"]: event[name] for event in read_events(directory, "metrics") if name in event}
    return sorted(values.items())


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Where this runs: versions, processor count, device, commit. Holds no host name, user or path."""
    found: dict[str, Any] = {
        "rorqual": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "commit": _git_commit(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.__version__
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _git_commit() -> str | None:
    """Of the tree this runs from; RORQUAL_COMMIT says it where the tree is a copy without its history."""
    if given := os.environ.get("RORQUAL_COMMIT"):
        return given
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def _open_for_append(path: Path) -> Any:
    """Open the log; where a crash cut its last line short, end that line first, so that the next one stands alone."""
    file = open(path, "a+b")  # noqa: SIM115 - the log owns it
    file.seek(0, os.SEEK_END)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return open(path, "a", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON for what JSON lacks: tensors and numpy scalars by .item(), paths by str."""
    return value.item() if hasattr(value, "item") else str(value)
