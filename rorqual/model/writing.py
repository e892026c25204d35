"""Writing checkpoints: the tensors of a config, encoded in a dtype and a layout, streamed into shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.fp8 import quantize_weight
from rorqual.model.checkpoint import Checkpoint
from rorqual.model.config import ModelConfig
from rorqual.model.hf_config import FILE, config_path, read_json, rorqual_only, to_hf
from rorqual.model.names import SCALE, Entry, entries, fused_names
from rorqual.model.shards import SHARD_BYTES, ShardWriter, require_free, whole_directory

Layout = Literal["released", "fused"]
StoredDtype = Literal["float32", "bf16", "fp8"]
Quantised = tuple[Tensor, Tensor]

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*",
)  # fmt: skip
"""Files of a checkpoint that are neither weights nor architecture, and go along."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE_NAMES: dict[Any, StoredDtype] = {
    "float32": "float32", torch.float32: "float32", "bf16": "bf16", "bfloat16": "bf16", torch.bfloat16: "bf16",
    "fp8": "fp8", torch.float8_e4m3fn: "fp8",
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What was written. rorqual_only: why no other software opens it; empty where others do."""

    path: Path
    files: list[str]
    weight_bytes: int
    tensors: int
    rorqual_only: list[str]


def convert(
    source: str | os.PathLike,
    path: str | os.PathLike,
    dtype: torch.dtype | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "released",
    overwrite: bool = False,
) -> Saved:
    """Write the checkpoint at `source` again at `path`, in another dtype or layout.

    It is streamed: memory holds one shard, never the model (in the fused layout also one layer's experts). FP8 to FP8 keeps
    the stored values and scales. Tokenizer, chat template, generation_config.json and token ids come along.
    """
    if Path(source).resolve() == Path(path).resolve():
        raise UserError(f"{path}: is the source; choose another path")
    checkpoint = Checkpoint(source)
    require_free(Path(path), overwrite)
    checkpoint.check_copies()
    keeps_fp8 = checkpoint.is_fp8 and DTYPE_NAMES.get(dtype) == "fp8"
    return write_checkpoint(
        path,
        checkpoint.config,
        checkpoint.read,
        dtype,
        shard_bytes=shard_bytes,
        companions=source,
        layout=layout,
        overwrite=overwrite,
        read_quantised=checkpoint.read_quantised,
        fields={"quantization_config": checkpoint.hf_fields["quantization_config"]} if keeps_fp8 else {},
    )


def write_checkpoint(
    path: str | os.PathLike,
    config: ModelConfig,
    read: Callable[[Entry], Tensor],
    dtype: torch.dtype | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    companions: str | os.PathLike | None = None,
    layout: Layout = "released",
    overwrite: bool = False,
    read_quantised: Callable[[Entry], Quantised | None] = lambda entry: None,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> Saved:
    """Write the tensors that `read` gives for each entry, in order, as a checkpoint directory: all of it, or nothing.

    layout: released writes one tensor per expert and the older spelling of config.json, which every engine reads, and the MTP
    layer with its copies of embedding and head; fused writes what transformers 5 does: fused experts, no copies, the current
    spelling. read_quantised: FP8 values and scales to write as they are. fields: more for config.json.
    """
    stored = DTYPE_NAMES.get(dtype)
    if stored is None or layout not in ("released", "fused"):
        name, found, accepted = (
            ("dtype", dtype, "float32, bf16 or fp8") if stored is None else ("layout", layout, "released or fused")
        )
        raise UserError(f"{name}: expected {accepted}, found {found}")
    if layout == "fused" and stored == "fp8":
        raise UserError("layout: fused experts are written in float32 or bf16; block FP8 has the released layout")
    encode = _Encoder(read, read_quantised, stored)
    tensors = _fused(config, encode) if layout == "fused" else _released(config, encode)
    with whole_directory(path, overwrite) as partial:
        writer, count = ShardWriter(partial, shard_bytes), 0
        for count, (name, tensor) in enumerate(tensors, 1):  # noqa: B007 - the last count is the number of tensors
            writer.add(name, tensor)
        files = writer.finish()
        spelling = "current" if layout == "fused" else "older"
        hf_fields = to_hf(config, stored, spelling) | _carry(companions, partial) | dict(fields)
        (partial / FILE).write_text(json.dumps(hf_fields, indent=2) + "\n", encoding="utf-8")
    return Saved(Path(path), files, writer.total_bytes, count, rorqual_only(config))


@dataclass(frozen=True)
class _Encoder:
    """An entry's tensors in the dtype of the checkpoint."""

    read: Callable[[Entry], Tensor]
    read_quantised: Callable[[Entry], Quantised | None]
    stored: StoredDtype

    def __call__(self, entry: Entry) -> Iterator[tuple[str, Tensor]]:
        if self.stored == "fp8" and entry.is_quantised:
            values, scales = self.read_quantised(entry) or quantize_weight(self.read(entry).cpu())
            yield entry.name, values
            yield entry.name + SCALE, scales
        else:
            yield entry.name, self.plain(entry)

    def plain(self, entry: Entry) -> Tensor:
        wide = entry.is_float32 or self.stored == "float32"
        return self.read(entry).to("cpu", torch.float32 if wide else torch.bfloat16)


def _released(config: ModelConfig, encode: _Encoder) -> Iterator[tuple[str, Tensor]]:
    originals = {entry.name: entry for entry in entries(config)}
    for entry in originals.values():
        if entry.copy_of is None:
            yield from encode(entry)
        else:
            yield entry.name, encode.plain(originals[entry.copy_of])


def _fused(config: ModelConfig, encode: _Encoder) -> Iterator[tuple[str, Tensor]]:
    """The experts of each layer stacked, and no copies."""
    inner = config.moe_inter_dim
    for is_expert, group in groupby(entries(config), key=lambda entry: entry.expert is not None):
        own = [entry for entry in group if entry.copy_of is None]
        if not is_expert:
            yield from ((entry.name, encode.plain(entry)) for entry in own)
            continue
        stacked: dict[str, Tensor] = {}
        for entry in own:
            place, values = fused_names(entry, inner), encode.plain(entry)
            assert place is not None and entry.expert is not None
            rows = 2 * inner if place.name.endswith("gate_up_proj") else entry.shape[0]
            if place.name not in stacked:
                stacked[place.name] = values.new_empty(config.n_routed_experts, rows, entry.shape[1])
            stacked[place.name][entry.expert, place.start : place.stop] = values
        yield from stacked.items()


def _carry(source: str | os.PathLike | None, target: Path) -> dict[str, Any]:
    """Copy the companions of a checkpoint; the token ids of its config.json."""
    if source is None:
        return {}
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such directory to take a tokenizer from")
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if not (source / FILE).is_file():
        return {}
    fields = read_json(config_path(source))
    return {name: fields[name] for name in TOKEN_IDS if name in fields}
