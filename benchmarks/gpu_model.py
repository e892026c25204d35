"""A layer of the 671B shape and the `small` model end to end, by position, dense against sparse: results/gpu_model.json.

    python -m benchmarks.gpu_model [--out FILE] [--commit ID] [--model layer/small ...] [--longest N]

The engine's own path: rows through the model over the paged cache. Prefill: --rows rows that end at the position. Decode: --batch
sequences, one token each. All are replayed graphs. dense attends to all keys (prefill expanded, decode absorbed), sparse selects
(prefill by the form that `auto` takes). step: the whole forward without embedding and head; attention: the attention modules
alone, projections and cache writes included. Weights and what the cache holds before are random. In ms a forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.gpu_layer import crossover
from rorqual.bench.timing import median_seconds, replayed
from rorqual.config import load
from rorqual.engine.cache import PagedCache, Span
from rorqual.engine.decoder import PagedDecode
from rorqual.kernels import pack_latent
from rorqual.model import ModelConfig, Transformer
from rorqual.model.call import AttentionMode, Call
from rorqual.model.rope import rotation
from rorqual.model.rows import Rows, pack_rows

DEVICE = torch.device("cuda")
PAGE = 64
POSITIONS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PREFILL = {"dense": AttentionMode(sparse=False, form="expanded"), "sparse": AttentionMode(form="auto")}
DECODE = {"dense": AttentionMode(sparse=False), "sparse": AttentionMode()}
MODELS = {"layer": {"recipe": "paper", "rows": 4096}, "small": {"recipe": "small", "rows": 8192}}


def configured(name: str) -> ModelConfig:
    """The small model as its recipe has it, or one MoE layer of the paper's, with a small vocabulary (it is not timed)."""
    config = load(ModelConfig, MODELS[name]["recipe"], table="model")
    if name == "small":
        return dataclasses.replace(config, n_mtp_layers=0)
    return dataclasses.replace(config, n_layers=1, n_dense_layers=0, n_mtp_layers=0, vocab_size=1024)


def drawn(config: ModelConfig) -> Transformer:
    """A bf16 model on the GPU, its weights drawn there."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=config.dim**-0.5) if parameter.dim() > 1 else parameter.fill_(1)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def filled_cache(config: ModelConfig, blocks: int, packed: bool) -> PagedCache:
    """A cache whose entries are random: what was there before a step does not change its time, but zeros might."""
    cache = PagedCache(config, blocks, PAGE, torch.bfloat16, DEVICE, packed=packed)
    for store in cache._kv:
        store.copy_(random_entries(store, config)) if packed else store.normal_()
    for store in cache._index_keys:
        if store is not None:
            fill_index_keys(store, blocks) if packed else store.normal_()
    return cache


def random_entries(store: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Packed entries for all slots: a few thousand drawn ones, again and again."""
    drawn = torch.randn(4096, config.kv_lora_rank + config.qk_rope_head_dim, device=store.device)
    few = pack_latent(drawn[:, : config.kv_lora_rank], drawn[:, config.kv_lora_rank :])
    return few.repeat(-(-len(store) // len(few)), 1)[: len(store)]


def fill_index_keys(store: torch.Tensor, blocks: int) -> None:
    """Random codes below e4m3's NaN, and scales of 1, which stand behind a block's codes."""
    pages = store[: blocks * PAGE].view(blocks, -1)
    values = pages[:, : PAGE * (store.shape[1] - 4)]
    values.random_(0, 120)
    pages[:, values.shape[1] :] = torch.ones(PAGE, device=store.device).view(torch.uint8)


def graph_ms(call: Callable[[], Any]) -> float:
    """The time of the device alone: a replayed graph waits for no Python, whatever else the machine does."""
    call()
    return 1e3 * median_seconds(replayed(call), 7, 2)


def attention_alone(model: Transformer, call: Call) -> Callable[[], Any]:
    """The attention modules of all layers, each on the same rows."""
    x = torch.randn(len(call.rows.tokens), model.config.dim, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        handed = None
        for block in model.layers:
            _, handed = cast(Any, block).attn(x, handed, call)

    return run


@torch.inference_mode()
def prefill(model: Transformer, position: int, count: int) -> dict[str, float]:
    count = min(count, position)
    cache = filled_cache(model.config, position // PAGE, packed=False)
    tokens = torch.randint(0, model.config.vocab_size, (1, count), device=DEVICE)
    rows = pack_rows(tokens, cached_lens=(position - count,))
    cache.plan([Span(list(range(position // PAGE)), position - count, count)])
    figures: dict[str, float] = {"position": position, "rows": count}
    for name, mode in PREFILL.items():
        call = Call(rows, rotation(rows.positions, model.config), cache, mode)
        figures[f"{name}_step"] = graph_ms(lambda mode=mode: model.run(rows, cache, mode=mode))
        figures[f"{name}_attention"] = graph_ms(attention_alone(model, call))
    return figures


@torch.inference_mode()
def decode(model: Transformer, position: int, batch: int, packed: bool) -> dict[str, float]:
    pages = position // PAGE
    cache = filled_cache(model.config, batch * pages, packed)
    table = torch.randperm(batch * pages, device=DEVICE).view(batch, pages).int()
    at = torch.full((batch,), position - 1, device=DEVICE)
    first = torch.arange(batch, device=DEVICE)
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=DEVICE)
    rows = Rows(tokens, at, first, (1, batch), None, (1,) * batch, (1,) * batch)
    figures: dict[str, float] = {"position": position, "batch": batch}
    for name, mode in DECODE.items():

        def step(mode: AttentionMode = mode) -> None:
            model.run(rows, PagedDecode(cache, table, at), mode=mode)

        call = Call(rows, rotation(at, model.config), PagedDecode(cache, table, at), mode)
        attention = attention_alone(model, call)
        figures[f"{name}_step"] = graph_ms(step)
        figures[f"{name}_attention"] = graph_ms(attention)
    return figures


def measured(name: str, longest: int, batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    config = configured(name)
    model = drawn(config)
    count = int(MODELS[name]["rows"])
    record: dict[str, Any] = {"layers": config.n_layers, "heads": config.n_heads, "prefill": [], "decode": [], "decode_fp8": []}
    kinds: dict[str, Callable[[int], dict[str, float]]] = {
        "prefill": lambda position: prefill(model, position, count),
        "decode": lambda position: decode(model, position, batch, packed=False),
        "decode_fp8": lambda position: decode(model, position, batch, packed=True),
    }
    for kind, measure in kinds.items():
        for position in (each for each in POSITIONS if each <= longest):
            if kind != "prefill" and batch * position * config.n_layers * 1408 > 90e9:
                continue  # the cache would not fit
            try:
                record[kind].append(measure(position))
                print(name, kind, record[kind][-1], flush=True)
            except Exception as error:
                record.setdefault("failed", []).append({"kind": kind, "position": position, "error": repr(error)[:300]})
                print(name, kind, position, "failed:", repr(error)[:500], flush=True)
            torch.cuda.empty_cache()
            save(record)
        for part in ("step", "attention"):
            points = [
                {"position": p["position"], "dense": p[f"dense_{part}"], "sparse": p[f"sparse_{part}"]} for p in record[kind]
            ]
            record[f"{kind}_{part}_crossover"] = crossover(points, lambda p: p["sparse"])
        save(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_model.json"))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--longest", type=int, default=POSITIONS[-1])
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    record: dict[str, Any] = {"command": "python -m benchmarks.gpu_model", "commit": options.commit, "unit": "ms a forward"}
    record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def save(name: str, found: dict[str, Any]) -> None:
        record[name] = found
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")

    for name in options.model:
        measured(name, options.longest, options.batch, lambda found, name=name: save(name, found))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
