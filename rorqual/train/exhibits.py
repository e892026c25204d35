"""What the page of a run shows of its finished model, computed when the run ends: the page itself is made of files alone.

    RUN/exhibits/model.json        parameters, cache bytes, the shape
    RUN/exhibits/cost.json         the cost of a token by position, of this model and of the released 671B one
    RUN/exhibits/quality.json      held-out loss by position dense and sparse, what selections capture, needles
    RUN/exhibits/selection.json    which tokens the indexers of each layer selected, on short texts

Each file is written whole or not at all, and is not made again where it stands for the same weights.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.config import load
from rorqual.data.loader import generator
from rorqual.data.recall import RecallConfig, Vocabulary, needle
from rorqual.data.store import TokenStore
from rorqual.errors import UserError, require
from rorqual.model.cache import Cache
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.cost import cache_bytes, crossovers, dense_flops, dense_read, sparse_flops, sparse_read
from rorqual.model.parameters import count_parameters
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.runlog import RunLog, write_atomically
from rorqual.train.export import open_model
from rorqual.train.plan import ClusterConfig, PlanConfig, plan
from rorqual.train.quality import DENSE, SPARSE, NeedleConfig, held_out, retrieval, selection, with_random_indexers
from rorqual.train.setup import BatchConfig, mixture

DIRECTORY = "exhibits"
SPARSE_STAGE, DENSE_STAGE, CONTROL_STAGE = "train-sparse", "warm-indexer", "control"
MAX_LAYERS = 8
"""Of a deep model only so many layers, evenly spread, are kept for the selection view."""


@dataclass(frozen=True)
class ExhibitConfig:
    """How much is measured for the page."""

    rows: int = 4
    batches: int = 4
    """Held-out batches of `rows` for the losses by position."""
    quality_batches: int = 1
    """Of them, for what selections capture."""
    needles: int = 8
    """Documents at each of four depths; 0 leaves retrieval out."""
    lengths: tuple[int, ...] = ()
    """Of needle documents; empty: the length of the sparse stage's rows."""
    timed_chunk: int = 0
    """Time a prefill over the whole context in chunks of so many tokens, dense and sparse; 0 leaves it out."""
    tokens: int | None = None
    """Length of the texts of the selection view; None: four times top-k, at least 256, within the context."""
    shown: int = 384
    """The last so many tokens of a text can be chosen on the page; earlier ones are counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            rows=(self.rows >= 1, "at least 1"),
            batches=(self.batches >= 1, "at least 1"),
            quality_batches=(1 <= self.quality_batches <= self.batches, f"in [1, batches={self.batches}]"),
            needles=(self.needles >= 0, "at least 0"),
            timed_chunk=(self.timed_chunk >= 0, "at least 0"),
            shown=(self.shown >= 16, "at least 16"),
        )


@dataclass(frozen=True)
class Text:
    """A text to look at. chosen: the token that the page opens with."""

    title: str
    about: str
    tokens: np.ndarray = field(repr=False)
    chosen: int


def record_exhibits(
    directory: Path, model: Path, log: RunLog, config: ExhibitConfig | None = None, device: torch.device | str = "cpu"
) -> None:
    """Write what is missing of a run's exhibits. model: the finished checkpoint. One that can't be had is logged, with why.

    On a GPU models are measured in bfloat16, on a CPU in float32.
    """
    config, device = config or ExhibitConfig(), torch.device(device)
    store = TokenStore(directory / "data")
    opened = open_on(model, device)
    exhibits: dict[str, Callable[[], dict[str, Any]]] = {
        "model": lambda: model_facts(opened.config),
        "quality": lambda: quality(directory, store, config, device),
        "selection": lambda: selected_tokens(opened, texts(directory, store, opened.config, config), store, config),
        "cost": lambda: {
            "this": cost(opened.config),
            "paper": paper_cost(),
            "prefill": prefill_times(opened, store, config) if config.timed_chunk else None,
        },
    }
    for name, make in exhibits.items():
        path = directory / DIRECTORY / f"{name}.json"
        of = {"weights": _digest(model), "config": json.loads(json.dumps(asdict(config)))}
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("of") == of:
            continue
        try:
            found = make()
        except UserError as error:
            log.event("exhibit left out", exhibit=name, reason=str(error))
            continue
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps({"of": of, **found}))


def _digest(model: Path) -> str:
    """Of the checkpoint's files, so that an exhibit made of other weights is made again."""
    total = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# --- what it is and costs


def model_facts(config: ModelConfig) -> dict[str, Any]:
    counted = count_parameters(config)
    return {
        "parameters": counted.checkpoint - counted.copies,
        "activated": counted.activated,
        "indexers": counted.indexers + counted.mtp_indexer,
        "cache_bytes": cache_bytes(config, "bf16"),
        "shape": asdict(config),
    }


def cost(config: ModelConfig) -> dict[str, Any]:
    """Of one token at each position, all layers: operations of attention, and cache bytes read, dense and sparse."""
    positions = _positions(config.max_positions)
    return {
        "top_k": config.index_topk,
        "positions": positions,
        "dense_flops": [dense_flops(config, p) for p in positions],
        "expanded_flops": [dense_flops(config, p, "expanded") for p in positions],
        "sparse_flops": [sparse_flops(config, p) for p in positions],
        "dense_read": [dense_read(config, p, "bf16") for p in positions],
        "sparse_read": [sparse_read(config, p, "bf16") for p in positions],
        "crossovers": asdict(crossovers(config)),
    }


def paper_cost() -> dict[str, Any]:
    """The same of the released configuration, and dollars of a million prefilled tokens by the plan's formulas."""
    config = load(ModelConfig, "paper", table="model")
    positions = (0, 1024, 2048, 4096, 6656, 16384, 32768, 65536, 98304, 131071)
    planned = plan(config, PlanConfig(positions=positions))
    return {**cost(config), "prefill_dollars": planned["cost_by_position"], "cluster": asdict(ClusterConfig())}


@torch.no_grad()
def prefill_times(model: Transformer, store: TokenStore, config: ExhibitConfig) -> dict[str, Any]:
    """Seconds of each chunk of a prefill of held-out text over the whole context: medians of three, after one more."""
    device, end, chunk = model.embed.weight.device, model.config.max_positions, config.timed_chunk
    held_out = np.resize(store.documents(_largest(store), "held_out").tokens, end)
    tokens = torch.from_numpy(held_out.astype(np.int64))[None].to(device)

    def prefill(mode: AttentionMode) -> list[float]:
        cache, seconds = Cache(model.config, capacity=end), []
        for low in range(0, end, chunk):
            _wait_for(device)
            began = time.perf_counter()
            model.states(tokens[:, low : low + chunk], cache=cache, mode=mode)
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
        return seconds

    found: dict[str, list[float]] = {}
    for name, mode in (("dense", DENSE), ("sparse", SPARSE)):
        runs = [prefill(mode) for _ in range(4)][1:]
        found[name] = [statistics.median(run[i] for run in runs) for i in range(len(runs[0]))]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"chunk": chunk, "positions": list(range(0, end, chunk)), "seconds": found, "device": on}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _positions(end: int) -> list[int]:
    """About forty positions up to the last, evenly spread, with the first one."""
    return sorted({0, *(round(end * i / 40) - 1 for i in range(1, 41))} - {-1})


# --- did quality hold


def open_on(model: Path, device: torch.device) -> Transformer:
    return open_model(model, "float32" if device.type == "cpu" else "bfloat16").to(device).eval()


def quality(directory: Path, store: TokenStore, config: ExhibitConfig, device: torch.device) -> dict[str, Any]:
    """The sparse stage's model against dense attention on held-out text; raises UserError where the run had no such stage."""
    sparse = open_on(directory / SPARSE_STAGE / "model", device)
    length, words = _trained_on(directory / SPARSE_STAGE)
    batch = BatchConfig(rows=config.rows, length=length, recall=RecallConfig(share=0.0), seed=config.seed)
    loader = mixture(store, batch, "held_out")
    batches = [loader.batch(i) for i in range(config.batches)]
    compared = {"sparse": (sparse, SPARSE, "after sparse training, attending to what the indexers select"),
                "same weights, dense": (sparse, DENSE, "the same weights, attending to everything")}  # fmt: skip
    for name, stage, about in (
        ("before, dense", DENSE_STAGE, "before sparse training, attending to everything"),
        ("control", CONTROL_STAGE, "trained on with dense attention for the same tokens"),
    ):
        if (path := directory / stage / "model").is_dir():
            compared[name] = (open_on(path, device), DENSE, about)
    losses = {name: {"about": about, **asdict(held_out(model, batches, mode))} for name, (model, mode, about) in compared.items()}
    random = with_random_indexers(sparse, seed=1)
    few = batches[: config.quality_batches]
    found: dict[str, Any] = {
        "length": length, "top_k": sparse.config.index_topk, "held_out_tokens": config.batches * config.rows * length,
        "loss": losses, "selection": _by_layer(selection(sparse, few)), "random_selection": _by_layer(selection(random, few)),
    }  # fmt: skip
    if config.needles:
        try:
            found["retrieval"] = _retrieval(compared, random, store, length, words, config)
        except UserError as error:  # rows too short for a needle; the losses stand all the same
            found["no_retrieval"] = str(error)
    return found


def _retrieval(
    compared: dict[str, Any], random: Transformer, store: TokenStore, length: int, words: int | None, config: ExhibitConfig
) -> dict[str, Any]:
    vocabulary = Vocabulary.of(store.tokenizer, store.ends, words)
    filler = store.documents(_largest(store), "held_out")
    asked = NeedleConfig(lengths=config.lengths or (length,), count=config.needles, others=_others(vocabulary))
    models = {name: (model, mode) for name, (model, mode, _) in compared.items()} | {"random indexers": (random, SPARSE)}
    found = {name: retrieval(model, vocabulary, filler, asked, mode) for name, (model, mode) in models.items()}
    cells = [
        {"length": at[0], "depth": at[1], **{name: scores.cells[at] for name, scores in found.items()}}
        for at in found["sparse"].cells
    ]
    return {
        "documents": config.needles * len(cells), "others": asked.others, "cells": cells,
        "accuracy": {name: scores.accuracy for name, scores in found.items()},
    }  # fmt: skip


def _others(vocabulary: Vocabulary) -> int:
    """How many other facts stand in a needle's document: three, or as many as there are words for."""
    return min(3, len(vocabulary.keys) - 1, len(vocabulary.values) - 1)


def _by_layer(found: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {str(layer): values for layer, values in found.items()}


def _trained_on(stage: Path) -> tuple[int, int | None]:
    """The length of the stage's rows, and how many words its recall documents were drawn from."""
    batch = tomllib.loads((stage / "config.toml").read_text(encoding="utf-8"))["batch"]
    words = batch["recall"].get("words")
    return batch["length"], words if isinstance(words, int) else None


def _largest(store: TokenStore) -> str:
    return max(store.names, key=lambda name: len(store.documents(name, "held_out").tokens))


# --- which tokens were selected


def texts(directory: Path, store: TokenStore, shape: ModelConfig, config: ExhibitConfig) -> list[Text]:
    """A needle document, a held-out passage and, where the run played tasks, a conversation with tools."""
    wanted = config.tokens or max(4 * shape.index_topk, 256)
    length = min(wanted, shape.max_positions)
    return [*_needle_text(directory, store, length, config), *_passage(store, length), *_conversation(directory, length)]


def _needle_text(directory: Path, store: TokenStore, length: int, config: ExhibitConfig) -> Iterator[Text]:
    stage = directory / SPARSE_STAGE
    words = _trained_on(stage)[1] if (stage / "config.toml").is_file() else None
    vocabulary = Vocabulary.of(store.tokenizer, store.ends, words)
    filler = store.documents(_largest(store), "held_out")
    others = _others(vocabulary)
    fewest = 2 + vocabulary.question_len + (others + 1) * vocabulary.fact_len
    if length < fewest or not len(filler.tokens):
        return
    document = needle(vocabulary, generator(config.seed, 7), length, 0.25, filler, others)
    asked = int(np.flatnonzero(document.answers)[0]) - 1  # the token from which the answer's first one is predicted
    about = (
        "Facts of the form “@ value key” hidden in real text, and a question “? key” at the end. The chosen token is the one "
        "from which the answer must be predicted: does the selection hold the fact?"
    )
    yield Text("A needle in text", about, document.tokens, asked)


def _passage(store: TokenStore, length: int) -> Iterator[Text]:
    documents = store.documents(_largest(store), "held_out")
    if not len(documents):
        return
    lengths = np.diff(documents.offsets)
    enough = np.flatnonzero(lengths >= length)
    index = int(enough[0]) if len(enough) else int(lengths.argmax())
    tokens = np.asarray(documents[index][:length]).astype(np.int64)
    yield Text("Held-out text", "The beginning of a document that no stage was trained on.", tokens, len(tokens) - 2)


def _conversation(directory: Path, length: int) -> Iterator[Text]:
    """The tokens of the last stored attempt at a task that was answered, as they went through the sampler."""
    for path in sorted(directory.rglob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)[:200]:
        with np.load(path, allow_pickle=False) as found:
            if "record" not in found.files:
                continue
            turns = sorted((int(n.split(".")[0]) for n in found.files if n.endswith(".tokens")), reverse=True)
            parts = [(found[f"{n}.prompt"], found[f"{n}.tokens"]) for n in turns[:1]]
        for prompt, sampled in parts:
            tokens = np.concatenate([prompt, sampled]).astype(np.int64)
            if 32 <= len(tokens) <= 4 * length and len(sampled):
                tokens = tokens[-length:]
                about = "An attempt at a task: prompt, thinking, calls and results, as the model sampled and read them."
                yield Text("A conversation with tools", about, tokens, len(tokens) - 2)
                return


@torch.no_grad()
def selected_tokens(model: Transformer, chosen: Sequence[Text], store: TokenStore, config: ExhibitConfig) -> dict[str, Any]:
    """For each text: its pieces, and by layer a bit for every (shown token, earlier token), base64, rows padded to bytes.

    Beside them, for every shown token, the share of its attention's mass that was selected, and that the best keys would hold.
    """
    if not model.config.has_indexer:
        raise UserError("the model has no indexer; every token attends to all")
    shown = [_shown(model, text, store, config) for text in chosen]
    return {"top_k": model.config.index_topk, "texts": shown}


def _shown(model: Transformer, text: Text, store: TokenStore, config: ExhibitConfig) -> dict[str, Any]:
    trace = Trace(selected_indices=True, index_quality=True)
    model.states(torch.from_numpy(text.tokens)[None].to(model.embed.weight.device), trace=trace, mode=SPARSE)
    first = max(0, len(text.tokens) - config.shown)
    layers = sorted(trace.selected)
    if len(layers) > MAX_LAYERS:
        layers = [layers[round(i * (len(layers) - 1) / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
    return {
        "title": text.title, "about": text.about, "length": len(text.tokens), "first": first,
        "chosen": max(0, text.chosen - first), "pieces": pieces(store, text.tokens[first:]),
        "layers": {
            str(layer): {
                "selected": packed(trace.selected[layer][first:].cpu(), len(text.tokens)),
                "captured": _rounded(trace.qualities[layer].captured[first:]),
                "oracle": _rounded(trace.qualities[layer].oracle[first:]),
            }
            for layer in layers
        },
    }  # fmt: skip


def packed(indices: Tensor, length: int) -> str:
    """Bits [rows, length] of the selected positions [rows, K] (-1: none), most significant first, as base64."""
    bits = np.zeros((len(indices), length), bool)
    rows, columns = np.nonzero(indices.numpy() >= 0)
    bits[rows, indices.numpy()[rows, columns]] = True
    return base64.b64encode(np.packbits(bits, axis=1).tobytes()).decode()


def pieces(store: TokenStore, tokens: np.ndarray) -> list[str]:
    """The text of each token; the bytes of a letter cut in two show as U+FFFD."""
    return [store.tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
