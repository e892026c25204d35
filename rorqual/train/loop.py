"""The steps of a stage: resume, progress, metrics, checkpoints. What a step does is the stage's own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from rorqual.data.store import TokenStore
from rorqual.errors import UserError, require
from rorqual.parallel.world import World
from rorqual.runlog import RunLog
from rorqual.train.checkpoints import Checkpoints, restore_random
from rorqual.train.optimizer import Optimizer


@dataclass(frozen=True)
class Pace:
    """How long a stage runs, and how often it saves."""

    steps: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require(
            self,
            steps=(self.steps >= 0, "at least 0"),
            checkpoint_every=(self.checkpoint_every >= 1, "at least 1"),
            keep_checkpoints=(self.keep_checkpoints >= 1, "at least 1"),
        )


@dataclass(frozen=True)
class Site:
    """What the loop needs of the place where a stage works."""

    directory: Path
    world: World
    log: RunLog

    @classmethod
    def open(cls, directory: Path, world: World, quiet: bool = False) -> Site:
        """All ranks share the directory; the first one's log is the run's, the others' lie below it."""
        logs = directory if world.is_main else directory / "ranks" / str(world.rank)
        return cls(directory, world, RunLog(logs, quiet or not world.is_main))

    def below(self, name: str) -> Site:
        """A stage's place inside this one, as quiet."""
        return Site.open(self.directory / name, self.world, self.log.quiet)


@dataclass(frozen=True)
class Place:
    """Where a stage works: its directory (config, checkpoints, finished model), its data, its processes, its log."""

    directory: Path
    store: TokenStore
    world: World
    log: RunLog

    @classmethod
    def open(cls, directory: Path, store: TokenStore, world: World, quiet: bool = False) -> Place:
        return cls(directory, store, world, Site.open(directory, world, quiet).log)


def run_steps(
    name: str,
    pace: Pace,
    one_step: Callable[[int], dict[str, float]],
    optimizer: Optimizer,
    tensors: dict[str, Tensor],
    place: Site | Place,
) -> None:
    """Call one_step(step) for the steps that are still to do, and log its metrics.

    tensors: all that a step changes, by name; they are saved every `checkpoint_every` steps, when the stage ends, and when
    it is asked to stop (SIGTERM, Ctrl-C, or SIGALRM: its time is over); a later call goes on from the newest whole checkpoint.
    """
    checkpoints = Checkpoints(place.directory / "checkpoints", place.world, place.log, pace.keep_checkpoints)
    facts = checkpoints.load(tensors)
    done = facts["step"] if facts else 0
    if facts:
        restore_random(tensors)
        optimizer.round_masters()
        place.log.event("resumed", stage=name, step=done)
    began = time.monotonic()
    with place.log.progress(name, pace.steps, done) as progress, _asked_to_stop() as stop:
        for step in range(done, pace.steps):
            metrics = one_step(step)
            if place.world.is_main:
                place.log.metrics(step, **metrics)
            progress.advance(note=_note(metrics))
            last, asked = step + 1 == pace.steps, _any_asked(stop, place.world)
            if last or asked or (step + 1) % pace.checkpoint_every == 0:
                checkpoints.save(step + 1, tensors, {"stage": name})
            if asked and not last:
                why = "as its time is over" if stop == [signal.SIGALRM] else "by a signal"
                raise UserError(f"{name}: stopped {why} after step {step + 1}, which is saved; start it again to go on")
    place.log.event("stage ended", stage=name, steps=pace.steps, seconds=round(time.monotonic() - began, 1))


def _any_asked(stop: list[int], world: World) -> bool:
    """Whether any rank was asked: they must stop after the same step."""
    return bool(stop) if world.size == 1 else bool(world.sum(torch.tensor(float(len(stop)), device=world.device)) > 0)


def _note(metrics: dict[str, float]) -> str:
    shown = {"train/loss": "loss", "train/index_loss": "index KL", "train/tokens_per_s": "tokens/s"}
    return "  ".join(f"{label} {metrics[name]:.4g}" for name, label in shown.items() if name in metrics)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the signal's number; the step in hand is finished and saved. Outside the main thread: never."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt  # asked twice: at once
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
