"""A recipe: one TOML file with a table for the model and for each stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.config import find_recipe, load
from rorqual.model.config import ModelConfig
from rorqual.parallel.world import ParallelConfig
from rorqual.stages.extend import Config as ExtendConfig
from rorqual.stages.post_training import Config as PostTrainingConfig
from rorqual.stages.prepare import Config as PrepareConfig
from rorqual.stages.pretrain import Config as PretrainConfig
from rorqual.stages.train_sparse import Config as TrainSparseConfig
from rorqual.stages.warm_indexer import Config as WarmIndexerConfig
from rorqual.train.exhibits import ExhibitConfig
from rorqual.train.plan import PlanConfig


@dataclass(frozen=True)
class SampleConfig:
    """What a finished run shows of itself."""

    prompts: tuple[str, ...] = ("def ", "The ")
    max_tokens: int = 48


@dataclass(frozen=True)
class Recipe:
    """A stage whose table is missing is left out of `rorqual run`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    pretrain: PretrainConfig | None = None
    extend: ExtendConfig | None = None
    warm_indexer: WarmIndexerConfig | None = None
    train_sparse: TrainSparseConfig | None = None
    control: bool = False
    """Train a model densely for the same tokens as the sparse one, to compare both on the page."""
    post_training: PostTrainingConfig | None = None
    plan: PlanConfig = field(default_factory=PlanConfig)
    """For `rorqual run RECIPE --plan`."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    exhibits: ExhibitConfig = field(default_factory=ExhibitConfig)
    """What is measured of the finished model for the page."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str | None = None
    """cpu or cuda; none takes a GPU where there is one."""


def load_recipe(source: str, overrides: Iterable[str] = ()) -> Recipe:
    return load(Recipe, source, overrides)


def run_directory(source: str, given: str | None) -> Path:
    """runs/NAME for a recipe NAME, unless another one is given."""
    return Path(given) if given else Path("runs") / find_recipe(source).stem
