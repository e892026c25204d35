"""Search, code and interpreter tasks at the paper's counts through all gates, as far as the given minutes of one core go.

Each family fills a store of its own under runs/families_scale, which a killed slice goes on with. What is reached, seconds,
filter rates, the share of each source, and duplicates are reported as found. The claim is that every stored task passed every
gate and that no two are the same; how far warm runs of faults agree with fresh sandboxes is measured where both were done.

    python -m benchmarks.prove_families_scale STORE SECONDS     one slice, to let others have the core in between
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rorqual.commands.synthesize import PAPER
from rorqual.runlog import write_atomically
from rorqual.synthesis.line import Selection
from rorqual.tasks import Store, digest

SECONDS, QUICK_SECONDS = 2400, 240
STORES = {"search": "search", "interpreter": "interpreter", "code_changes": "code", "code_faults": "code"}
"""Store -> family. Code tasks from releases, each graded in sandboxes of its own, and from faults are made beside each other."""
MINUTES = {"search": 40.0, "interpreter": 10.0, "code_changes": 30.0, "code_faults": 60.0}
"""Of one core, by store; RORQUAL_SCALE_MINUTES multiplies them."""
CHANGES = 1000
"""Tasks from releases are asked for by more than the versions named here give."""
HERE = Path(__file__).parents[1] / "runs" / "families_scale"
RELEASES = {
    "mistune": "3.0.1 3.0.2 3.1.0 3.1.2", "click": "8.0.4 8.1.0 8.1.3 8.1.6 8.1.7 8.1.8 8.2.0",
    "dep-logic": "0.2.0 0.3.0 0.4.0 0.5.0",
    "tomlkit": "0.10.2 0.11.0 0.11.4 0.11.6 0.11.8 0.12.0 0.12.5 0.13.0 0.13.2", "semver": "3.0.0 3.0.1 3.0.2 3.0.4",
    "humanize": "4.0.0 4.2.0 4.4.0 4.6.0 4.7.0 4.8.0 4.9.0 4.10.0 4.11.0 4.12.0 4.12.3", "idna": "3.6 3.7 3.8",
    "pathspec": "0.9.0 0.10.0 0.10.3 0.11.0 0.11.2 0.12.1", "sqlparse": "0.4.1 0.4.2 0.4.3 0.4.4 0.5.0 0.5.1 0.5.3",
    "marko": "1.2.2 1.3.0 2.0.0 2.0.3 2.1.0 2.1.2", "wcwidth": "0.2.12 0.2.13", "toolz": "0.11.1 0.11.2 0.12.0 0.12.1 1.0.0",
    "portion": "2.2.0 2.3.0 2.4.0 2.4.2 2.5.0 2.6.0", "boltons": "21.0.0 23.0.0 23.1.0 23.1.1 24.0.0 25.0.0",
    "more-itertools": "8.13.0 8.14.0 9.0.0 9.1.0 10.0.0 10.1.0 10.2.0 10.3.0 10.4.0 10.5.0 10.6.0 10.7.0",
    "lark": "1.1.3 1.1.5 1.1.7 1.1.8 1.1.9 1.2.2", "parso": "0.8.0 0.8.2 0.8.3 0.8.4",
    "attrs": "22.1.0 22.2.0 23.2.0 24.1.0 24.2.0", "pyparsing": "3.0.7 3.0.9 3.1.0 3.1.1 3.1.2 3.1.4 3.2.0",
}  # fmt: skip
"""Nineteen small packages with tests in their source archives, each a history of its releases; quick tests come first."""
FAULTS = ("toolz==1.0.0", "more-itertools==10.5.0", "inflection==0.5.1", "tomlkit==0.13.2", "sqlparse==0.5.3", "marko==2.1.2",
          "mistune==3.1.2", "humanize==4.11.0", "boltons==25.0.0", "semver==3.0.4", "portion==2.6.0", "natsort==8.4.0",
          "h11==0.16.0", "pathspec==0.12.1", "dep-logic==0.5.0", "click==8.2.0", "attrs==25.1.0", "parso==0.8.4",
          "pyparsing==3.2.1", "lark==1.2.2", "networkx==3.4", "mpmath==1.3.0")  # fmt: skip


def pairs() -> list[str]:
    """name==OLD..NEW of neighbouring releases, package by package, the newest first."""
    histories = [(name, list(itertools.pairwise(versions.split()))[::-1]) for name, versions in RELEASES.items()]
    return [f"{name}=={old}..{new}" for name, listed in histories for old, new in listed]


def settings(store: str) -> list[str]:
    return {
        "search": ["backend=tantivy"],
        "interpreter": [],
        "code_changes": ["projects=[]", "most_parts=300", f"releases={json.dumps(pairs())}"],
        "code_faults": ["releases=[]", "grading=warm", "most_tests=20", "recheck=400", f"projects={json.dumps(FAULTS)}"],
    }[store]


def slice_of(store: str, seconds: float) -> None:
    """Work on a store for so long, or until it is full; the time is written down."""
    began, count = time.monotonic(), CHANGES if store == "code_changes" else PAPER[STORES[store]]
    command = [sys.executable, "-m", "rorqual", "synthesize", "--family", STORES[store], "--count", str(count)]
    command += ["--out", str(HERE / store), "--seed", "20", "--json"]
    for setting in settings(store):
        command += ["--set", setting]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    _note(store, time.monotonic() - began)


def _note(store: str, seconds: float) -> None:
    HERE.mkdir(parents=True, exist_ok=True)
    times = used()
    times[store] = times.get(store, 0.0) + seconds
    write_atomically(HERE / "times.json", json.dumps(times))


def used() -> dict[str, float]:
    place = HERE / "times.json"
    return json.loads(place.read_text()) if place.exists() else {}


def figures_of(name: str) -> dict[str, Any]:
    """What stands in a store. Sealed, its own figures are taken; else they are counted now."""
    store, seconds = Store(HERE / name), used().get(name, 0.0)
    records = sorted((r for r in store.records() if r.kind in ("world", "task", "rejected")), key=lambda r: (r.order, r.kind))
    if store.is_sealed:
        figures = {part: value for part, value in store.manifest.items() if part not in ("settings", "counts")}
    else:
        selection = Selection(PAPER[STORES[name]])
        records = list(selection.run(records))
        figures = selection.figures()
    rows = [record.value for record in records if record.kind == "task"]
    assert len(rows) == figures["tasks"], f"{len(rows)} rows, {figures['tasks']} tasks"
    assert all(gate["passed"] for row in rows for gate in row["gates"]), "a stored task failed a gate"
    names = {digest([row["task"]["world"], row["task"]["messages"], row["task"]["payload"].get("changes")]) for row in rows}
    assert len(names) == len(rows), "two tasks are the same"
    found = {"seconds": round(seconds), "is_full": store.is_sealed, **figures}
    found = {part: value for part, value in found.items() if part not in ("digest", "skeletons")}
    found["tasks_per_second"] = round(len(rows) / seconds, 2) if seconds else None
    agree = [row["measures"]["warm_agrees"] for row in rows if "warm_agrees" in row["measures"]]
    if agree:
        found["graded_both_ways"] = {"tasks": len(agree), "same_failing_tests": round(sum(agree) / len(agree), 4)}
    if STORES[name] == "code":
        found["builds"] = dict(Counter(row["task"]["tags"]["build"] for row in rows))
    return found


def _small() -> dict[str, Any]:
    """The paper's mix at a small scale, to its end, by the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "rorqual",
            "synthesize",
            "--mix",
            "paper",
            "--scale",
            "0.0004",
            "--out",
            folder,
            "--json",
        ]
        done = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        stores = {family: Store(Path(folder) / family) for family in PAPER}
        found = {family: store.manifest["tasks"] for family, store in stores.items()}
    assert found == {family: max(1, round(count * 0.0004)) for family, count in PAPER.items()}, found
    return found


def main(quick: bool = False) -> dict[str, Any]:
    if quick:
        return _small()
    factor = float(os.environ.get("RORQUAL_SCALE_MINUTES", "1"))
    for store, minutes in MINUTES.items():
        left = 60 * minutes * factor - used().get(store, 0.0)
        if left > 5 and not Store(HERE / store).is_sealed:
            slice_of(store, left)
    found = {store: figures_of(store) for store in STORES}
    reached = Counter[str]()
    for store, family in STORES.items():
        reached[family] += found[store]["tasks"]
    whole = {
        family: {"tasks": count, "of": PAPER[family], "share": round(count / PAPER[family], 4)}
        for family, count in reached.items()
    }
    return {"reached": whole, **found}


if __name__ == "__main__":
    slice_of(sys.argv[1], float(sys.argv[2]))
