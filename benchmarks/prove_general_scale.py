"""The general agent at the paper's scale: 1,827 worlds of distinct structure or more, and 4,417 tasks, every gate stored.

The store stands in runs/prove_general_scale and goes on where it was left; wall time is summed over the sittings. The quick form
makes 2 % of the tasks, twice, with one process and with two, and demands the same bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rorqual.synthesis import Request, maker
from rorqual.synthesis.general.gates import GATES
from rorqual.tasks import Store, splits

SECONDS = 2400
QUICK_SECONDS = 90
TASKS, WORLDS = 4417, 1827
SLICE = 88
STORE = Path("runs/prove_general_scale")


def main(quick: bool = False) -> dict[str, Any]:
    return _slice() if quick else _full()


def _slice() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        stores = [Store(Path(directory, str(workers))) for workers in (1, 2)]
        reports = [dict(_make(store, SLICE, workers)) for store, workers in zip(stores, (1, 2), strict=True)]
        for name in ("tasks.jsonl", "worlds.jsonl", "rejected.jsonl", "manifest.json"):
            assert (stores[0].directory / name).read_bytes() == (stores[1].directory / name).read_bytes(), name
        _check(stores[0], SLICE)
        return reports[0]


def _make(store: Store, count: int, workers: int, on_progress: Any = None) -> Any:
    request = Request(count, store, seed=0, workers=workers, **({"on_progress": on_progress} if on_progress else {}))
    return maker("general").synthesize(request)


def _full() -> dict[str, Any]:
    STORE.mkdir(parents=True, exist_ok=True)
    clock, began, last = STORE / "clock.jsonl", time.time(), 0.0

    def tick(done: int, note: str) -> None:
        nonlocal last
        if time.time() - last > 5:
            last = time.time()
            with open(clock, "a") as file:
                file.write(json.dumps({"began": began, "elapsed": round(last - began, 1), "tasks": done}) + "\n")
            print(f"{done} tasks, {note}", file=sys.stderr, flush=True)

    report = dict(_make(Store(STORE), TASKS, _workers(), tick))
    sittings: dict[float, float] = {began: time.time() - began}
    if "cpu_s" in report:  # a store that was finished before has no record of it
        with open(clock, "a") as file:
            file.write(json.dumps({"began": began, "elapsed": sittings[began], "cpu_s": report["cpu_s"]}) + "\n")
    for line in clock.read_text().splitlines():
        tock = json.loads(line)
        report["cpu_s"] = tock.get("cpu_s", report.get("cpu_s"))
        sittings[tock["began"]] = max(sittings.get(tock["began"], 0.0), tock["elapsed"])
    _check(Store(STORE), TASKS)
    assert report["worlds"] >= WORLDS, f"{report['worlds']} worlds"
    assert report["distinct"]["fingerprints"] == report["worlds"]
    report["wall_s"] = round(sum(sittings.values()), 1)
    report["tasks_per_core_second"] = round(TASKS / report["cpu_s"], 3)
    store = Store(STORE)
    report["splits"] = {name: len(ids) for name, ids in splits(store.tasks(), store.worlds()).items()}
    return report


def _workers() -> int:
    """As many as the cores that this process may use, at most two: what the claim is about."""
    import os

    return min(2, len(os.sched_getaffinity(0)))


def _check(store: Store, count: int) -> None:
    rows = list(store.rows())
    assert len(rows) == count, f"{len(rows)} tasks"
    for row in rows:
        assert [gate.name for gate in row.gates] == list(GATES), row.task.id
        assert row.is_accepted, row.task.id
        mutation = next(gate for gate in row.gates if gate.name == "mutants_fail")
        assert mutation.measures["score"] >= 0.95, row.task.id
