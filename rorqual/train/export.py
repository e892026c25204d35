"""Checkpoints as other programs read them: open one to train it, write one when a stage ends."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from rorqual.data.bpe import TOKENIZER_FILE
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.train.loop import Place

MODEL = "model"


def finished(place: Place) -> Path | None:
    """The checkpoint that this stage wrote when it ended, if it did."""
    path = place.directory / MODEL
    return path if path.is_dir() else None


def open_model(path: Path, shape: ModelConfig | None = None, index_topk: int | None = None, seed: int = 0) -> Transformer:
    """The checkpoint as a float32 module on the CPU, ready to train."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; run the stage that makes it first")
    held = torch.load(path / "weights.pt", weights_only=False)
    config = shape or held["config"]
    if index_topk:
        config = replace(config, index_topk=index_topk)
    model = Transformer(config, seed)
    model.load_state_dict(held["state"])
    return model


def export(model: Transformer, place: Place) -> Path:
    """Write the model beside the stage's log; its directory."""
    path = place.directory / MODEL
    path.mkdir(exist_ok=True, parents=True)
    torch.save({"config": model.config, "state": model.state_dict()}, path / "weights.pt")
    return path
