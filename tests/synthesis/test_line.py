"""The assembly line: a kill loses the work in hand alone, and the store comes out the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rorqual.synthesis import Request, maker
from rorqual.synthesis.line import CHUNK, Made, Selection, refused, work
from rorqual.tasks import Record, Store, Task, TaskRow, World, task_record, world_record

COUNT, KILLS = 48, 2


def command(out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "rorqual",
        "synthesize",
        "--family",
        "writing",
        "--count",
        str(COUNT),
        "--out",
        str(out),
        "--json",
    ]


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_a_run_killed_at_several_points_of_its_progress_seals_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    maker("writing").synthesize(Request(COUNT, Store(whole)))
    for kill in range(KILLS):
        wanted = lines(killed) + 3 + kill
        process = subprocess.Popen(command(killed), start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and lines(killed) < wanted:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(killed / "log.jsonl", "ab") as log:
        log.write(b'{"kind":"task","order":[9')  # a line that a kill cut short
    assert subprocess.run(command(killed), capture_output=True).returncode == 0
    for name in ("tasks.jsonl", "rejected.jsonl", "manifest.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    before = (killed / "tasks.jsonl").stat().st_mtime_ns
    assert subprocess.run(command(killed), capture_output=True).returncode == 0
    assert (killed / "tasks.jsonl").stat().st_mtime_ns == before  # nothing is left to do


WORLD = World("w", "writing", {"text": "shared"})


def planted(config: None, number: int) -> Made:
    if number % 4 == 3:
        return refused("planted", "every fourth")
    return Made(TaskRow(Task(f"t{number}", "writing", ({"role": "user", "content": str(number // 2)},), world="w")), WORLD)


def test_a_shared_world_is_logged_once_and_equal_tasks_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for chunk in (0, 1):
        work(str(tmp_path), "tests.synthesis.test_line:planted", None, chunk)
    records = list(store.records())
    assert sum(r.kind == "world" for r in records) == 1
    assert {r.order[0] for r in records if r.kind == "rejected"} == set(range(3, 2 * CHUNK, 4))
    selection = Selection(5)
    kinds = [r.kind for r in selection.run(sorted(records, key=lambda r: (r.order, r.kind)))]
    assert selection.count == 5 and kinds.count("world") == 1 and kinds.index("world") < kinds.index("task")
    assert selection.rejected == {"duplicate": 2, "planted": 2}


def test_a_world_logged_with_another_candidate_still_precedes_its_first_chosen_task() -> None:
    row = TaskRow(Task("t", "writing", ({"role": "user", "content": "x"},), world="w"))
    found = list(Selection(1).run([task_record(row, (1,)), world_record(WORLD, (7,)), Record("rejected", (8,), {"gate": "g"})]))
    assert [(r.kind, r.order) for r in found] == [("world", (1,)), ("task", (1,))]


def test_one_prompt_over_one_world_is_several_tasks_where_each_changes_it_otherwise() -> None:
    ask = ({"role": "user", "content": "mend it"},)
    tasks = [Task(f"t{i}", "code", ask, world="w", payload={"changes": {"a.py": text}}) for i, text in enumerate("xyx")]
    selection = Selection(9)
    records = [world_record(WORLD, (0,)), *(task_record(TaskRow(task), (i,)) for i, task in enumerate(tasks))]
    chosen = [r.value["task"]["id"] for r in selection.run(records) if r.kind == "task"]
    assert chosen == ["t0", "t1"] and selection.rejected == {"duplicate": 1}
