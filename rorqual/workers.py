"""Where work is done beside this process: local processes, or a Ray cluster. The one seam for synthesis, evaluation, rollouts.

    with open_pool(Workers.parse("ray:8")) as pool:
        future = pool.submit(function, argument)         # a concurrent.futures.Future, whichever it is

    with open_stage(Workers.parse("ray")) as stage:
        episode = stage.remote(opener)(task)             # an episode that lives on a worker

What is submitted depends on its arguments alone, so the output is the same bytes wherever it runs. On a cluster of several
machines Rorqual must be installed on each, and directories that are written to must be shared. Ray is found by RAY_ADDRESS;
without it a cluster of this machine alone is started, and ended at the end. Nothing is imported from Ray until it is asked for.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rorqual.errors import UsageError, UserError

KILLED = "a worker process was killed (out of memory?); the same command goes on where it was left"
EPISODES_PER_HOST = 64
"""Episodes that one worker of a stage may play at a time; most wait for a sandbox or a model."""


@dataclass(frozen=True)
class Workers:
    """How many, and whose. A count of 0 takes every processor of the Ray cluster."""

    count: int = 1
    engine: Literal["local", "ray"] = "local"

    def __post_init__(self) -> None:
        if self.count < (1 if self.engine == "local" else 0):
            raise UsageError(f"--workers {self.count}: expected at least 1")

    @classmethod
    def parse(cls, text: str) -> Workers:
        """`4`: local processes; `ray`: every processor of the cluster; `ray:8`: so many of it. Raises UsageError."""
        engine, _, count = text.partition(":") if text.startswith("ray") else ("local", "", text)
        if engine not in ("local", "ray") or not (count or "0").isdigit():
            raise UsageError(f"--workers {text}: expected a number, ray, or ray:NUMBER")
        return cls(int(count or 0), engine)


class Pool(Protocol):
    """Takes functions of modules with arguments that can be pickled."""

    count: int

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]: ...


@contextmanager
def open_pool(workers: Workers) -> Iterator[Pool]:
    """Workers until the block ends; what has not begun by then is given up. Raises UserError where one was killed."""
    opened = _RayPool if workers.engine == "ray" else _LocalPool
    pool = opened(workers)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(KILLED) from error
    finally:
        pool.close()


class _LocalPool:
    def __init__(self, workers: Workers):
        self.count = workers.count
        self._executor = ProcessPoolExecutor(
            workers.count, multiprocessing.get_context("spawn"), initializer=_end_with_parent, initargs=(os.getpid(),)
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._executor.submit(function, *arguments)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed ends at once, and its sandboxes with it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# --- Ray


class _Cluster:
    """A connection to Ray; a cluster that this one started ends with it."""

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--workers ray needs Ray: pip install 'rorqual[ray]'") from None
        self.ray = ray
        self._was_there = ray.is_initialized()
        if not self._was_there:
            self._join()
        self.processors = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def _join(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives its workers the lowest priority but four, so that beside a busy neighbour nothing gets done.
        os.environ.setdefault("RAY_worker_niceness", "0")
        address = os.environ.get("RAY_ADDRESS")
        own = {} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            self.ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"RAY_ADDRESS={address}" if address else "a cluster of this machine"
            raise UserError(f"{where}: Ray can't be reached or started: {error}") from None

    def close(self) -> None:
        if not self._was_there:
            self.ray.shutdown()


class _RayPool:
    """One task of the cluster for each submission; a task whose worker dies is tried again, which gives the same."""

    def __init__(self, workers: Workers):
        self._cluster = _Cluster()
        self.count = workers.count or self._cluster.processors
        self._call = self._cluster.ray.remote(num_cpus=1, max_retries=3)(_call)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._call.remote(function, arguments).future()

    def close(self) -> None:
        self._cluster.close()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


# --- episodes


class Stage:
    """Where episodes are opened: here, unless it is Ray's."""

    def remote(self, open_episode: Callable[..., Any]) -> Callable[..., Any]:
        """The same opener, whose episodes live on the stage's workers. Its first argument is the task."""
        return open_episode


@contextmanager
def open_stage(workers: Workers) -> Iterator[Stage]:
    """A stage for environments until the block ends. Local environments need no workers: each is its own sandbox."""
    if workers.engine == "local":
        yield Stage()
        return
    stage = _RayStage(workers)
    try:
        yield stage
    finally:
        stage.close()


class _RayStage(Stage):
    """Hosts on the cluster, each with many episodes; an episode stays on its host."""

    def __init__(self, workers: Workers):
        self._cluster = _Cluster()
        ray = self._cluster.ray
        count = workers.count or self._cluster.processors
        make: Any = ray.remote(num_cpus=1, max_concurrency=EPISODES_PER_HOST)(_Host)  # type: ignore[call-overload]
        self._hosts = itertools.cycle([make.remote() for _ in range(count)])
        self._lock = threading.Lock()

    def remote(self, open_episode: Callable[..., Any]) -> Callable[..., Any]:
        ray = self._cluster.ray
        try:
            opener = ray.put(open_episode)
        except (TypeError, AttributeError) as error:
            raise UserError(f"--workers ray: these environments can't be sent to another process: {error}") from None

        def opened(task: Any, *more: Any) -> _RemoteEpisode:
            with self._lock:
                host = next(self._hosts)
            return _RemoteEpisode(ray, host, host.open.remote(opener, task, *more), task)

        return opened

    def close(self) -> None:
        self._cluster.close()


class _Host:
    """On a worker: episodes by number."""

    def __init__(self) -> None:
        self._episodes: dict[int, Any] = {}
        self._numbers = itertools.count()

    def open(self, opener: Callable[..., Any], *arguments: Any) -> int:
        number = next(self._numbers)
        self._episodes[number] = opener(*arguments)
        return number

    def ask(self, number: int, name: str, arguments: tuple[Any, ...]) -> tuple[Any, bool]:
        """What a method gives, and whether the episode is over now."""
        episode = self._episodes[number]
        return getattr(episode, name)(*arguments), episode.is_over

    def close(self, number: int) -> None:
        episode = self._episodes.pop(number, None)
        if episode is not None:
            episode.close()


class _RemoteEpisode:
    """An episode as `rorqual.tasks.Episode` has it, played on a host."""

    def __init__(self, ray: Any, host: Any, opened: Any, task: Any):
        self._ray, self._host, self._opened, self.task = ray, host, opened, task
        self.is_over = False

    def _ask(self, name: str, *arguments: Any) -> Any:
        number = self._ray.get(self._opened)  # what opening raised is raised here
        answer, self.is_over = self._ray.get(self._host.ask.remote(number, name, arguments))
        return answer

    def reset(self) -> Any:
        return self._ask("reset")

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return self._ask("call", name, arguments)

    def finish(self, text: str | None = None) -> Any:
        return self._ask("finish", text)

    def close(self) -> None:
        self._ray.get(self._host.close.remote(self._ray.get(self._opened)))
