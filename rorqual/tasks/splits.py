"""Splits of a store by structure: what is held out was never seen in training under another name.

Three kinds of held-out tasks, from near to far: worlds with another fingerprint (`test`), worlds that join two mechanisms whose
combination training never shows (`test_combination`), worlds with a mechanism that training never shows (`test_mechanism`).

A world that is material (a corpus, data files) is shared by many tasks and has no structure to hold out: there tasks are split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from rorqual.errors import require
from rorqual.tasks.task import Task, World

MATERIAL = frozenset({"search", "interpreter"})
"""Families whose worlds are material."""

TRAIN, TEST, TEST_COMBINATION, TEST_MECHANISM = "train", "test", "test_combination", "test_mechanism"


@dataclass(frozen=True)
class SplitConfig:
    """What to hold out."""

    test_share: float = 0.1
    """Of the fingerprints that no other rule holds out."""
    combination_share: float = 0.05
    """Of the pairs of mechanisms; a world that joins a held-out pair is held out."""
    held_out_mechanisms: tuple[str, ...] = ()
    salt: str = "rorqual"
    """Another salt gives another split."""

    def __post_init__(self) -> None:
        require(
            self,
            test_share=(0 <= self.test_share < 1, "in [0, 1)"),
            combination_share=(0 <= self.combination_share < 1, "in [0, 1)"),
        )


def split_of(world: World, config: SplitConfig | None = None) -> str:
    """Which split a world, and so each of its tasks, belongs to: a pure function of its structure."""
    config = config or SplitConfig()
    if set(world.mechanisms) & set(config.held_out_mechanisms):
        return TEST_MECHANISM
    pairs = combinations(sorted(set(world.mechanisms)), 2)
    if any(_share("+".join(pair), config.salt) < config.combination_share for pair in pairs):
        return TEST_COMBINATION
    return TEST if _share(world.fingerprint or world.id, config.salt) < config.test_share else TRAIN


def splits(tasks: Iterable[Task], worlds: Mapping[str, World], config: SplitConfig | None = None) -> dict[str, list[str]]:
    """split -> ids of tasks. A task without a world, or whose world is material, is split by its own key."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        world = None if task.family in MATERIAL else worlds.get(task.world)
        world = world or World(task.key, task.family, {})
        found.setdefault(split_of(world, config), []).append(task.id)
    return found


def _share(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") / 2**64
