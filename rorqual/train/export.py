"""Checkpoints as other programs read them: open one to train it, write one when a stage ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rorqual.errors import FieldErrors, UserError
from rorqual.model.config import ModelConfig
from rorqual.model.init import init_weights
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.parallel.apply import whole_state
from rorqual.parallel.world import World
from rorqual.train.lineage import Making, publish
from rorqual.train.loop import Place

MODEL = "model"


def finished(place: Place) -> Path | None:
    """The checkpoint that this stage wrote when it ended, if it did."""
    path = place.directory / MODEL
    return path if path.is_dir() else None


def open_model(path: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Transformer:
    """The checkpoint as a module on the CPU, ready to train."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; run the stage that makes it first, or give --init")
    return load_model(path, dtype).train()


def with_shape(model: Transformer, shape: ModelConfig, seed: int = 0) -> Transformer:
    """The model's own tensors in a module of another shape (a stretched context, added indexers, another top-k).

    Indexers that the old model lacks are drawn from the seed. Raises UserError where a weight of either finds no counterpart.
    """
    with torch.device("meta"):
        reshaped = Transformer(shape)
    try:
        missing, unexpected = reshaped.load_state_dict(model.state_dict(), strict=False, assign=True)
    except RuntimeError as error:  # torch's word for other sizes
        raise UserError(f"the new shape does not hold the old model's weights: {str(error).splitlines()[-1].strip()}") from None
    strange = [*unexpected, *(name for name in missing if ".indexer." not in name)]
    if strange:
        raise UserError(f"the new shape does not hold the old model's weights: {', '.join(strange[:5])}")
    if shape.tie_embeddings:
        reshaped.head.weight = reshaped.embed.weight
    drawn = (module for name, module in reshaped.named_modules() if name.endswith(".indexer"))
    for layer, indexer in enumerate(drawn):
        if next(indexer.parameters()).is_meta:
            indexer.to_empty(device="cpu").to(model.embed.weight.dtype)
            init_weights(indexer, shape.init_std, seed + layer)
    return reshaped.train()


def with_indexers(model: Transformer, sizes: Mapping[str, int], seed: int = 0) -> Transformer:
    """The model with an indexer in every layer: its own, or new ones drawn from the seed. sizes: ModelConfig fields to set."""
    shape = model.config if model.config.has_indexer else replace(model.config, indexers="full")
    try:
        shape = replace(shape, **sizes)  # type: ignore[arg-type]
    except FieldErrors as error:
        raise UserError(f"the indexers asked for do not fit this model: {error}") from None
    return model if shape == model.config else with_shape(model, shape, seed)


def export(model: Transformer, place: Place, dtype: Literal["float32", "bf16"], making: Making) -> Path:
    """Write the model and its tokenizer beside the stage's log, all or nothing; its directory. All ranks must call it."""
    making = replace(making, parents={**making.parents, "data": place.store.directory})
    return publish_model(model, place.directory / MODEL, dtype, place.store.directory, making, place.world)


def publish_model(
    model: Transformer, path: Path, dtype: Literal["float32", "bf16"], companions: Path, making: Making, world: World
) -> Path:
    """Write a stage's model with its record (rorqual/train/lineage.py) and the companions' tokenizer. All ranks must call it."""
    part = path.with_name(f".{path.name}.made")
    save_whole(model, part, dtype, companions, world)
    if world.is_main:
        publish(part, path, replace(making, ranks=world.size))
    world.barrier()
    return path


def save_whole(model: Transformer, path: Path, dtype: Literal["float32", "bf16"], companions: Path, world: World) -> None:
    """The model gathered from all ranks, as a checkpoint directory. All ranks must call it."""
    state = whole_state(model)
    if world.is_main:
        whole = Transformer(model.config)
        whole.load_state_dict(state)
        try:
            save_model(whole, path, dtype, companions=companions, overwrite=True)
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error}); mend it and start again: no step is lost") from None
    world.barrier()
