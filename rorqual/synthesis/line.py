"""One assembly line for families whose candidates are numbered: candidate i is a pure function of the settings and i.

Several processes work through the numbers; accepted and rejected candidates are stored as they come, and sealed in the order of
their numbers. So the bytes depend on the settings alone, whatever the number of workers, and a kill loses the work in hand.
"""

from __future__ import annotations

import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from typing import Any

from rorqual.config import build, parse_override
from rorqual.errors import UserError
from rorqual.synthesis import Request
from rorqual.tasks import GateResult, Record, Store, TaskRow, World, digest, task_record, world_record
from rorqual.tasks.store import LOG
from rorqual.workers import Workers, open_pool

CHUNK = 8
"""Candidates that a worker takes at a time."""
MAX_TRIES_PER_TASK, MIN_TRIES = 40, 400
MOST_UNWRITTEN_S = 1.0
"""Candidates of a chunk are written together, as long as that delays none by more: a flush to the disk takes milliseconds."""


@dataclass(frozen=True)
class Made:
    """A candidate with the results of its gates, or a refusal before there was one (`row` is None)."""

    row: TaskRow | None
    world: World | None = None
    refusal: GateResult | None = None


def refused(gate: str, detail: str = "") -> Made:
    return Made(None, refusal=GateResult(gate, False, detail))


@dataclass(frozen=True)
class Line:
    """A family's candidates. `make` is "module:function": (config, number) -> Made."""

    family: str
    config: type
    make: str


def config_of(line: Line, request: Request) -> Any:
    """The family's config from a request's overrides. A config may have a field `endpoint` (URL) and `model`."""
    values: dict[str, Any] = {"seed": request.seed}
    for override in request.overrides:
        keys, value = parse_override(override)
        values[".".join(keys)] = value
    known = line.config.__dataclass_fields__
    if request.endpoint:
        if "endpoint" not in known:
            raise UserError(f"--family {line.family} is made by programs alone; leave --endpoint out")
        values |= {"endpoint": request.endpoint, "model": request.model}
    return build(line.config, values, "--set")


def run(line: Line, request: Request) -> dict[str, Any]:
    """Fill the store with `count` accepted tasks and seal it; goes on where an earlier run with the same settings was left.

    Raises UserError where so many candidates were refused that the count is out of reach; what was accepted stays stored.
    """
    config, store, began = config_of(line, request), request.store, time.monotonic()
    settings = {"family": line.family, "count": request.count, **asdict(config)}
    _check_settings(store, settings)
    if store.is_sealed and store.manifest.get("settings") == _plain(settings) and store.manifest["tasks"] == request.count:
        kept = {name: value for name, value in store.manifest.items() if name not in ("settings", "counts")}
        return {**kept, "seconds": 0.0, "workers": request.workers}
    _fill(line, request, config)
    selection = Selection(request.count)
    chosen = list(selection.run(sorted(store.records(), key=lambda r: (r.order, r.kind))))
    figures = selection.figures()
    store.seal({"settings": settings, **figures}, lambda _: chosen)
    if selection.count < request.count:
        raise UserError(
            f"{store.directory}: only {selection.count} of {request.count} tasks pass the gates; refused: {figures['rejected']}"
        )
    return {**figures, "seconds": round(time.monotonic() - began, 1), "workers": request.workers}


def _check_settings(store: Store, settings: Mapping[str, Any]) -> None:
    begun = next((r.value["settings"] for r in store.records() if r.kind == "settings"), {})
    known = store.manifest.get("settings") or begun
    plain = {**_plain(settings), "count": 0}
    if known and {**known, "count": 0} != plain:
        changed = sorted(k for k in plain if known.get(k) != plain[k])
        raise UserError(
            f"{store.directory}: holds tasks made with other settings ({', '.join(changed) or 'family'}); choose another"
        )
    if not known:
        store.append(Record("settings", (-1,), {"settings": _plain(settings)}))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _fill(line: Line, request: Request, config: Any) -> None:
    """Work through chunks of numbers in order until the unbroken run of finished ones holds enough tasks."""
    tally = _Tally(request.store)
    most = max(MIN_TRIES, MAX_TRIES_PER_TASK * request.count) // CHUNK
    waiting = (chunk for chunk in range(most) if chunk not in tally.finished)
    running = dict[Future[int], int]()
    directory = str(request.store.directory.resolve())
    with open_pool(Workers(request.workers, request.engine)) as pool:
        while tally.read() < request.count:
            while len(running) < pool.count + 1 and (chunk := next(waiting, None)) is not None:
                running[pool.submit(work, directory, line.make, config, chunk)] = chunk
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)
                future.result()
            request.on_progress(tally.count, f"{len(tally.finished) * CHUNK} candidates")


class _Tally:
    """How many different tasks the unbroken run of finished chunks holds. The log is read on from where it was left."""

    def __init__(self, store: Store):
        self.count, self.finished = 0, set[int]()
        self._tasks: dict[int, list[str]] = {}
        self._names, self._length, self._log = set[str](), 0, store.directory / LOG
        self._place = 0
        for record in store.records():
            self._take(record.kind, record.order[0], record.value)
        self._place = self._log.stat().st_size if self._log.exists() else 0

    def read(self) -> int:
        """Take in what was appended since; whole lines alone."""
        if self._log.exists():
            with open(self._log, "rb") as file:
                file.seek(self._place)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._place += len(whole)
            for text in whole.splitlines():
                try:
                    value = json.loads(text)
                except ValueError:
                    continue
                self._take(value["kind"], value["order"][0], value)
        while self._length in self.finished:
            for number in range(self._length * CHUNK, (self._length + 1) * CHUNK):
                self._names.update(self._tasks.pop(number, ()))
            self._length += 1
        self.count = len(self._names)
        return self.count

    def _take(self, kind: str, number: int, value: Mapping[str, Any]) -> None:
        if kind == "done":
            self.finished.add(number)
        elif kind == "task":
            self._tasks.setdefault(number, []).append(_sameness(value["task"]))


def _sameness(task: Mapping[str, Any]) -> str:
    """Two tasks with one prompt over one world are the same task, unless they change the world in different ways."""
    return digest([task["world"], task["messages"], task["payload"].get("changes")])


def function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


_written: set[tuple[str, str]] = set()


def work(directory: str, make: str, config: Any, chunk: int) -> int:
    """Make and store the candidates of one chunk; those stored before a kill come out the same again. How many passed."""
    store, maker, count = Store(directory), function(make), 0
    found, written = list[Record](), time.monotonic()
    for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        try:
            made = maker(config, number)
        except UserError:
            store.append(*found)
            raise
        except Exception as error:  # one candidate must never take its siblings along
            made = refused("crash", f"{type(error).__name__}: {error}"[:300])
        for record in records(made, number):
            if record.kind == "world":
                if (name := (directory, record.value["world"]["id"])) in _written:
                    continue  # a world is as large as a project; each process writes it once
                _written.add(name)
            found.append(record)
            count += record.kind == "task"
        if time.monotonic() - written > MOST_UNWRITTEN_S:
            store.append(*found)
            found, written = [], time.monotonic()
    store.append(*found, Record("done", (chunk,), {"tasks": count}))
    return count


def records(made: Made, number: int) -> Iterator[Record]:
    """What to store of a candidate."""
    if made.row is not None and made.row.is_accepted:
        if made.world is not None:
            yield world_record(made.world, (number,))
        yield task_record(made.row, (number,))
        return
    failing = made.refusal or next(gate for gate in (made.row.gates if made.row else ()) if not gate.passed)
    yield Record("rejected", (number,), {"gate": failing.name, "detail": failing.detail[:300]})


class Selection:
    """The first `most` different tasks in the order of their numbers, each world once."""

    def __init__(self, most: int):
        self.most, self.count, self.tried = most, 0, 0
        self.rejected: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []

    def run(self, ordered: list[Record]) -> Iterator[Record]:
        worlds, seen = {r.value["world"]["id"]: r.value for r in ordered if r.kind == "world"}, set[str]()
        written: set[str] = set()
        for record in ordered:
            if self.count == self.most:
                break
            if record.kind == "rejected":
                self.tried, self.rejected[record.value["gate"]] = self.tried + 1, self.rejected[record.value["gate"]] + 1
                yield record
            elif record.kind == "task":
                self.tried += 1
                name = _sameness(record.value["task"])
                if name in seen:
                    self.rejected["duplicate"] += 1
                    yield Record("rejected", record.order, {"gate": "duplicate", "detail": "the same task stands already"})
                    continue
                seen.add(name)
                world = record.value["task"]["world"]
                if world and world not in written:
                    written.add(world)
                    yield Record("world", record.order, worlds[world])
                self.count += 1
                self.rows.append(record.value)
                yield record

    def figures(self) -> dict[str, Any]:
        """Counts and rates for the manifest and the report."""
        tags = [row["task"]["tags"] for row in self.rows]
        names = sorted({name for tag in tags for name in tag if name in REPORTED})
        return {
            "tasks": self.count,
            "candidates": self.tried,
            "rejected": dict(sorted(self.rejected.items())),
            "rejection_rate": {gate: round(n / max(1, self.tried), 4) for gate, n in sorted(self.rejected.items())},
            **{f"{name}s": dict(sorted(Counter(tag[name] for tag in tags if name in tag).items())) for name in names},
            "near_duplicates": near_duplicates(self.rows),
            "digest": digest([row["task"] for row in self.rows]),
        }


MOST_NEAR = 20_000
"""Tasks among which near-duplicates are looked for."""


def near_duplicates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many tasks nearly repeat an earlier one: prompt, and gold change where there is one (MinHash, Jaccard 0.8)."""
    from rorqual.data.duplicates import Index

    index, looked = Index(0.8), rows[:MOST_NEAR]
    texts = (row["task"]["messages"][-1]["content"] + "\n" + row["task"]["payload"].get("gold", "") for row in looked)
    count = sum(index.add(text) is not None for text in texts)
    return {"looked_at": len(looked), "found": count, "share": round(count / max(1, len(looked)), 4)}


REPORTED = ("source", "kind", "language", "split", "skeleton", "mutation", "depth", "breadth")
"""Tags whose values are counted in the report."""
