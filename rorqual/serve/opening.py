"""A checkpoint behind the embedded engine, for servers and for evaluations. Needs no web framework."""

from __future__ import annotations

from pathlib import Path

import torch

from rorqual.chat import Tokenizer
from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import EngineService
from rorqual.errors import UserError
from rorqual.model import load_model


def open_engine(
    checkpoint: str | Path, config: EngineConfig, dtype: str, device: str, max_waiting: int = 256
) -> tuple[EngineService, Tokenizer]:
    """The service of a checkpoint directory, whose tokenizer.json must hold the format's special tokens."""
    tokenizer = Tokenizer.open(checkpoint)
    model = load_model(checkpoint, dtype, torch.device(device))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    return EngineService(Engine(model, config), max_waiting), tokenizer
