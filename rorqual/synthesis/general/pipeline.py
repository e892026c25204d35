"""Many worlds by many processes into one store: the same bytes whatever their number, a kill loses at most the task in hand."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.synthesis import Request
from rorqual.synthesis.general.compiler import CompilerConfig, compile_world
from rorqual.synthesis.general.corpora import report as corpora_report
from rorqual.synthesis.general.fingerprints import minhash, similarity
from rorqual.tasks import Record, Store, digest
from rorqual.tasks.box import open_judge
from rorqual.workers import Workers, open_pool

SIMILAR = 0.95
BANDS = 16
BARREN_WORLDS = 24
"""So many worlds in a row without an accepted task: something is wrong that more worlds won't mend."""


@dataclass
class Progress:
    """What is known of each index: how many tasks it gave; None while it is under way."""

    tasks: dict[int, int] = field(default_factory=dict)

    def accepted(self) -> tuple[int, int]:
        """(tasks of the unbroken run of finished indices from 0, length of that run)."""
        total = index = 0
        while index in self.tasks:
            total += self.tasks[index]
            index += 1
        return total, index

    def is_barren(self) -> bool:
        """The last of the unbroken run brought nothing, and too many before it."""
        _, length = self.accepted()
        return length >= BARREN_WORLDS and not any(self.tasks[i] for i in range(length - BARREN_WORLDS, length))


def synthesize(request: Request, config: CompilerConfig) -> dict[str, Any]:
    """Fill the store with `count` accepted tasks and seal it. Goes on where an earlier run with the same settings was left."""
    store, settings = request.store, {"family": "general", "count": request.count, **asdict(config)}
    _check_settings(store, settings)
    if store.is_sealed and store.manifest["settings"]["count"] == request.count:
        return {name: value for name, value in store.manifest.items() if name not in ("settings", "corpora", "counts")}
    if config.isolation != "none":
        open_judge(config.isolation).close()  # where no sandbox can be had, that is said at once
    needed, began = request.count, time.monotonic()
    while True:
        _fill(request, config, needed)
        selection = Selection(request.count)
        selected = list(selection.run(sorted(store.records(), key=lambda r: (r.order, r.kind))))
        if selection.count == request.count:
            break
        needed += (request.count - selection.count) + 1
    cpu_s = sum(r.value["cpu_s"] for r in store.records() if r.kind == "done")
    figures = selection.figures()
    store.seal({"settings": settings, "corpora": corpora_report(), **figures}, lambda _: selected)
    return {**figures, "cpu_s": round(cpu_s, 1), "seconds": round(time.monotonic() - began, 1), "workers": request.workers}


def _check_settings(store: Store, settings: Mapping[str, Any]) -> None:
    """A store holds tasks of one set of settings; the count may grow."""
    known = store.manifest.get("settings") or _begun(store)
    if known and {**known, "count": 0} != {**settings, "count": 0}:
        changed = sorted(k for k in settings if k != "count" and known.get(k) != settings[k])
        raise UserError(
            f"{store.directory}: holds tasks made with other settings ({', '.join(changed)}); choose another directory"
        )
    if not known:
        store.append(Record("settings", (-1,), {"settings": dict(settings)}))


def _begun(store: Store) -> dict[str, Any]:
    return next((r.value["settings"] for r in store.records() if r.kind == "settings"), {})


def _fill(request: Request, config: CompilerConfig, needed: int) -> None:
    """Work through the indices in order until the unbroken run of them holds `needed` tasks."""
    store, progress, known = request.store, Progress(), {}
    for index in range(store.manifest.get("finished", 0)):
        progress.tasks[index] = 0
    for record in store.records():
        if record.kind == "task" and record.order[0] in progress.tasks:
            progress.tasks[record.order[0]] += 1
        elif record.kind == "done":
            progress.tasks[record.order[0]] = record.value["tasks"]
        elif record.kind == "task":
            known.setdefault(record.order[0], set()).add(record.order)
    started = set(progress.tasks)
    running: dict[Future[int], int] = {}
    directory = str(store.directory.resolve())
    with open_pool(Workers(request.workers, request.engine)) as pool:
        while progress.accepted()[0] < needed:
            while len(running) < 2 * pool.count:
                index = next(i for i in range(len(started) + 1) if i not in started)
                started.add(index)
                done = frozenset(known.get(index, ()))
                running[pool.submit(work, directory, config, index, done)] = index
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                progress.tasks[running.pop(future)] = future.result()
            request.on_progress(progress.accepted()[0], f"{progress.accepted()[1]} worlds")
            if progress.is_barren():
                raise UserError(_why_barren(store))


def _why_barren(store: Store) -> str:
    refused = [record.value for record in store.records() if record.kind == "rejected"]
    gates = dict(Counter(value["gate"] for value in refused).most_common(3))
    last = refused[-1]["detail"] if refused else ""
    return f"{store.directory}: {BARREN_WORLDS} worlds in a row brought no task; refused by {gates}; last: {last}"


def work(directory: str, config: CompilerConfig, index: int, known: frozenset[tuple[int, ...]]) -> int:
    """Make the records of one index, each stored as soon as it is there. Gives back how many tasks the index has."""
    store, count = Store(Path(directory)), len(known)
    began = _cpu_s()
    try:
        for record in compile_world(config, index, known):
            store.append(record)
            count += record.kind == "task"
    except Exception as error:  # one index must never take its siblings along
        store.append(Record("rejected", (index, 0, 0), {"gate": "crash", "detail": f"{type(error).__name__}: {error}"[:300]}))
    store.append(Record("done", (index,), {"tasks": count, "cpu_s": round(_cpu_s() - began, 3)}))
    return count


def _cpu_s() -> float:
    """Processor seconds of this process and of the sandboxes that it has waited for."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Selection:
    """The first `most` tasks in canonical order, near-duplicates and repeated structures left out."""

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self.worlds: dict[tuple[int, ...], Record] = {}
        self.fingerprints: dict[str, int] = {}
        self.sketches: list[tuple[int, ...]] = []
        self.bands: dict[tuple[int, ...], list[int]] = {}
        self.rejected: Counter[str] = Counter()
        self.kept: list[Record] = []
        self.finished = 0
        """Of so many leading indices every record is in the store."""

    def run(self, ordered: list[Record]) -> Iterator[Record]:
        """The records to seal."""
        used: set[int] = set()
        for record in ordered:
            if self.count == self.most:
                break
            chosen = self._consider(record)
            if chosen is None:
                continue
            if chosen.kind == "task" and record.order[0] not in used:
                used.add(record.order[0])
                yield self.worlds[record.order[:1]]
            self.kept.append(chosen)
            yield chosen

    def _consider(self, record: Record) -> Record | None:
        """The record itself, a rejection in its place, or None."""
        index = record.order[0]
        if record.kind == "world":
            self.worlds[record.order] = record
            self.fingerprints.setdefault(record.value["world"]["fingerprint"], index)
        if record.kind == "rejected":
            self.rejected[record.value["gate"]] += 1
            return record
        if record.kind != "task":
            return None
        world = self.worlds[(index,)].value["world"]
        if self.fingerprints[world["fingerprint"]] != index:
            return self._reject(record, "distinct_structure", world["fingerprint"])
        if self._is_near_duplicate(record.value["task"]["messages"][-1]["content"]):
            return self._reject(record, "near_duplicate", "another prompt says nearly the same")
        self.count, self.finished = self.count + 1, index
        return record

    def _reject(self, record: Record, gate: str, detail: str) -> Record:
        self.rejected[gate] += 1
        return Record("rejected", (*record.order, 99), {"gate": gate, "detail": detail})

    def _is_near_duplicate(self, prompt: str) -> bool:
        sketch = minhash(prompt)
        width = len(sketch) // BANDS
        keys = [(i, *sketch[i * width : (i + 1) * width]) for i in range(BANDS)]
        if any(similarity(sketch, self.sketches[j]) >= SIMILAR for key in keys for j in self.bands.get(key, ())):
            return True
        for key in keys:
            self.bands.setdefault(key, []).append(len(self.sketches))
        self.sketches.append(sketch)
        return False

    def figures(self) -> dict[str, Any]:
        """Counts for the manifest and the report."""
        rows = [r.value for r in self.kept if r.kind == "task"]
        worlds = [self.worlds[(i,)].value["world"] for i in dict.fromkeys(r.order[0] for r in self.kept if r.kind == "task")]
        tried = self.count + sum(self.rejected.values())
        return {
            "tasks": self.count,
            "finished": self.finished,
            "worlds": len(worlds),
            "distinct": {
                "fingerprints": len({w["fingerprint"] for w in worlds}),
                "schema_graphs": len({w["payload"]["structure"]["schema"] for w in worlds}),
                "tool_signatures": len({w["payload"]["structure"]["tools"] for w in worlds}),
                "policy_automata": len({w["payload"]["structure"]["policy"] for w in worlds}),
                "mechanism_combinations": len({tuple(w["mechanisms"]) for w in worlds}),
                "goal_skeletons": len({r["task"]["tags"]["skeleton"] for r in rows}),
                "skeleton_and_structure": len({(r["task"]["tags"]["skeleton"], r["task"]["world"]) for r in rows}),
            },
            "rejected": dict(sorted(self.rejected.items())),
            "rejection_rate": {gate: round(n / tried, 5) for gate, n in sorted(self.rejected.items())},
            "tiers": _counted(str(r["task"]["tier"]) for r in rows),
            "kinds": _counted(r["task"]["tags"]["kind"] for r in rows),
            "surfaces": _counted(r["task"]["tags"]["surface"] for r in rows),
            "operators": _counted(o for r in rows for o in r["task"]["payload"]["operators"]),
            "levels": _counted(str(len(r["task"]["payload"]["operators"])) for r in rows),
            "tasks_with_synthesised_tools": sum(bool(r["task"]["payload"]["synthesised_tools"]) for r in rows),
            "pass@1": _quantiles([r["measures"]["pass@1"] for r in rows]),
            "mutants": _mutants(rows),
            "digest": digest([r["task"] for r in rows]),
        }


def _counted(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (5, 25, 50, 75, 95)} if ordered else {}


def _mutants(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = [gate["measures"] for row in rows for gate in row["gates"] if gate["name"] == "mutants_fail"]
    killed, equivalent = (sum(m[name] for m in found) for name in ("killed", "equivalent"))
    return {"killed": killed, "proven_equivalent": equivalent, "lowest_score": min((m["score"] for m in found), default=1.0)}
