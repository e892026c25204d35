"""Golden vectors for whoever ports the architecture to another engine, and the comparison of their tensors with them.

DIR/README.md              each tensor: shape, dtype, meaning, formula
DIR/model/                 the small model, a checkpoint of the Hugging Face layout in float32
DIR/inputs.safetensors     tokens, positions; the index queries, keys and weights of the case with ties
DIR/float64.safetensors    every intermediate, computed in float64 (rorqual/model/golden.py)
DIR/float32.safetensors    the same formulas in float32
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from rorqual.errors import UserError
from rorqual.model import golden
from rorqual.model.config import ModelConfig, YarnConfig
from rorqual.model.conformance_readme import readme
from rorqual.model.names import entries
from rorqual.model.shards import save_tensors, whole_directory
from rorqual.model.writing import write_checkpoint

Arrays = dict[str, NDArray]
Status = Literal["equal", "close", "DIFFERS", "MISSING", "WRONG SHAPE", "extra"]
FAILURES = ("DIFFERS", "MISSING", "WRONG SHAPE")

CONFIG = ModelConfig(
    vocab_size=64, dim=96, n_layers=2, n_dense_layers=1, inter_dim=112, max_positions=256, n_heads=4, q_lora_rank=48,
    kv_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, rope_theta=100.0, yarn=YarnConfig(4.0, 32),
    index_n_heads=16, index_head_dim=32, index_topk=8, n_routed_experts=16, n_activated_experts=3, moe_inter_dim=40,
    n_expert_groups=4, n_limited_groups=2, n_mtp_layers=1,
)  # fmt: skip
"""Small, and with everything in it: YaRN, groups, a dense and an MoE layer, MTP, dims that are no powers of two."""
SEED = 20251201
TOKENS = 40
COVERING_TOPK = 64
"""Above the number of tokens: every row selects all it sees, and sparse attention is dense."""
TIES = {"T": 12, "S": 50, "I": 2, "C": 6, "topk": 7}

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest error over the largest magnitude of a tensor, by the dtype it is given in."""


def write(path: str | os.PathLike) -> dict[str, Arrays]:
    """Write the golden vectors to a directory that does not exist yet: all of it, or nothing. Returns the tensors by file."""
    tensors = golden_tensors()
    weights = _weights()
    with whole_directory(path) as partial:
        for name, arrays in tensors.items():
            save_tensors(_as_tensors(arrays), partial / f"{name}.safetensors")
        write_checkpoint(partial / "model", CONFIG, lambda entry: _released(weights, entry.ours, entry.expert), "float32")
        (partial / "README.md").write_text(readme(tensors, smallest_margin()), encoding="utf-8")
    return tensors


def _as_tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


@cache
def golden_tensors() -> dict[str, Arrays]:
    """inputs, float64 and float32: the same on every machine up to the last bits of numpy's matrix products."""
    rng = np.random.default_rng(SEED + 1)
    tokens = rng.integers(0, CONFIG.vocab_size, TOKENS)
    ties = _tied_inputs(rng)
    inputs = {"tokens": tokens, "positions": np.arange(TOKENS)} | {name: a.astype(np.float32) for name, a in ties.items()}
    return {"inputs": inputs} | {
        name: _run(tokens, ties, dtype) for name, dtype in (("float64", np.float64), ("float32", np.float32))
    }


def _run(tokens: NDArray, ties: Arrays, dtype: type) -> Arrays:
    weights = {name: weight.astype(dtype) for name, weight in _weights().items()}
    out = golden.run(weights, CONFIG, tokens)
    covering = golden.run(weights, dataclasses.replace(CONFIG, index_topk=COVERING_TOPK, n_mtp_layers=0), tokens)
    for name in ("selected", "lse", "absorbed_head_output", "expanded_head_output", "attention_output"):
        out[f"covering.layers.0.{name}"] = covering[f"layers.0.{name}"]
    out["covering.logits"] = covering["logits"]
    scores = golden.index_scores(*(ties[f"ties.index_{part}"].astype(dtype) for part in ("query", "key", "weight")))
    out |= {"ties.index_score": scores, "ties.selected": golden.select(scores, TIES["topk"])[0]}
    return out


def _weights() -> Arrays:
    """float32 weights by the names of the Transformer's state dict, wide enough that every part of the model matters."""
    rng = np.random.default_rng(SEED)
    found: Arrays = {}
    for entry in entries(CONFIG):
        if entry.copy_of is not None:
            continue
        if len(entry.shape) == 2:
            weight = rng.standard_normal(entry.shape) * 1.5 * entry.shape[1] ** -0.5
        else:
            weight = rng.uniform(-0.2, 0.2, entry.shape) + (0 if entry.name.endswith("bias") else 1)
        weight = weight.astype(np.float32)
        if entry.expert is None:
            found[entry.ours] = weight
        else:
            stacked = found.setdefault(entry.ours, np.empty((CONFIG.n_routed_experts, *entry.shape), np.float32))
            stacked[entry.expert] = weight
    return found


def _released(weights: Arrays, name: str, expert: int | None) -> torch.Tensor:
    return torch.from_numpy(weights[name] if expert is None else weights[name][expert])


def _tied_inputs(rng: np.random.Generator) -> Arrays:
    """Small whole numbers, so that scores are exact in every dtype, and many are equal."""
    T, S, I, C = TIES["T"], TIES["S"], TIES["I"], TIES["C"]
    return {
        "ties.index_query": rng.integers(-1, 2, (T, I, C)).astype(np.float64),
        "ties.index_key": rng.integers(-1, 2, (S, C)).astype(np.float64),
        "ties.index_weight": rng.choice([-1.0, -0.5, 0.5, 1.0], (T, I)),
    }


def smallest_margin() -> float:
    """The least gap between the last selected score and the first one left out, over the largest score, of all rows."""
    out, margins = golden_tensors()["float64"], []
    for name in out:
        if name.endswith("index_score") and not name.startswith("ties"):
            for t, row in enumerate(out[name]):
                ordered = np.sort(row[: t + 1])[::-1]
                if len(ordered) > CONFIG.index_topk:
                    margins.append((ordered[CONFIG.index_topk - 1] - ordered[CONFIG.index_topk]) / np.abs(ordered).max())
    return float(min(margins))


@dataclass(frozen=True)
class Comparison:
    """One tensor against the golden one. error: largest difference over the golden tensor's largest magnitude; of selections
    and experts the share of rows that are not equal."""

    name: str
    status: Status
    error: float | None
    tolerance: float | None
    note: str = ""


def check(path: str | os.PathLike, against: str | os.PathLike | None = None) -> list[Comparison]:
    """Compare the tensors of a directory, or of one safetensors file, with the golden ones, or with those at `against`.

    A directory is compared file by file (inputs, float64, float32); any other safetensors file in it, and a single file, with
    the float64 vectors. Tolerances follow the dtype in which a tensor is given.
    """
    found = _read(path)
    made = {name: _as_tensors(arrays) for name, arrays in golden_tensors().items()}
    reference = made if against is None else _read(against)
    results = []
    for name, tensors in found.items():
        truth = reference.get(name) or _widest(reference)
        results += [_compare(f"{name}: {key}", tensors.get(key), truth.get(key)) for key in sorted({*truth, *tensors})]
    return results


def _widest(reference: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return reference.get("float64") or next(iter(reference.values()))


def _read(path: str | os.PathLike) -> dict[str, dict[str, torch.Tensor]]:
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{path}: no tensors: expected a directory of safetensors (rorqual conformance DIR writes one) or a file")
    try:
        return {file.stem: load_file(file) for file in files}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}") from None


def _compare(name: str, found: torch.Tensor | None, truth: torch.Tensor | None) -> Comparison:
    if truth is None:
        return Comparison(name, "extra", None, None, "not among the golden tensors")
    if found is None:
        return Comparison(name, "MISSING", None, None, f"expected {_described(truth)}")
    if found.shape != truth.shape or found.is_floating_point() != truth.is_floating_point():
        return Comparison(name, "WRONG SHAPE", None, None, f"expected {_described(truth)}, found {_described(found)}")
    return _compare_floats(name, found, truth) if truth.is_floating_point() else _compare_choices(name, found, truth)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _compare_choices(name: str, found: torch.Tensor, truth: torch.Tensor) -> Comparison:
    """Selections and experts, whatever their order within a row."""
    rows = (found.long().sort(-1).values != truth.long().sort(-1).values).reshape(len(truth), -1).any(1)
    share = rows.double().mean().item()
    note = f"{int(rows.sum())} of {len(rows)} rows differ, the first is row {int(rows.nonzero()[0])}" if rows.any() else ""
    return Comparison(name, "DIFFERS" if rows.any() else "equal", share, 0.0, note)


def _compare_floats(name: str, found: torch.Tensor, truth: torch.Tensor) -> Comparison:
    wide, expected = found.double(), truth.double()
    tolerance = max(TOLERANCES.get(found.dtype, 0.0), TOLERANCES[truth.dtype])
    finite = expected.isfinite()
    if not torch.equal(wide.isneginf(), expected.isneginf()) or not wide[finite].isfinite().all():
        where = (wide.isneginf() != expected.isneginf()) | (finite & ~wide.isfinite())
        return Comparison(
            name, "DIFFERS", None, tolerance, f"{int(where.sum())} values are not finite where they should be, or are"
        )
    if torch.equal(wide, expected):
        return Comparison(name, "equal", 0.0, tolerance)
    difference = torch.where(finite, wide - expected, 0.0).abs()
    error = (difference.max() / expected[finite].abs().max().clamp(min=1e-30)).item()
    place = list(np.unravel_index(int(difference.argmax()), difference.shape))
    note = "" if error <= tolerance else f"largest at {[int(i) for i in place]}"
    return Comparison(name, "close" if error <= tolerance else "DIFFERS", error, tolerance, note)
