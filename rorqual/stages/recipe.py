"""A recipe: one TOML file with a table for the model and for each stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.config import find_recipe, load
from rorqual.model.config import ModelConfig
from rorqual.parallel.world import ParallelConfig
from rorqual.stages import extend, prepare, pretrain, train_sparse, warm_indexer


@dataclass(frozen=True)
class SampleConfig:
    """What a finished run shows of itself."""

    prompts: tuple[str, ...] = ("def ", "The ")
    max_tokens: int = 48


@dataclass(frozen=True)
class Recipe:
    """A stage whose table is missing is left out of `rorqual run`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prepare: prepare.Config = field(default_factory=prepare.Config)
    pretrain: pretrain.Config | None = None
    extend: extend.Config | None = None
    warm_indexer: warm_indexer.Config | None = None
    train_sparse: train_sparse.Config | None = None
    sample: SampleConfig = field(default_factory=SampleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str | None = None
    """cpu or cuda; none takes a GPU where there is one."""


def load_recipe(source: str, overrides: Iterable[str] = ()) -> Recipe:
    return load(Recipe, source, overrides)


def run_directory(source: str, given: str | None) -> Path:
    """runs/NAME for a recipe NAME, unless another one is given."""
    return Path(given) if given else Path("runs") / find_recipe(source).stem
