"""Workers here and on a local Ray cluster: the same futures, the same bytes, the same verdicts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import wait

import pytest

from rorqual.cli import main
from rorqual.errors import UsageError, UserError
from rorqual.synthesis import Request, maker
from rorqual.tasks import AsyncEpisode, Store, open_episode
from rorqual.workers import KILLED, Workers, open_pool, open_stage
from tests.tasks import worlds


@pytest.fixture
def ray():
    """A machine with Ray and no cluster: the code under test starts its own."""
    return pytest.importorskip("ray", reason="needs Ray: pip install 'rorqual[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """A cluster that is there already, as on a cluster of machines."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'rorqual[ray]'")
    with open_pool(Workers(2, "ray")):
        yield ray


@pytest.mark.parametrize(
    ("text", "expected"), [("1", Workers(1)), ("7", Workers(7)), ("ray", Workers(0, "ray")), ("ray:3", Workers(3, "ray"))]
)
def test_workers_are_read(text, expected):
    assert Workers.parse(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "many", "rays", "ray:x", "ray:-1", ""])
def test_what_names_no_workers_is_wrong_use(text):
    with pytest.raises(UsageError, match="--workers"):
        Workers.parse(text)


def test_a_killed_local_worker_is_said():
    with pytest.raises(UserError, match="worker process was killed"), open_pool(Workers(1)) as pool:
        pool.submit(os._exit, 3).result()
    assert "goes on where it was left" in KILLED


def test_without_ray_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"rorqual\[ray\]"), open_pool(Workers(2, "ray")):
        pass


def test_local_environments_are_opened_where_they_were():
    with open_stage(Workers(2)) as stage:
        assert stage.remote(open_episode) is open_episode


def test_a_store_has_the_same_bytes_from_ray_as_from_here(ray, tmp_path):
    """Two families on both assembly lines."""
    for family, count, overrides in (("general", 3, ("isolation=none",)), ("writing", 5, ())):
        stores = {}
        for engine in ("local", "ray"):
            stores[engine] = Store(tmp_path / family / engine)
            maker(family).synthesize(Request(count, stores[engine], 5, 2, overrides=overrides, engine=engine))
        for name in ("tasks.jsonl", "worlds.jsonl", "rejected.jsonl", "manifest.json"):
            local, remote = ((store.directory / name).read_bytes() for store in stores.values())
            assert local == remote, (family, name)
    assert not ray.is_initialized(), "the cluster that was started for it has ended with it"


def test_an_error_of_a_ray_worker_comes_back_as_itself(cluster):
    with open_pool(Workers(1, "ray")) as pool:
        future = pool.submit(int, "x")
        wait([future])
        assert isinstance(future.exception(), ValueError)


def test_episodes_on_ray_give_what_they_give_here(cluster):
    world, task = worlds.world(), worlds.task()

    async def play(opener):
        episodes = [AsyncEpisode(opener(task, world, "process")) for _ in range(3)]

        async def one(episode, seats):
            opening = await episode.reset()
            seen = [await episode.call("list_slots", "{}"), await episode.call("book", {"slot": "S-3", "seats": seats})]
            over, verdict = episode.is_over, await episode.finish("20")
            await episode.close()
            return opening, seen, over, verdict

        return await asyncio.gather(*(one(episode, seats) for episode, seats in zip(episodes, (2, 3, 9), strict=True)))

    here = asyncio.run(play(open_episode))
    with open_stage(Workers(2, "ray")) as stage:
        there = asyncio.run(play(stage.remote(open_episode)))
    assert there == here
    assert [verdict.passed for *_, verdict in here] == [True, False, False]


def test_an_evaluation_on_ray_has_the_same_results(cluster, tmp_path, capsys):
    made = ["evaluate", "--benchmark", "ruler", "--count", "3", "--length", "300", "--policy", "program:gold", "--json"]
    found = []
    for workers in ("1", "ray:2"):
        assert main([*made, "--workers", workers, "--out", str(tmp_path / workers.replace(":", "-"))]) == 0
        found.append(json.loads(capsys.readouterr().out))
    same = ("score", "outcomes", "identity")
    assert {name: found[0][name] for name in same} == {name: found[1][name] for name in same}


def test_a_training_stage_opens_its_worlds_on_the_cluster(cluster, tmp_path):
    from dataclasses import replace

    from rorqual.stages.task_set import open_tasks
    from rorqual.tasks import TaskRow, task_record, world_record

    store = Store(tmp_path)
    store.append(world_record(worlds.world(), (0,)))
    store.append(task_record(TaskRow(worlds.task()), (0, 0)))
    tasks = open_tasks(tmp_path, "process", "all")

    async def first(tasks):
        episode = tasks.open("t1")
        opening, seen = await episode.reset(), await episode.call("list_slots", "{}")
        await episode.close()
        return opening, seen

    with open_stage(Workers(1, "ray")) as stage:
        there = asyncio.run(first(replace(tasks, opener=stage.remote(open_episode))))
    assert there == asyncio.run(first(tasks))


def test_an_endpoint_needs_no_cluster(tmp_path):
    command = ["synthesize", "--family", "general", "--count", "1", "--out", str(tmp_path), "--endpoint", "http://127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-m", "rorqual", *command, "--workers", "ray"], capture_output=True, text=True)
    assert done.returncode == 2 and "give a number" in done.stderr
