"""A run as its files tell it: stages, exhibits, evaluations, task stores, trajectories, lineage. No torch, nothing computed anew.

Whatever is missing is an empty value; the page says so in its place. What stands where:

    RUN/config.toml, environment.json, events.jsonl     the recipe, the machine, what the pipeline told
    RUN/**/events.jsonl                                 a stage, where it holds metrics or the event that a stage ended
    RUN/exhibits/*.json                                 what was measured of the finished model (rorqual/train/exhibits.py)
    RUN/**/results.json                                 an evaluation (rorqual evaluate)
    RUN/**/manifest.json with counts                    a store of tasks (rorqual synthesize)
    RUN/**/*.npz with a record                          an attempt at a task, turn by turn
    RUN/model/lineage.json                              what made the checkpoint
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.errors import UserError
from rorqual.runlog import EVENTS, read_events

MAX_ATTEMPTS = 400
"""Of the attempts of one directory only so many are opened to choose those that the page shows."""


@dataclass(frozen=True)
class Stage:
    """One directory of a run in which steps were made."""

    name: str
    """Its directory below the run's, such as train-sparse or specialists/retail."""
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    """The metrics of each step in order, the last written ones where a step was made twice."""
    seconds: float
    """Of wall-clock time over all sessions of the stage."""
    began: float
    has_ended: bool
    resumes: int

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was written."""
        found = [(each["step"], float(each[name])) for each in self.metrics if isinstance(each.get(name), int | float)]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Metrics that begin so."""
        return sorted({name for each in self.metrics for name in each if name.startswith(prefix)})

    @property
    def tokens_by_step(self) -> list[float]:
        """Tokens that each step trained on: the batch's size, or what the step counted."""
        batch = self.config.get("batch") or self.config
        size = batch.get("rows", 0) * batch.get("length", 0) if isinstance(batch, Mapping) else 0
        return [float(size or each.get("train/tokens") or each.get("rollout/sampled_tokens") or 0) for each in self.metrics]

    @property
    def tokens(self) -> float:
        return sum(self.tokens_by_step)

    @property
    def memory_bytes(self) -> float:
        return max((each.get("train/memory_bytes", 0.0) for each in self.metrics), default=0.0)

    @property
    def is_rl(self) -> bool:
        return bool(self.names("rollout/"))


@dataclass(frozen=True)
class Attempt:
    """A trajectory's record: its turns, messages, verdict and end, as rorqual/rollout/archive.py stores them."""

    source: str
    record: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return (self.record.get("verdict") or {}).get("outcome") == "passed"

    @property
    def num_calls(self) -> int:
        return sum(len(turn["observations"]) for turn in self.record["turns"])

    @property
    def num_resets(self) -> int:
        return sum(bool(turn.get("is_reset")) for turn in self.record["turns"])


@dataclass(frozen=True)
class Run:
    """All that the page is made of."""

    directory: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    stages: Sequence[Stage]
    exhibits: Mapping[str, Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    stores: Mapping[str, Mapping[str, Any]]
    attempts: Sequence[Attempt]
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def ended(self) -> float | None:
        """When the last thing was written, in seconds since 1970."""
        times = [event["time"] for event in self.events] + [s.began + s.seconds for s in self.stages]
        return max(times, default=None)

    def stage(self, *names: str) -> Stage | None:
        """The first of these stages that the run has."""
        return next((s for name in names for s in self.stages if s.name == name), None)

    def event(self, kind: str) -> Mapping[str, Any] | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event["kind"] == kind), None)


def read_run(directory: Path) -> Run:
    """Everything there is of a run. Raises UserError where the directory is none."""
    if not (directory / EVENTS).is_file():
        raise UserError(f"{directory}: no run (no {EVENTS}); make one with rorqual run RECIPE --out {directory}")
    stages = sorted(_stages(directory), key=lambda stage: stage.began)
    return Run(
        directory, _toml(directory / "config.toml"), _json(directory / "environment.json"), read_events(directory), stages,
        {path.stem: _json(path) for path in sorted((directory / "exhibits").glob("*.json"))},
        list(_evaluations(directory, [stage.name for stage in stages])), dict(_stores(directory)), _attempts(directory),
        _json(directory / "model" / "lineage.json"),
    )  # fmt: skip


def _stages(directory: Path) -> Iterator[Stage]:
    for path in sorted(directory.rglob(EVENTS)):
        home = path.parent
        if home == directory or "ranks" in home.relative_to(directory).parts:
            continue
        events = read_events(home)
        by_step = {event["step"]: event for event in events if event["kind"] == "metrics"}
        if not by_step:
            continue
        name = home.relative_to(directory).as_posix()
        ended = any(event["kind"] == "stage ended" for event in events)
        resumes = sum(event["kind"] == "resumed" for event in events)
        metrics = [by_step[step] for step in sorted(by_step)]
        yield Stage(name, _toml(home / "config.toml"), metrics, _seconds(events), events[0]["time"], ended, resumes)


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Over all sessions: each lasts from its first event to the last one before the next begins."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["kind"] == "begin":
            total += last - began if began is not None else 0.0
            began = event["time"]
        began = event["time"] if began is None else began
        last = event["time"]
    return total + (last - began if began is not None else 0.0)


def _evaluations(directory: Path, stages: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Each with `stage`, the one whose checkpoint was measured, `suite` and `where`; in the order of the run's stages."""
    found = []
    for path in sorted(directory.rglob("results.json")):
        results = _json(path)
        if {"benchmark", "context", "score", "policy"} <= set(results):
            where = path.parent.relative_to(directory).as_posix()
            stage = results.get("stage") or _stage_of(str(results["policy"]), directory, stages)
            order = stages.index(stage) if stage in stages else len(stages)
            told = {"stage": stage, "where": where, "suite": _suite_of(results, stage, path.parent.name)}
            found.append((order, path.stat().st_mtime, {**results, **told}))
    yield from (results for _, _, results in sorted(found, key=lambda each: each[:2]))


def _suite_of(results: Mapping[str, Any], stage: str, name: str) -> str:
    """The benchmark, and the store of tasks where the directory names one: STAGE-STORE[-CONTEXT]."""
    rest = name.removeprefix(stage.replace("/", "-")).strip("-") if name.startswith(stage.replace("/", "-")) else ""
    rest = "" if rest == results["context"] else rest.removesuffix(f"-{results['context']}")
    return f"{results['benchmark']}, {rest}" if rest else results["benchmark"]


def _stage_of(policy: str, directory: Path, stages: Sequence[str]) -> str:
    """The stage whose checkpoint a policy's path names; the run's own model is the last stage's."""
    home = policy.removesuffix("/").removesuffix("/model")
    inside = [stage for stage in stages if home.endswith(f"/{stage}")]
    if inside:
        return max(inside, key=len)
    return stages[-1] if stages and Path(home).name == directory.resolve().name else Path(home).name or policy


def _stores(directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(directory.rglob("manifest.json")):
        manifest = _json(path)
        if isinstance(manifest.get("counts"), dict):
            yield path.parent.relative_to(directory).as_posix(), manifest


def _attempts(directory: Path) -> list[Attempt]:
    """Stored attempts, at most MAX_ATTEMPTS of each evaluation or stage, the newest ones."""
    by_source: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*.npz")):
        by_source.setdefault(_source(path, directory), []).append(path)
    found = []
    for source, paths in by_source.items():
        for path in sorted(paths, key=lambda path: path.stat().st_mtime)[-MAX_ATTEMPTS:]:
            record = _record(path)
            if record:
                found.append(Attempt(source, record))
    return found


def _source(path: Path, directory: Path) -> str:
    """The evaluation or the stage whose directory holds the attempt."""
    for parent in path.parents:
        if parent == directory or (parent / "results.json").is_file() or (parent / EVENTS).is_file():
            return parent.relative_to(directory).as_posix()
    return ""


def _record(path: Path) -> dict[str, Any]:
    """The JSON part of a stored attempt; its arrays are not read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            record = json.loads(str(found["record"])) if "record" in found.files else {}
    except (OSError, ValueError, KeyError):
        return {}
    return record if {"task_id", "turns", "messages", "end"} <= set(record) else {}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none; a damaged file is an error that names it."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, and run the stage that wrote it again") from None
    return found if isinstance(found, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
