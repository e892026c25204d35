"""What `rorqual inspect` tells of a recipe, a config.json or a checkpoint: as figures, and as text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rorqual.config import load
from rorqual.errors import UserError
from rorqual.model import cost
from rorqual.model.config import ModelConfig
from rorqual.model.hf_config import model_type, read_config, rorqual_only
from rorqual.model.parameters import Count, Parameters, count_parameters

LAYOUTS: tuple[cost.CacheLayout, ...] = ("bf16", "fp8")


def figures(source: str | os.PathLike, overrides: Sequence[str] = (), positions: Sequence[int] | None = None) -> dict[str, Any]:
    """All figures of a checkpoint directory, a config.json, or a recipe with overrides of its [model].

    positions: those to cost; by default powers of two up to the last position of the model.
    """
    config, stored = _read(source, overrides)
    parameters = count_parameters(config)
    return {
        "source": str(source),
        "architecture": model_type(config),
        "rorqual_only": rorqual_only(config),
        "parameters": _parameters(parameters),
        "cache_bytes_per_token": {layout: _cache(config, layout) for layout in LAYOUTS},
        "cost": [_cost(config, parameters, position) for position in _positions(config, positions)],
        "crossover": dataclasses.asdict(cost.crossovers(config)),
        "index_topk": config.index_topk if config.has_indexer else None,
    } | stored


def _read(source: str | os.PathLike, overrides: Sequence[str]) -> tuple[ModelConfig, dict[str, Any]]:
    path = Path(source)
    if not path.is_dir() and path.suffix != ".json":
        own = [override.removeprefix("--").removeprefix("model.") for override in overrides]
        return load(ModelConfig, source, own, table="model"), {}
    if overrides:
        raise UserError(f"{source}: overrides change a recipe, not a checkpoint: {' '.join(overrides)}")
    if path.is_dir() and any(path.glob("*.safetensors*")):
        return _read_checkpoint(path)
    return read_config(path), {}


def _read_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    from rorqual.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    stored = {"tensors": len(checkpoint.reader.stored), "bytes": checkpoint.stored_bytes(), "lacks_mtp": checkpoint.lacks_mtp}
    return checkpoint.config, {"stored": stored}


def _positions(config: ModelConfig, asked: Sequence[int] | None) -> list[int]:
    last = config.max_positions - 1
    if asked is None:
        powers = [2**k - 1 for k in range(6, 40) if 2**k - 1 < last]
        return [*powers[-8:], last]
    if outside := [position for position in asked if not 0 <= position <= last]:
        raise UserError(f"--positions: expected 0 to {last} (max_positions less one), found {outside[0]}")
    return list(asked)


def _parameters(parameters: Parameters) -> dict[str, Any]:
    """Every total under a name that says what is in it."""
    return {
        "without_indexers": parameters.without_indexers,
        "indexers": parameters.indexers,
        "total": parameters.without_indexers + parameters.indexers,
        "mtp_without_indexer": parameters.mtp_without_indexer,
        "mtp_indexer": parameters.mtp_indexer,
        "mtp_copies_in_checkpoint": parameters.copies,
        "checkpoint": parameters.checkpoint,
        "activated_with_embedding_and_head": parameters.activated,
        "activated_without_embedding": parameters.activated_without_embedding,
        "activated_in_indexers": parameters.indexers,
        "components": {name: dataclasses.asdict(count) for name, count in parameters.main.items()},
        "mtp_components": {name: dataclasses.asdict(count) for name, count in parameters.mtp.items()},
    }


def _cache(config: ModelConfig, layout: cost.CacheLayout) -> dict[str, int]:
    return {
        "latent_and_rope_per_layer": cost.entry_bytes(config, layout),
        "index_key_per_layer": cost.index_key_bytes(config, layout) if config.has_indexer else 0,
        "all_layers": cost.cache_bytes(config, layout),
        "mtp_layer": cost.mtp_cache_bytes(config, layout),
    }


def _cost(config: ModelConfig, parameters: Parameters, position: int) -> dict[str, Any]:
    return {
        "position": position,
        "weight_flops": cost.weight_flops(config, parameters, sparse=False),
        "weight_flops_with_indexers": cost.weight_flops(config, parameters, sparse=True),
        "dense_flops": cost.dense_flops(config, position),
        "dense_expanded_flops": cost.dense_flops(config, position, "expanded"),
        "sparse_flops": cost.sparse_flops(config, position),
        **{f"dense_read_{layout}": cost.dense_read(config, position, layout) for layout in LAYOUTS},
        **{f"sparse_read_{layout}": cost.sparse_read(config, position, layout) for layout in LAYOUTS},
    }


def render(found: dict[str, Any]) -> str:
    """The figures as text for a terminal."""
    sections = [_title(found), _parameter_table(found["parameters"]), _cache_lines(found), _cost_table(found), _crossover(found)]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _title(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['source']}: {found['architecture']}"]
    if found["rorqual_only"]:
        lines.append(f"Opens in Rorqual only: {'; '.join(found['rorqual_only'])}.")
    if stored := found.get("stored"):
        by_dtype = ", ".join(f"{_bytes(count)} {dtype}" for dtype, count in sorted(stored["bytes"].items()))
        lines.append(f"Stored: {stored['tensors']:,} tensors, {by_dtype}; all that the config names are there.")
        if stored["lacks_mtp"]:
            lines.append("The config names an MTP layer, the weights hold none: it opens without.")
    return lines


def _parameter_table(counts: dict[str, Any]) -> list[str]:
    lines = [f"{'Parameters':<42}{'total':>20}{'activated':>18}"]
    for name, count in _merged(counts).items():
        lines.append(f"  {name:<40}{count.total:>20,}{count.activated:>18,}")
    rows = {
        "main model without indexers": ("without_indexers", "activated_with_embedding_and_head"),
        "  the same, embedding not counted": (None, "activated_without_embedding"),
        "indexers": ("indexers", "activated_in_indexers"),
        "main model": ("total", None),
        "MTP layer without its indexer": ("mtp_without_indexer", None),
        "MTP layer's indexer": ("mtp_indexer", None),
        "copies of embedding and head, in a file": ("mtp_copies_in_checkpoint", None),
        "all in a checkpoint": ("checkpoint", None),
    }
    for title, (total, activated) in rows.items():
        left = f"{counts[total]:,}" if total else ""
        right = f"{counts[activated]:,}" if activated else ""
        lines.append(f"{title:<42}{left:>20}{right:>18}".rstrip())
    return lines


def _merged(counts: dict[str, Any]) -> dict[str, Count]:
    return {name: Count(**count) for name, count in counts["components"].items()}


def _cache_lines(found: dict[str, Any]) -> list[str]:
    lines = ["Cache bytes per token"]
    for layout, held in found["cache_bytes_per_token"].items():
        each = f"{held['latent_and_rope_per_layer']} latent and rope + {held['index_key_per_layer']} index key per layer"
        mtp = f"; MTP layer {held['mtp_layer']:,}" if held["mtp_layer"] else ""
        lines.append(f"  {layout:<6}{held['all_layers']:>10,}  ({each}{mtp})")
    return lines


def _cost_table(found: dict[str, Any]) -> list[str]:
    first = found["cost"][0]
    lines = [
        f"Cost of one token; its weights take {_flops(first['weight_flops'])}"
        f", with indexers {_flops(first['weight_flops_with_indexers'])}",
        f"{'':>10}{'FLOPs of attention (sparse: and indexer)':^48}{'cache bytes read in decoding':^44}",
        f"{'position':>10}{'dense':>12}{'expanded':>12}{'sparse':>12}{'ratio':>8}"
        f"{'dense bf16':>14}{'sparse':>11}{'dense fp8':>13}{'sparse':>11}",
    ]
    for row in found["cost"]:
        ratio = row["dense_flops"] / row["sparse_flops"]
        lines.append(
            f"{row['position']:>10,}{_flops(row['dense_flops']):>12}{_flops(row['dense_expanded_flops']):>12}"
            f"{_flops(row['sparse_flops']):>12}{ratio:>7.1f}x"
            f"{_bytes(row['dense_read_bf16']):>14}{_bytes(row['sparse_read_bf16']):>11}"
            f"{_bytes(row['dense_read_fp8']):>13}{_bytes(row['sparse_read_fp8']):>11}"
        )
    return lines


def _crossover(found: dict[str, Any]) -> list[str]:
    if found["index_topk"] is None:
        return ["No indexers: attention is dense at every position."]
    names = {
        "decode_flops": "decoding, FLOPs",
        "prefill_flops": "prefill, FLOPs, against the expanded form",
        "read_bf16": "decoding, bytes of a bf16 cache",
        "read_fp8": "decoding, bytes of an FP8 cache",
    }
    lines = [f"Sparse attention (top-k {found['index_topk']}) costs less from position"]
    for key, title in names.items():
        position = found["crossover"][key]
        lines.append(f"  {'never' if position is None else f'{position:,}':>10}  {title}")
    return lines


def _flops(count: float) -> str:
    return _scaled(count, 1000, ["", "K", "M", "G", "T", "P"])


def _bytes(count: float) -> str:
    return _scaled(count, 1000, ["B", "KB", "MB", "GB", "TB"])


def _scaled(count: float, step: int, units: list[str]) -> str:
    place = 0
    while count >= step and place < len(units) - 1:
        count, place = count / step, place + 1
    return f"{count:.3g} {units[place]}".rstrip() if count < step else f"{count:.0f} {units[place]}"
