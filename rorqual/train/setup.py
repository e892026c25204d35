"""What every training stage needs before its first step: the data mixture, a directory of its own, the tensors to save."""

from __future__ import annotations

import itertools
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from rorqual.config import dump
from rorqual.data.loader import Loader, RecallSource, Source, TextSource
from rorqual.data.recall import RecallConfig, Vocabulary
from rorqual.data.store import TokenStore
from rorqual.errors import UserError, require
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import World
from rorqual.runlog import write_atomically
from rorqual.train.checkpoints import random_state
from rorqual.train.loop import Place, Site
from rorqual.train.objectives import Inputs
from rorqual.train.optimizer import Optimizer

FREE = ("checkpoint_every", "keep_checkpoints", "micro_rows", "workers", "quiet")
"""Settings that a resumed run may change: they leave every weight as it would have been."""


@dataclass(frozen=True)
class BatchConfig:
    """The global batch, and how it is cut. Lengths are in tokens, sizes in rows."""

    rows: int = 16
    length: int = 256
    micro_rows: int | None = None
    """Rows of one forward on one rank; None: all of the rank's."""
    weights: dict[str, float] = field(default_factory=dict)
    """Corpus -> share of the text rows; empty: by the corpora's sizes."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    seed: int = 0
    workers: int = 0
    """Processes that draw batches ahead of the step that needs them; 0: the step draws its own, which a GPU waits for."""

    def __post_init__(self) -> None:
        require(
            self,
            rows=(self.rows >= 1, "at least 1"),
            length=(self.length >= 8, "at least 8"),
            micro_rows=(self.micro_rows is None or self.micro_rows >= 1, "at least 1, or none"),
            workers=(self.workers >= 0, "at least 0"),
        )


def mixture(store: TokenStore, config: BatchConfig, split: Literal["train", "held_out"] = "train") -> Loader:
    """The loader of a store's corpora and of recall documents, in the config's shares. A corpus that fills no row is left out."""
    unknown = set(config.weights) - set(store.names)
    if unknown:
        raise UserError(f"batch.weights: no corpus {', '.join(sorted(unknown))} in {store.directory}; it holds {store.names}")
    texts = {name: store.documents(name, split) for name in store.names}
    texts = {name: documents for name, documents in texts.items() if len(documents.tokens) >= config.length}
    if not texts:
        raise UserError(f"{store.directory}: no corpus has {config.length} tokens in its {split} split: give more text")
    shares = {name: config.weights.get(name, 0.0) if config.weights else float(len(texts[name].tokens)) for name in texts}
    if not sum(shares.values()):
        raise UserError(f"batch.weights: every corpus that fills a row of {config.length} has weight 0")
    text_share = (1 - config.recall.share) / sum(shares.values())
    sources: dict[str, tuple[Source, float]] = {
        name: (TextSource(texts[name], config.length, config.seed), share * text_share) for name, share in shares.items() if share
    }
    if config.recall.share:
        vocabulary = Vocabulary.of(store.tokenizer, store.ends, config.recall.words)
        filler = texts[max(texts, key=lambda name: len(texts[name].tokens))]
        source = RecallSource(vocabulary, filler, config.length, config.seed + 1, config.recall)
        sources["recall"] = (source, config.recall.share)
    return Loader(sources, config.rows)


@dataclass(frozen=True)
class Steps:
    """A rank's micro-batches of each step, packed, on the host: what a process that draws batches ahead needs to know."""

    loader: Loader
    micro_rows: int | None
    rank: int = 0
    ranks: int = 1

    def __getitem__(self, step: int) -> list[Inputs]:
        batch = self.loader.batch(step, self.rank, self.ranks)
        return [Inputs.of(part) for part in batch.split(self.micro_rows or len(batch.tokens))]


class Feed:
    """Micro-batches step by step on the rank's device. What a step gets is a function of its number, whoever draws it."""

    def __init__(self, loader: Loader, config: BatchConfig, world: World):
        self.steps = Steps(loader, config.micro_rows, world.data_rank, world.data_size)
        self.world, self.workers = world, config.workers
        self._ahead: Iterator[list[Inputs]] | None = None
        self._next = -1

    def __call__(self, step: int) -> list[Inputs]:
        parts = self._drawn_ahead(step) if self.workers else self.steps[step]
        return [part.to(self.world.device).share(self.world) for part in parts]

    def _drawn_ahead(self, step: int) -> list[Inputs]:
        if self._ahead is None or step != self._next:
            self._ahead = iter(
                DataLoader(
                    self.steps,  # type: ignore[arg-type]
                    sampler=itertools.count(step),  # type: ignore[arg-type]
                    batch_size=None,
                    num_workers=self.workers,
                    prefetch_factor=4,
                    pin_memory=self.world.device.type == "cuda",
                )
            )
        self._next = step + 1
        return next(self._ahead)


def check_vocabulary(store: TokenStore, model: ModelConfig) -> None:
    """Raises UserError where the tokenizer has ids that the model lacks."""
    size = store.tokenizer.get_vocab_size()
    if size > model.vocab_size:
        raise UserError(
            f"{store.directory}: its tokenizer has {size} ids, the model only {model.vocab_size}; set model.vocab_size"
        )


def begin(config: Any, place: Site | Place, init: Path | None = None) -> None:
    """Start a stage's directory, or go on in it. Raises UserError where it was begun with other settings or another `init`."""
    path, origin = place.directory / "config.toml", place.directory / "init.txt"
    source = "none" if init is None else os.path.relpath(init, place.directory)
    if path.exists():
        old, new = _flat(tomllib.loads(path.read_text(encoding="utf-8"))), _flat(tomllib.loads(dump(config)))
        if origin.exists():
            old, new = old | {"init": origin.read_text(encoding="utf-8")}, new | {"init": source}
        names = [name for name in sorted(old.keys() | new.keys()) if name.split(".")[-1] not in FREE]
        differing = [f"{name} (was {old.get(name)}, is {new.get(name)})" for name in names if old.get(name) != new.get(name)]
        if differing:
            raise UserError(f"{place.directory}: belongs to another configuration: {'; '.join(differing)}; choose another one")
    place.world.barrier()
    if place.world.is_main:
        place.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(origin, source)
    place.log.begin(config)


def training_tensors(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that a resumed stage must find as it was, by name: the tensors themselves."""
    weights = {f"model.{name}": tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    weights |= {f"model.{name}": master.detach() for name, master in optimizer.masters.items()}
    return weights | {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()} | random_state()


def _flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {f"{at}{name}": value}
    return flat
