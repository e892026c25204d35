"""Specialists [V3.2, 3.1]: one GRPO run per domain and mode, all from one base, in turn or several side by side.

    DIR/maths-thinking/model    DIR/maths-direct/model    DIR/search-thinking/model ...    DIR/specialists.json

Thinking and direct answers are trained apart, since in the paper different models generate the long-reasoning and the
direct-answer data. A run that failed takes none of its neighbours with it; started again, finished runs are not repeated and
unfinished ones go on where they were.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rorqual.config import build, dump, to_mapping
from rorqual.errors import UserError, require
from rorqual.rewards.judging import JudgeConfig
from rorqual.runlog import write_atomically
from rorqual.stages import grpo
from rorqual.stages.task_set import TaskSet
from rorqual.train.loop import Site
from rorqual.train.setup import begin

Mode = Literal["thinking", "direct"]
FILE = "specialists.json"
POLL_S = 0.2


@dataclass(frozen=True)
class Config:
    grpo: grpo.Config = field(default_factory=grpo.Config)
    """What all runs have in common."""
    domains: tuple[str, ...] = ()
    """Empty: every domain of the tasks."""
    modes: tuple[Mode, ...] = ("thinking",)
    by_domain: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Domain -> what is other there, shaped like `grpo`; `{maths = { policy = { default = { beta = 0.0 } } } }`."""
    side_by_side: int = 1
    """Runs at one time, each a process of its own; 1 runs them in turn in this one."""
    devices: tuple[str, ...] = ()
    """CUDA device numbers dealt to the processes in turn; empty: what the machine gives each."""

    def __post_init__(self) -> None:
        require(
            self,
            modes=(bool(self.modes) and len(set(self.modes)) == len(self.modes), "thinking, direct, or both"),
            side_by_side=(self.side_by_side >= 1, "at least 1"),
        )
        for domain in self.by_domain:
            self.run(domain, self.modes[0])

    def run(self, domain: str, mode: Mode) -> grpo.Config:
        """The settings of one specialist."""
        values = _merged(to_mapping(self.grpo), self.by_domain.get(domain, {}))
        values["mode"]["thinking"] = mode == "thinking"
        return build(grpo.Config, values, f"specialists.by_domain.{domain}")


@dataclass(frozen=True)
class Specialist:
    """A finished or planned run."""

    domain: str
    mode: Mode
    model: Path

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.mode}"

    @property
    def thinking(self) -> bool:
        return self.mode == "thinking"


def main(config: Config, init: Path, tasks: TaskSet, site: Site) -> Path:
    """Train all specialists from `init`; the directory, in which `read_specialists` finds them.

    Raises UserError after the last run where one or more failed, and names them.
    """
    begin(config, site, init)
    domains = config.domains or tuple(tasks.by_domain)
    planned = [Specialist(d, m, site.directory / f"{d}-{m}" / "model") for d in domains for m in config.modes]
    tasks.of(domains)
    run = _in_turn if config.side_by_side == 1 else _side_by_side
    failures = run(config, init, tasks, site, planned)
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(planned)} specialists failed: {told}; start the stage again to go on")
    if site.world.is_main:
        rows = [{"domain": s.domain, "mode": s.mode, "model": s.name + "/model"} for s in planned]
        write_atomically(site.directory / FILE, json.dumps(rows, indent=1))
    site.world.barrier()
    return site.directory


def read_specialists(directory: Path) -> list[Specialist]:
    """The specialists of a finished run. Raises UserError where the directory holds none."""
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; rorqual specialists --out {directory} makes it when all runs have ended")
    return [Specialist(row["domain"], row["mode"], directory / row["model"]) for row in json.loads(path.read_text())]


def _in_turn(config: Config, init: Path, tasks: TaskSet, site: Site, planned: Sequence[Specialist]) -> dict[str, str]:
    failures: dict[str, str] = {}
    for each in planned:
        place = site.below(each.name)
        try:
            # One rank holds the lock for all: a second one of the same run would wait for it for ever.
            with _alone(place.directory) if site.world.is_main else nullcontext():
                grpo.main(config.run(each.domain, each.mode), init, grpo.pool_of(tasks.of([each.domain])), place)
        except UserError as error:
            if site.world.size > 1 or "stopped by a signal" in str(error):
                raise
            failures[each.name] = str(error)
        finally:
            place.log.close()
        _note(site, each, failures.get(each.name, ""))
    return failures


def _side_by_side(config: Config, init: Path, tasks: TaskSet, site: Site, planned: Sequence[Specialist]) -> dict[str, str]:
    if site.world.size > 1:
        raise UserError("specialists.side_by_side: more than 1 starts processes of its own; run it without torchrun")
    waiting, running, failures = list(planned), dict[int, tuple[Specialist, Any]](), dict[str, str]()
    try:
        while waiting or running:
            for slot in range(config.side_by_side):
                if slot not in running and waiting:
                    each = waiting.pop(0)
                    running[slot] = (each, _started(config, init, tasks, each, slot, site))
            for slot, (each, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode:
                        failures[each.name] = _last_line(each.model.parent / "stderr.txt") or f"exit {process.returncode}"
                    _note(site, each, failures.get(each.name, ""))
            time.sleep(POLL_S)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failures


def _started(config: Config, init: Path, tasks: TaskSet, each: Specialist, slot: int, site: Site) -> subprocess.Popen:
    """The same run as a process: `rorqual grpo` on a file of its settings."""
    directory = each.model.parent
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / "grpo.toml"
    write_atomically(settings, dump(_Table(config.run(each.domain, each.mode))))
    command = [
        sys.executable, "-m", "rorqual", "grpo", str(settings), "--init", str(init), "--out", str(directory), "--quiet",
        "--isolation", tasks.isolation, "--split", tasks.split, "--domains", each.domain, "--device", site.world.device.type,
        "--tasks", *map(str, tasks.sources.values()),
    ]  # fmt: skip
    if tasks.judge is not None:
        judge = directory / "judge.toml"
        write_atomically(judge, dump(_JudgeTable(tasks.judge.config)))
        command += ["--judge", str(judge)]
    # Processes that share the cores must not each take them all.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.side_by_side)), **os.environ}
    if config.devices:
        environment["CUDA_VISIBLE_DEVICES"] = config.devices[slot % len(config.devices)]
    with _alone(directory) as lock, open(directory / "stderr.txt", "w") as errors:
        # The child holds the lock as long as it lives, even if this process dies before it.
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(lock,), start_new_session=True
        )


@dataclass(frozen=True)
class _Table:
    grpo: grpo.Config


@dataclass(frozen=True)
class _JudgeTable:
    judge: JudgeConfig


@contextmanager
def _alone(directory: Path) -> Iterator[int]:
    """A lock on a run's directory. Where a run of a runner that was killed still goes on, this waits for its end."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _note(site: Site, each: Specialist, failure: str) -> None:
    site.log.event("specialist ended", name=each.name, failure=failure)


def _last_line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, with the changes' values in place of the others'."""
    found = dict(values)
    for name, value in changes.items():
        is_table = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if is_table else value
    return found
