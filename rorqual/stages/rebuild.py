"""Rebuild a checkpoint from its lineage record: every stage again, in order, and the hashes compared.

On one kind of machine, with the same number of ranks and threads, deterministic stages give the same hashes. What no stage
made (a file of conversations, a store of tasks, a downloaded checkpoint) must be given; it is recognised by its content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.config import build
from rorqual.data.store import TokenStore
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.parallel.world import World
from rorqual.rewards.judging import JudgeConfig
from rorqual.runlog import RunLog, write_atomically
from rorqual.stages.specialists import Specialist
from rorqual.stages.task_set import TaskSet, open_tasks
from rorqual.train.lineage import GIVEN, content, lineage_of, read_lineage
from rorqual.train.loop import Place, Site

REPORT = "rebuild.json"


@dataclass(frozen=True)
class Bench:
    """Where one record is built again: its directory, what it is built from by role, its settings."""

    directory: Path
    parents: Mapping[str, Path]
    settings: Mapping[str, Any]
    world: World

    def log(self) -> RunLog:
        return RunLog(self.directory, quiet=True)

    def site(self) -> Site:
        return Site(self.directory, self.world, self.log())

    def place(self) -> Place:
        return Place.open(self.directory, TokenStore(self.parents["data"]), self.world, quiet=True)


def main(lineage: Path, directory: Path, given: Sequence[Path], world: World) -> dict[str, Any]:
    """Rebuild what `lineage` (a checkpoint, or its lineage.json) records, below `directory`; the report, by record.

    given: files and directories among which the inputs are that no stage made. Raises UserError where one is missing, or a
    stage is not known here. A rebuild that was killed goes on where it was.
    """
    own, records = read_lineage(lineage)
    places = _given(records, given)
    found: dict[str, Any] = {}
    for number, name in enumerate(_in_order(own, records)):
        record = records[name]
        if record["stage"] == GIVEN:
            continue
        where = directory / f"{number:02d}-{record['stage']}"
        bench = Bench(where, {p["role"]: places[p["id"]] for p in record["parents"]}, record["settings"], world)
        places[name] = _builder(record["stage"])(record["config"], bench)
        made = content(places[name])
        found[name] = {"stage": record["stage"], "path": str(places[name]), "same": made == record["content"], "content": made}
    report = {"id": own, "same": all(each["same"] for each in found.values()), "records": found}
    write_atomically(directory / REPORT, json.dumps(report, indent=1))
    return report


def _in_order(own: str, records: Mapping[str, Any]) -> list[str]:
    """Parents before children, each once."""
    order: list[str] = []

    def visit(name: str) -> None:
        for parent in records[name]["parents"]:
            visit(parent["id"])
        if name not in order:
            order.append(name)

    visit(own)
    return order


def _given(records: Mapping[str, Any], given: Sequence[Path]) -> dict[str, Path]:
    """id -> path of every input that no stage made."""
    offered = {lineage_of(path)[0]: path for path in given}
    wanted = {name: record for name, record in records.items() if record["stage"] == GIVEN}
    missing = [f"{name} ({', '.join(sorted(wanted[name]['content']))})" for name in wanted if name not in offered]
    if missing:
        raise UserError(f"the rebuild needs what no stage made: {'; '.join(missing)}; name where it lies with --given PATH ...")
    return {name: offered[name] for name in wanted}


def _prepare(config: Any, bench: Bench) -> Path:
    from rorqual.stages import prepare

    store = bench.directory / "store"
    prepare.main(build(prepare.Config, config, "lineage"), store, bench.log())
    return store


def _pretrain(config: Any, bench: Bench) -> Path:
    from rorqual.stages import pretrain

    shape = build(ModelConfig, bench.settings["model"], "lineage")
    return pretrain.main(build(pretrain.Config, config, "lineage"), shape, bench.place())


def _on_text(name: str) -> Callable[[Any, Bench], Path]:
    """A stage from one checkpoint and a token store to another checkpoint."""

    def again(config: Any, bench: Bench) -> Path:
        from importlib import import_module

        stage = import_module(f"rorqual.stages.{name}")
        return stage.main(build(stage.Config, config, "lineage"), bench.parents["init"], bench.place())

    return again


def _sft(config: Any, bench: Bench) -> Path:
    from rorqual.stages import sft

    data = bench.parents["data"]
    data = data if data.is_file() else data / sft.CONVERSATIONS
    return sft.main(build(sft.Config, config, "lineage"), bench.parents["init"], data, bench.site())


def _grpo(config: Any, bench: Bench) -> Path:
    from rorqual.stages import grpo
    from rorqual.stages.proof_pool import PROOFS, judged_again

    if PROOFS in bench.settings:
        return judged_again(
            build(grpo.Config, config, "lineage"), bench.parents, _tasks(bench), bench.settings[PROOFS], bench.site()
        )
    return grpo.main(build(grpo.Config, config, "lineage"), bench.parents["init"], grpo.pool_of(_tasks(bench)), bench.site())


def _cold_start(config: Any, bench: Bench) -> Path:
    """Its data; the fine-tuning on it is a record of its own."""
    from rorqual.stages import cold_start

    return cold_start.conversations(
        build(cold_start.Config, config, "lineage"), bench.parents["init"], _tasks(bench), bench.site()
    )


def _tasks(bench: Bench) -> TaskSet:
    stores = [path for role, path in bench.parents.items() if role.partition(" ")[0] == "tasks"]
    judge = build(JudgeConfig, bench.settings["judge"], "lineage") if "judge" in bench.settings else None
    return open_tasks(stores, bench.settings["isolation"], bench.settings["split"], judge)


def _specialists(bench: Bench) -> list[Specialist]:
    """Those among the parents, by their role: `specialist DOMAIN-MODE`."""
    found = []
    for role, path in bench.parents.items():
        if role.startswith("specialist "):
            domain, _, mode = role.removeprefix("specialist ").rpartition("-")
            found.append(Specialist(domain, "thinking" if mode == "thinking" else "direct", path))
    return found


def _distill(config: Any, bench: Bench) -> Path:
    """Its data; the fine-tuning on it is a record of its own."""
    from rorqual.stages import distill

    return distill.conversations(build(distill.Config, config, "lineage"), _specialists(bench), _tasks(bench), bench.site())


def _on_policy(config: Any, bench: Bench) -> Path:
    from rorqual.stages import on_policy

    settings = build(on_policy.Config, config, "lineage")
    return on_policy.main(settings, bench.parents["init"], _specialists(bench), _tasks(bench), bench.site())


STAGES: dict[str, Callable[[Any, Bench], Path]] = {
    "prepare": _prepare,
    "pretrain": _pretrain,
    "extend": _on_text("extend"),
    "warm_indexer": _on_text("warm_indexer"),
    "train_sparse": _on_text("train_sparse"),
    "sft": _sft,
    "grpo": _grpo,
    "cold_start": _cold_start,
    "distill": _distill,
    "on_policy": _on_policy,
}


def _builder(stage: str) -> Callable[[Any, Bench], Path]:
    if stage not in STAGES:
        raise UserError(f"the stage {stage} can't be rebuilt from a record; these can: {', '.join(STAGES)}")
    return STAGES[stage]
