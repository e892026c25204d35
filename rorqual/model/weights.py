"""Checkpoints of the Hugging Face layout, read into a Transformer and written from one.

There is no private format: directories of safetensors of `deepseek_v32`, `deepseek_v3` and `glm_moe_dsa`, in float32, bf16,
fp16 or block FP8, with the released per-expert names or the fused ones of transformers 5.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.model.checkpoint import Checkpoint
from rorqual.model.config import ModelConfig
from rorqual.model.names import Entry
from rorqual.model.shards import SHARD_BYTES
from rorqual.model.transformer import Transformer
from rorqual.model.writing import Layout, Saved, write_checkpoint

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(
    path: str | os.PathLike, dtype: torch.dtype | str = torch.bfloat16, device: torch.device | str = "cpu"
) -> Transformer:
    """The Transformer of a checkpoint directory, in evaluation mode.

    dtype: of the parameters (float32, bf16, float64), whatever the checkpoint stores; the router's bias stays float32.
    Weights are read one tensor at a time into their place, so that memory peaks near the model's own size.

    A checkpoint whose config promises an MTP layer of which it holds no tensor (transformers writes such) opens without it.
    Raises UserError that names the file and the tensor or field for whatever does not fit.
    """
    source = Checkpoint(path)
    source.check_copies()
    model = _empty_model(source.config, _dtype(dtype), device)
    state = model.state_dict()
    with torch.no_grad():
        for entry in source.in_file_order():
            target = state[entry.ours]
            (target if entry.expert is None else target[entry.expert]).copy_(source.read(entry))
    source.reader.close()
    return model.eval()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UserError(f"dtype: expected float32, bf16 or float64, found {dtype}")
    return found  # type: ignore[return-value]


def _empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty gives each its own memory
    return model


def save_model(
    model: Transformer,
    path: str | os.PathLike,
    dtype: torch.dtype | str = "bf16",
    *,
    shard_bytes: int = SHARD_BYTES,
    companions: str | os.PathLike | None = None,
    layout: Layout = "released",
    overwrite: bool = False,
) -> Saved:
    """Write a model as a checkpoint directory: all of it, or nothing.

    dtype: float32, bf16, or fp8 (block FP8, what the release leaves out of it in bf16). layout: see write_checkpoint.
    companions: a directory whose tokenizer, chat template, generation_config.json and token ids come along.
    overwrite: replace a checkpoint that stands at `path`.
    """
    state = model.state_dict()

    def read(entry: Entry) -> Tensor:
        return state[entry.ours] if entry.expert is None else state[entry.ours][entry.expert]

    return write_checkpoint(
        path, model.config, read, dtype, shard_bytes=shard_bytes, companions=companions, layout=layout, overwrite=overwrite
    )
