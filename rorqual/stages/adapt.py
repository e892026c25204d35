"""Dense MLA checkpoint in, DSA checkpoint out, and an honest answer to the question whether quality held.

indexers are added -> dense warm-up -> sparse training, beside a control that goes on densely for the same tokens -> report
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rorqual.data.recall import RecallConfig, Vocabulary
from rorqual.data.store import TokenStore
from rorqual.errors import require
from rorqual.model.cost import crossovers, dense_flops, sparse_flops
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import ParallelConfig, World
from rorqual.report.quality import quality_page
from rorqual.runlog import write_atomically
from rorqual.stages import prepare, train_sparse, warm_indexer
from rorqual.stages.prepare import Config as PrepareConfig
from rorqual.stages.train_sparse import Config as TrainSparseConfig
from rorqual.stages.warm_indexer import Config as WarmIndexerConfig
from rorqual.train.export import open_model
from rorqual.train.loop import Place, Site
from rorqual.train.quality import DENSE, SPARSE, NeedleConfig, Retrieval, held_out, retrieval, selection, with_random_indexers
from rorqual.train.setup import BatchConfig, mixture

REPORT, PAGE = "quality.json", "quality.html"


@dataclass(frozen=True)
class Thresholds:
    """What the verdict holds the sparse model to."""

    loss_ratio: float = 1.01
    """Held-out loss, sparse over control, at most."""
    captured_share: float = 0.95
    """Of the mass that the true top-k would capture, in each layer, at least."""
    retrieval_points: float = 0.02
    """By how much retrieval may fall below the control's."""
    control_retrieval: float = 0.80
    """Below this the control does not retrieve, and the comparison is void."""
    random_share: float = 0.5
    """Untrained indexers must retrieve at most this share of what the trained ones do, or selection does not matter here."""


@dataclass(frozen=True)
class QualityConfig:
    batches: int = 8
    """Held-out batches for losses."""
    selection_batches: int = 2
    """Of them, for what selections capture (costs a sort of each row's attention)."""
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    positions: tuple[int, ...] = (1024, 4096, 16384, 65536, 131071)
    """At which the cost of a token is stated."""
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        require(
            self,
            batches=(self.batches >= 1, "at least 1"),
            selection_batches=(1 <= self.selection_batches <= self.batches, f"in [1, batches={self.batches}]"),
        )


@dataclass(frozen=True)
class Config:
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """The text; its tokenizer is the checkpoint's own unless one is given."""
    warm_indexer: WarmIndexerConfig = field(default_factory=WarmIndexerConfig)
    train_sparse: TrainSparseConfig = field(default_factory=TrainSparseConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str | None = None


def main(config: Config, source: Path, destination: Path, work: Path, world: World, quiet: bool = False) -> dict[str, Any]:
    """Adapt `source`; the finished checkpoint with its report appears at `destination`. Stages and logs lie in `work`.

    Returns the report. A killed run goes on where it was.
    """
    log = Site.open(work, world, quiet).log
    log.begin(config)
    text = config.prepare if config.prepare.tokenizer else replace(config.prepare, tokenizer=source)
    if world.is_main:
        prepare.main(text, work / "data", log)
    world.barrier()
    store = TokenStore(work / "data")

    def place(stage: str) -> Place:
        return Place.open(work / stage, store, world, quiet)

    warm = warm_indexer.main(config.warm_indexer, source, place("warm-indexer"))
    sparse = train_sparse.main(config.train_sparse, warm, place("train-sparse"))
    control = train_sparse.main(replace(config.train_sparse, dense=True), warm, place("control"))
    report: dict[str, Any] = {}
    if world.is_main:
        ours, theirs = (open_model(path).to(world.device) for path in (sparse, control))
        report = judge(config.quality, config.train_sparse.batch, ours, theirs, store)
        write_atomically(work / REPORT, json.dumps(report, indent=1))
        write_atomically(work / PAGE, quality_page(report))
        _publish(sparse, work, destination)
        log.event("adapted", **report["verdict"])
    world.barrier()
    return report


def judge(
    config: QualityConfig, batch: BatchConfig, sparse: Transformer, control: Transformer, store: TokenStore
) -> dict[str, Any]:
    """Compare the sparse model with the dense control on held-out text and needles: the report, ready for JSON."""
    sparse, control = sparse.eval(), control.eval()
    loader = mixture(store, replace(batch, recall=RecallConfig(share=0.0)), "held_out")
    batches = [loader.batch(i) for i in range(config.batches)]
    losses = {"control": held_out(control, batches, DENSE), "sparse": held_out(sparse, batches, SPARSE)}
    captured = selection(sparse, batches[: config.selection_batches])
    needles = _needles(config.needles, sparse, control, store, batch.recall.words)
    report = {
        "top_k": sparse.config.index_topk,
        "loss": {name: asdict(found) for name, found in losses.items()},
        "selection": {str(layer): found for layer, found in captured.items()},
        "retrieval": {name: _listed(found) for name, found in needles.items()},
        "cost": _cost(config, sparse),
        "thresholds": asdict(config.thresholds),
    }
    report["verdict"] = verdict(config.thresholds, report)
    return report


def verdict(limits: Thresholds, report: dict[str, Any]) -> dict[str, Any]:
    """Each claim with the figure that decides it; retrieval is "void" where the control itself does not retrieve."""
    ratio = report["loss"]["sparse"]["loss"] / report["loss"]["control"]["loss"]
    shares = {layer: found["captured"] / found["oracle"] for layer, found in report["selection"].items()}
    scores = {name: found["accuracy"] for name, found in report["retrieval"].items()}
    void = scores["control"] < limits.control_retrieval
    held = scores["sparse"] >= scores["control"] - limits.retrieval_points
    claims: dict[str, Any] = {
        "loss": {"holds": ratio <= limits.loss_ratio, "ratio": ratio},
        "captured": {"holds": min(shares.values()) >= limits.captured_share, "by_layer": shares},
        "retrieval": {"holds": "void" if void else held, **scores},
        "selection matters": {
            "holds": "void" if void else scores["random indexer"] <= limits.random_share * scores["sparse"],
        },
    }
    return {"quality_held": all(claim["holds"] is True for claim in claims.values()), "claims": claims}


def _needles(
    config: NeedleConfig, sparse: Transformer, control: Transformer, store: TokenStore, words: int | None
) -> dict[str, Retrieval]:
    vocabulary = Vocabulary.of(store.tokenizer, store.ends, words)
    largest = max(store.names, key=lambda name: len(store.documents(name, "held_out").tokens))
    filler = store.documents(largest, "held_out")
    return {
        "control": retrieval(control, vocabulary, filler, config, DENSE),
        "sparse": retrieval(sparse, vocabulary, filler, config, SPARSE),
        "random indexer": retrieval(with_random_indexers(sparse, seed=1), vocabulary, filler, config, SPARSE),
    }


def _listed(found: Retrieval) -> dict[str, Any]:
    cells = [{"length": length, "depth": depth, "accuracy": score} for (length, depth), score in found.cells.items()]
    return {"accuracy": found.accuracy, "cells": cells}


def _cost(config: QualityConfig, model: Transformer) -> list[dict[str, float]]:
    """FLOPs of attention for one token at each position, dense and sparse, decoding; formulas in rorqual/model/cost.py."""
    shape = model.config
    rows = [{"position": p, "dense": dense_flops(shape, p), "sparse": sparse_flops(shape, p)} for p in config.positions]
    return [*rows, {"crossovers": asdict(crossovers(shape))}]  # type: ignore[list-item]


def _publish(model: Path, work: Path, destination: Path) -> None:
    part = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part)
    for name in (REPORT, PAGE):
        shutil.copyfile(work / name, part / name)
    shutil.rmtree(destination, ignore_errors=True)
    part.rename(destination)
