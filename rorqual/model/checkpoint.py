"""A checkpoint directory as the tensors its config promises: checked before any weight is read, then read one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.fp8 import BLOCK, FP8, dequantize_weight
from rorqual.model.hf_config import BLOCK_FP8, FILE, config_path, from_hf, read_json
from rorqual.model.names import EMBED, HEAD, SCALE, Entry, FusedExperts, entries, fused_names, mtp_prefix
from rorqual.model.shards import ShardReader, torch_dtype


@dataclass(frozen=True)
class _Place:
    """Where an entry is stored: a tensor, or an expert's rows of a fused one."""

    name: str
    part: int | None = None
    rows: slice | None = None


class Checkpoint:
    """A checkpoint directory, checked against its config before any weight is read.

    config: what the directory holds: without an MTP layer where the weights lack it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such directory; expected a checkpoint with {FILE} and safetensors")
        self.hf_fields = read_json(config_path(self.path))
        config = from_hf(self.hf_fields, str(config_path(self.path)))
        self.is_fp8 = _is_block_fp8(self.hf_fields, str(config_path(self.path)))
        self.reader = ShardReader(self.path)
        self.lacks_mtp = bool(config.n_mtp_layers) and not any(name.startswith(mtp_prefix(config)) for name in self.reader.stored)
        self.config = replace(config, n_mtp_layers=0) if self.lacks_mtp else config
        self.entries, self._places = [], {}
        self._check(entries(self.config))

    def read(self, entry: Entry) -> Tensor:
        """The entry's tensor on the CPU: dequantised to float32 where it is FP8, else in its stored dtype."""
        place = self._places[entry.name]
        values = self.reader.read(place.name, place.part)
        if values.dtype == FP8:
            values = dequantize_weight(values, self.reader.read(place.name + SCALE, place.part))
        return values if place.rows is None else values[place.rows]

    def read_quantised(self, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """The entry's e4m3 values and scales as they are stored; None where it is not stored so."""
        place = self._places[entry.name]
        if self.reader.stored[place.name].dtype != "F8_E4M3" or place.part is not None:
            return None
        return self.reader.read(place.name), self.reader.read(place.name + SCALE)

    def in_file_order(self) -> list[Entry]:
        """The entries without copies, shard by shard."""
        own = [entry for entry in self.entries if entry.copy_of is None]
        return sorted(own, key=lambda entry: self.reader.stored[self._places[entry.name].name].file)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the weights by safetensors dtype."""
        total: dict[str, int] = {}
        for stored in self.reader.stored.values():
            dtype = torch_dtype(stored.dtype)
            total[stored.dtype] = total.get(stored.dtype, 0) + math.prod(stored.shape) * (dtype.itemsize if dtype else 0)
        return total

    def _check(self, expected: Iterable[Entry]) -> None:
        used: set[str] = set()
        for entry in expected:
            place = self._find(entry)
            if place is None:
                if entry.copy_of is None:
                    raise UserError(f"{self.path}: {entry.name}: missing; expected shape {list(entry.shape)}")
                continue
            used |= {place.name, place.name + SCALE} & self.reader.stored.keys()
            self.entries.append(entry)
            self._places[entry.name] = place
        if extra := sorted(self.reader.stored.keys() - used - self._tied_head()):
            file = self.reader.stored[extra[0]].file
            more = f", and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(f"{file}: {extra[0]}{more}: the config has no such tensor")

    def _find(self, entry: Entry) -> _Place | None:
        """Where the entry is, its shape and dtype checked; None where it is not."""
        if entry.name in self.reader:
            self._check_stored(entry.name, entry.shape)
            return _Place(entry.name)
        fused = fused_names(entry, self.config.moe_inter_dim)
        if fused is None or fused.name not in self.reader:
            return None
        self._check_stored(fused.name, self._fused_shape(entry, fused))
        return _Place(fused.name, entry.expert, slice(fused.start, fused.stop))

    def _fused_shape(self, entry: Entry, fused: FusedExperts) -> tuple[int, ...]:
        rows = entry.shape[0] if fused.name.endswith("down_proj") else 2 * entry.shape[0]
        return (self.config.n_routed_experts, rows, entry.shape[1])

    def _check_stored(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.reader.stored[name]
        if stored.shape != shape:
            raise UserError(f"{stored.file}: {name}: expected shape {list(shape)}, found {list(stored.shape)}")
        if torch_dtype(stored.dtype) is None:
            raise UserError(f"{stored.file}: {name}: expected F32, BF16, F16, F64 or F8_E4M3, found {stored.dtype}")
        scale = self.reader.stored.get(name + SCALE)
        if stored.dtype != "F8_E4M3":
            if scale is not None:
                raise UserError(f"{stored.file}: {name}: expected F8_E4M3 beside {name + SCALE}, found {stored.dtype}")
            return
        if scale is None:
            raise UserError(f"{stored.file}: {name}: is F8_E4M3, and its scales {name + SCALE} are missing")
        if scale.shape != _scale_shape(shape) or scale.dtype not in ("F32", "BF16", "F16"):
            wanted = f"F32 {list(_scale_shape(shape))}"
            raise UserError(f"{scale.file}: {name + SCALE}: expected {wanted}, found {scale.dtype} {list(scale.shape)}")

    def _tied_head(self) -> set[str]:
        """With tied embeddings some writers store the head all the same."""
        return {HEAD} if self.config.tie_embeddings else set()

    def check_copies(self) -> None:
        """The MTP layer shares the embedding and the head: raises UserError for a copy that differs, which would be lost."""
        pairs = [(entry.name, entry.copy_of) for entry in self.entries if entry.copy_of]
        pairs += [(name, EMBED) for name in self._tied_head() & self.reader.stored.keys()]
        for name, original in pairs:
            if not torch.equal(self.reader.read(name), self.reader.read(str(original))):
                raise UserError(f"{self.reader.stored[name].file}: {name}: expected a copy of {original}, found other values")


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `weight_scale_inv` beside a weight [..., out, in]: edge blocks count whole."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def _is_block_fp8(fields: dict, where: str) -> bool:
    quantised = fields.get("quantization_config")
    if quantised is None:
        return False
    for name in ("quant_method", "weight_block_size", "fmt"):
        found = quantised.get(name, BLOCK_FP8[name])
        if found != BLOCK_FP8[name]:
            raise UserError(f"{where}: quantization_config.{name}: expected {BLOCK_FP8[name]}, found {found}")
    return True
