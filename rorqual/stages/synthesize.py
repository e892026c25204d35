"""Synthesis as a stage of a recipe: a store for each family, made by programs, each gone on with where it was left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import require
from rorqual.runlog import RunLog
from rorqual.synthesis import Request, maker
from rorqual.tasks import Store


@dataclass(frozen=True)
class StoreConfig:
    family: str
    count: int
    settings: tuple[str, ...] = ()
    """a=b for the family's own config."""
    is_trained_on: bool = False
    """Whether post-training uses it, and its held-out split is evaluated; else it is made and shown."""

    def __post_init__(self) -> None:
        require(self, count=(self.count >= 1, "at least 1"))


@dataclass(frozen=True)
class Config:
    stores: tuple[StoreConfig, ...] = (StoreConfig("primer", 1000, is_trained_on=True),)
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        families = [store.family for store in self.stores]
        require(
            self,
            stores=(bool(families) and len(set(families)) == len(families), "at least one, each family once"),
            workers=(self.workers >= 1, "at least 1"),
        )


def main(config: Config, directory: Path, log: RunLog) -> None:
    """Fill and seal DIRECTORY/FAMILY for every family that is not sealed yet."""
    for each in config.stores:
        store = Store(directory / each.family)
        if store.manifest:
            continue
        with log.progress(f"synthesize {each.family}", each.count) as bar:

            def advance(done: int, note: str, bar: Any = bar, most: int = each.count) -> None:
                bar.advance(min(done, most) - bar.done, note)

            request = Request(each.count, store, config.seed, config.workers, overrides=each.settings, on_progress=advance)
            report = maker(each.family).synthesize(request)
        log.event("synthesized", family=each.family, **dict(report))


def trained_on(config: Config, directory: Path) -> list[Path]:
    """The stores that post-training uses."""
    return [directory / each.family for each in config.stores if each.is_trained_on]
