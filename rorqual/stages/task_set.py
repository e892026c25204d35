"""The tasks that a stage works on: those of one store or several, of one split, each with its world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rorqual.config import to_mapping
from rorqual.errors import UserError
from rorqual.rewards.judging import Judge, JudgeConfig, JudgedEpisode
from rorqual.tasks import AsyncEpisode, Episode, Store, Task, World, open_episode, splits

Split = Literal["train", "test", "test_combination", "test_mechanism", "all"]


@dataclass(frozen=True)
class TaskSet:
    """Tasks by id with their worlds; a task's family is its domain. sources: where they lie, by role, for lineage."""

    tasks: Mapping[str, Task]
    worlds: Mapping[str, World]
    isolation: str
    split: str
    sources: Mapping[str, Path]
    judge: Judge | None = None
    """Scores the attempts in its domains."""
    opener: Callable[[Task, World | None, str], Episode] = open_episode
    """Opens the worlds here, or on a stage's workers (rorqual/workers.py)."""

    @property
    def by_domain(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for task in self.tasks.values():
            found.setdefault(task.family, []).append(task.id)
        return found

    def of(self, domains: Sequence[str]) -> TaskSet:
        """Those of some domains alone. Raises UserError where one has no task."""
        there = self.by_domain
        if missing := [name for name in domains if name not in there]:
            raise UserError(f"no task of the split {self.split} for {', '.join(missing)}; there is {', '.join(there)}")
        chosen = {name: task for name, task in self.tasks.items() if task.family in domains}
        return replace(self, tasks=chosen)

    def open(self, task_id: str) -> AsyncEpisode:
        task = self.tasks[task_id]
        episode = self.opener(task, self.world(task_id), self.isolation)
        if self.judge is not None and task.family in self.judge.config.domains:
            return JudgedEpisode(episode, self.judge)
        return AsyncEpisode(episode)

    def world(self, task_id: str) -> World | None:
        return self.worlds.get(self.tasks[task_id].world)

    @property
    def settings(self) -> dict[str, Any]:
        """What beside the stores says which tasks these are and how they are played, for lineage."""
        judged = {"judge": to_mapping(self.judge.config)} if self.judge else {}
        return {"isolation": self.isolation, "split": self.split, **judged}


def open_tasks(
    directories: Path | Sequence[Path], isolation: str = "bwrap", split: Split = "train", judge: JudgeConfig | None = None
) -> TaskSet:
    """The tasks of one split of all stores together. Raises UserError where there are none, or two share an id."""
    directories = [directories] if isinstance(directories, Path) else list(directories)
    tasks: dict[str, Task] = {}
    worlds: dict[str, World] = {}
    sizes: dict[str, int] = {}
    for directory in directories:
        store = Store(directory)
        own, theirs = {task.id: task for task in store.tasks()}, store.worlds()
        by_split = splits(own.values(), theirs) | {"all": list(own)}
        sizes = {name: sizes.get(name, 0) + len(ids) for name, ids in by_split.items()} | {
            name: size for name, size in sizes.items() if name not in by_split
        }
        for name in by_split.get(split, ()):
            if name in tasks and tasks[name] != own[name]:
                raise UserError(
                    f"{directory}: the id {name} belongs to another task of the stores before it; make it with --seed"
                )
            tasks[name] = own[name]
        worlds |= theirs
    if not tasks:
        found = ", ".join(f"{name} {size}" for name, size in sorted(sizes.items())) or "nothing"
        places = ", ".join(map(str, directories))
        raise UserError(f"{places}: holds no tasks of the split {split} ({found}); make some with rorqual synthesize --out DIR")
    sources = {"tasks" if len(directories) == 1 else f"tasks {n}": path for n, path in enumerate(directories)}
    return TaskSet(tasks, worlds, isolation, split, sources, Judge(judge) if judge else None)
