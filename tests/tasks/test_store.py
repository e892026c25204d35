"""The store loses at most the line in hand, and its sealed bytes depend on the content alone."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from rorqual.tasks import GateResult, SplitConfig, Store, TaskError, TaskRow, World, split_of, splits, task_record, world_record

from .worlds import task, world


def rows(count: int) -> list[TaskRow]:
    return [TaskRow(task(id=f"t{i}"), (GateResult("gold_passes", True, measures={"steps": 2.0}),)) for i in range(count)]


def fill(directory: Path, order: list[int]) -> Store:
    store = Store(directory)
    for i in order:
        store.append(task_record(rows(i + 1)[i], (i, 0)))
    store.append(world_record(world(), (0,)))
    store.seal({"seed": 1})
    return store


def test_sealed_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    fill(tmp_path / "a", [0, 1, 2, 3])
    fill(tmp_path / "b", [3, 1, 0, 2])
    for name in ("tasks.jsonl", "worlds.jsonl", "rejected.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "a" / "log.jsonl").exists()


def test_rows_come_back_equal(tmp_path: Path) -> None:
    store = fill(tmp_path, [2, 0, 1])
    assert list(store.rows()) == rows(3)
    assert store.worlds() == {"w1": world()}
    assert store.is_sealed and store.manifest["counts"]["task"] == 3


def test_a_line_cut_short_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, third = rows(3)
    store.append(task_record(first, (0, 0)))
    store.append(task_record(second, (1, 0)))
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    store.append(task_record(third, (2, 0)))
    assert [row.task.id for row in store.rows()] == ["t0", "t2"]


def test_a_piece_of_work_done_twice_counts_once(tmp_path: Path) -> None:
    store = fill(tmp_path, [0, 1, 1, 0])
    assert [row.task.id for row in store.rows()] == ["t0", "t1"]


def test_a_sealed_store_can_be_added_to(tmp_path: Path) -> None:
    store = fill(tmp_path, [0, 1])
    store.append(task_record(rows(3)[2], (2, 0)))
    assert not store.is_sealed
    store.seal({"seed": 1})
    assert [row.task.id for row in store.rows()] == ["t0", "t1", "t2"]


def append_many(directory: str, start: int) -> None:
    for i in range(start, start + 20):
        Store(directory).append(task_record(TaskRow(task(id=f"t{i}")), (i, 0)))


def test_many_processes_append_whole_lines(tmp_path: Path) -> None:
    workers = [multiprocessing.Process(target=append_many, args=(str(tmp_path), 20 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(int(row.task.id[1:]) for row in Store(tmp_path).rows()) == list(range(80))


def test_a_directory_without_tasks_says_so(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task store here"):
        list(Store(tmp_path).rows())


def test_rows_of_another_version_are_named(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    path = tmp_path / "tasks.jsonl"
    value = json.loads(path.read_text())
    value["task"]["colour"] = "blue"
    path.write_text(json.dumps(value) + "\n")
    with pytest.raises(TaskError, match="no field colour"):
        list(Store(tmp_path).rows())


def structures(count: int) -> list[World]:
    names = ["booking", "stock", "ledger", "tickets", "routes"]
    return [
        World(f"w{i}", "general", {}, f"f{i}", tuple(sorted({names[i % 5], names[(i * i + 1 + i // 7) % 5]})))
        for i in range(count)
    ]


def test_splits_never_share_a_fingerprint_or_a_held_out_combination() -> None:
    config = SplitConfig(test_share=0.3, combination_share=0.2, held_out_mechanisms=("routes",))
    by_split: dict[str, list[World]] = {}
    for made in structures(400):
        by_split.setdefault(split_of(made, config), []).append(made)
    assert set(by_split) == {"train", "test", "test_combination", "test_mechanism"}
    pairs = {split: {made.mechanisms for made in worlds if len(made.mechanisms) == 2} for split, worlds in by_split.items()}
    assert not pairs["train"] & pairs["test_combination"]
    assert not any("routes" in made.mechanisms for split in ("train", "test", "test_combination") for made in by_split[split])


def test_worlds_with_one_structure_fall_in_one_split_whatever_their_names() -> None:
    twins = [World(f"name{i}", "general", {}, "same", ("booking", "stock")) for i in range(20)]
    assert len({split_of(made, SplitConfig(test_share=0.5)) for made in twins}) == 1


def test_every_task_is_in_exactly_one_split() -> None:
    tasks = [task(id=f"t{i}", world=f"w{i % 7}") for i in range(30)]
    found = splits(tasks, {f"w{i}": world for i, world in enumerate(structures(5))})
    assert sorted(name for names in found.values() for name in names) == sorted(made.id for made in tasks)


def test_tasks_over_shared_material_are_held_out_one_by_one() -> None:
    world = World("w", "search", {}, "corpus", ("debian",))
    found = splits(
        [task(id=f"t{i}", family="search", world="w", messages=({"role": "user", "content": str(i)},)) for i in range(200)],
        {"w": world},
    )
    assert set(found) == {"train", "test"} and 5 <= len(found["test"]) <= 40
