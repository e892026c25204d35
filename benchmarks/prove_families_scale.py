"""Search, code and interpreter tasks at the paper's counts through all gates, as far as the given minutes of one core go.

Each family fills a store of its own under runs/families_scale, which a killed slice goes on with. What is reached, seconds,
filter rates, the share of each source, and duplicates are reported as found. The claim is that every stored task passed every
gate and that no two are the same; how far warm runs of faults agree with fresh sandboxes is measured where both were done.

    python -m benchmarks.prove_families_scale FAMILY SECONDS     one slice, to let others have the core in between
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
from rorqual.tasks import Store

SECONDS, QUICK_SECONDS = 2400, 240
MINUTES = {"search": 12.0, "code": 18.0, "interpreter": 5.0}
"""Of one core, by family; RORQUAL_SCALE_MINUTES multiplies them."""
HERE = Path(__file__).parents[1] / "runs" / "families_scale"
RELEASES = {
    "toolz": "0.12.1 1.0.0", "sqlparse": "0.4.4 0.5.0 0.5.1 0.5.3", "marko": "2.0.3 2.1.0 2.1.2",
    "tomlkit": "0.12.0 0.12.5 0.13.0 0.13.2", "cachetools": "5.3.0 5.3.3 5.4.0 5.5.0 5.5.2", "semver": "3.0.1 3.0.2 3.0.4",
    "dep-logic": "0.2.0 0.3.0 0.4.0 0.5.0", "humanize": "4.8.0 4.9.0 4.10.0 4.11.0", "portion": "2.4.0 2.4.2 2.5.0 2.6.0",
    "pathspec": "0.11.2 0.12.1", "h11": "0.14.0 0.16.0", "wcwidth": "0.2.12 0.2.13", "natsort": "8.3.1 8.4.0",
    "mistune": "3.0.1 3.0.2 3.1.0 3.1.2", "more-itertools": "10.2.0 10.3.0 10.4.0", "click": "8.1.7 8.1.8 8.2.0",
    "inflection": "0.5.0 0.5.1", "idna": "3.6 3.7 3.8", "tomli": "2.0.1 2.0.2", "boltons": "24.0.0 25.0.0",
    "parso": "0.8.3 0.8.4", "lark": "1.1.8 1.1.9 1.2.2", "jinja2": "3.1.3 3.1.4 3.1.5", "pyparsing": "3.1.4 3.2.0",
    "attrs": "23.2.0 24.1.0 24.2.0", "packaging": "24.0 24.1", "networkx": "3.3 3.4", "mpmath": "1.2.1 1.3.0",
}  # fmt: skip
"""Twenty-eight small packages with tests in their source archives, built by five different back ends."""
FAULTS = ("toolz==1.0.0", "more-itertools==10.5.0", "sqlparse==0.5.3", "tomlkit==0.13.2", "cachetools==5.5.2", "idna==3.10",
          "marko==2.1.2", "mistune==3.1.2", "humanize==4.11.0", "boltons==25.0.0", "attrs==25.1.0", "semver==3.0.4",
          "portion==2.6.0", "natsort==8.4.0", "h11==0.16.0", "pathspec==0.12.1", "parso==0.8.4", "lark==1.2.2", "jinja2==3.1.6",
          "click==8.2.0", "pyparsing==3.2.1", "dep-logic==0.5.0", "networkx==3.4", "mpmath==1.3.0")  # fmt: skip


def pairs() -> list[str]:
    """name==OLD..NEW of neighbouring releases: the newest pair of each package first, then the ones before."""
    newest = [(name, list(itertools.pairwise(versions.split()))[::-1]) for name, versions in RELEASES.items()]
    found = [(depth, f"{name}=={a}..{b}") for name, listed in newest for depth, (a, b) in enumerate(listed)]
    return [wish for _, wish in sorted(found, key=lambda pair: pair[0])]


def settings(family: str) -> list[str]:
    if family == "search":
        return ["backend=tantivy"]
    if family == "interpreter":
        return []
    return ["grading=warm", "most_parts=12", f"releases={json.dumps(pairs())}", f"projects={json.dumps(FAULTS)}"]


def slice_of(family: str, seconds: float) -> None:
    """Work on a family's store for so long, or until it is full; the time is written down."""
    began = time.monotonic()
    command = [sys.executable, "-m", "rorqual", "synthesize", "--family", family, "--count", str(PAPER[family])]
    command += ["--out", str(HERE / family), "--seed", "20", "--json"]
    for setting in settings(family):
        command += ["--set", setting]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    _note(family, time.monotonic() - began)


def _note(family: str, seconds: float) -> None:
    HERE.mkdir(parents=True, exist_ok=True)
    times = used()
    times[family] = times.get(family, 0.0) + seconds
    write_atomically(HERE / "times.json", json.dumps(times))


def used() -> dict[str, float]:
    place = HERE / "times.json"
    return json.loads(place.read_text()) if place.exists() else {}


def figures_of(store: Store, count: int, seconds: float) -> dict[str, Any]:
    """What stands in a store, sealed or not."""
    selection = Selection(count)
    ordered = sorted((r for r in store.records() if r.kind in ("world", "task", "rejected")), key=lambda r: (r.order, r.kind))
    rows = [record.value for record in selection.run(ordered) if record.kind == "task"]
    assert all(gate["passed"] for row in rows for gate in row["gates"]), "a stored task failed a gate"
    assert len({json.dumps(row["task"]["messages"]) + row["task"]["world"] for row in rows}) == len(rows), (
        "two tasks are the same"
    )
    found = {"seconds": round(seconds), "of": count, **{k: v for k, v in selection.figures().items() if k != "digest"}}
    found.pop("skeletons", None)
    found["tasks_per_second"] = round(len(rows) / seconds, 2) if seconds else None
    agree = [row["measures"]["warm_agrees"] for row in rows if "warm_agrees" in row["measures"]]
    if agree:
        found["graded_both_ways"] = {"tasks": len(agree), "same_failing_tests": round(sum(agree) / len(agree), 4)}
    if any("build" in row["task"]["tags"] for row in rows):
        found["real_by_build"] = dict(
            Counter(r["task"]["tags"]["build"] for r in rows if r["task"]["tags"]["source"] != "mutation")
        )
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
    for family, minutes in MINUTES.items():
        left = 60 * minutes * factor - used().get(family, 0.0)
        if left > 5 and not Store(HERE / family).is_sealed:
            slice_of(family, left)
    return {family: figures_of(Store(HERE / family), PAPER[family], used().get(family, 0.0)) for family in MINUTES}


if __name__ == "__main__":
    slice_of(sys.argv[1], float(sys.argv[2]))
