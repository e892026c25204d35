"""The engine on one GPU: tokens per second by context length, dense against sparse, and a step's time against its kernels':
results/gpu_engine.json.

    python -m benchmarks.gpu_engine [--part NAME ...] [--rows 32] [--out FILE] [--commit ID]

The model has the shape of the recipe `small`, with random weights in bfloat16. decode: `rows` requests at a context; the cache is
filled with numbers, since what is in it makes no difference to the time. dense: the same weights, attending to all keys.
prefill: one prompt. steps: the wall clock of a decode step against the sum of its kernels (torch's profiler), with CUDA graphs
and without. rollouts: the shape of the recipe `tiny`, as GRPO samples: groups of 8 that share a prompt, top-p, kept tokens,
routing and selections recorded; beside it the host's time by function.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import io
import json
import pstats
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.config import load
from rorqual.engine import Engine, EngineConfig
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams
from rorqual.runlog import environment, write_atomically

HERE = Path(__file__).parent
MODES = {"sparse": AttentionMode(), "dense": AttentionMode(sparse=False)}
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_MULTI_HEAD = 32768
"""Prefill in multi-head attention is measured up to here: it has lost long before."""
PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131000)
Figures = dict[str, Any]


def shape(recipe: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(load(ModelConfig, recipe, table="model"), **changes)


def model_of(recipe: str, device: str, **changes: Any) -> Transformer:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Transformer(shape(recipe, **changes), seed=1).to(device, dtype).eval().requires_grad_(False)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def generation_seconds(engine: Engine, prompts: list[list[int]], params: SamplingParams, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    engine.generate(prompts, params)
    synchronize(device)
    return time.perf_counter() - began


def fill(engine: Engine) -> None:
    for store in [*engine.cache._kv, *engine.cache._index_keys]:
        if store is not None and store.is_floating_point():
            store.normal_()


def placed(engine: Engine, rows: int, context: int, count: int, params: SamplingParams | None = None) -> list[Any]:
    """Requests whose prompts of `context` tokens count as computed, all but the last token."""
    draw = np.random.default_rng(0)
    params = params or SamplingParams(max_tokens=count, temperature=1, top_p=0.95, seed=1)
    requests = [engine.add(draw.integers(2, engine.model.config.vocab_size, context).tolist(), params) for _ in range(rows)]
    for request in requests:
        assert engine.scheduler._admit(request, 1, set()) is not None, "the cache is too small"
        request.computed_len = context - 1
    return requests


def released(engine: Engine, requests: list[Any]) -> None:
    for request in requests:
        engine.abort(request)
    assert engine.pool.num_held == 0


def step_seconds(engine: Engine, rows: int, context: int, device: str, steps: int) -> float:
    """Seconds of one decode step of all rows, by the wall clock, after warm-up."""
    requests = placed(engine, rows, context, 128 + 4 * steps)
    size = max(engine.config.device_steps, 1)
    for _ in range(2 if size > 1 else 4):
        engine.step()
    counts, began = engine.counters.steps, time.perf_counter()
    while engine.counters.steps - counts < steps:
        engine.step()
    synchronize(device)
    seconds = (time.perf_counter() - began) / (engine.counters.steps - counts)
    released(engine, requests)
    return seconds


def small_engine(model: Transformer, rows: int, longest: int, mode: AttentionMode, **settings: Any) -> Engine:
    room = rows * (longest + 384)
    config = EngineConfig(cache_tokens=room, max_running=rows, prefix_cache=False, max_step_tokens=8192, seed=1,
                          record_routing=False, **settings)  # fmt: skip
    return Engine(model, config, mode)


def decode(model: Transformer, args: argparse.Namespace) -> Figures:
    """Tokens per second of `rows` requests by context, with graphs; and where sparse becomes the faster."""
    contexts = [context for context in CONTEXTS if context <= args.longest]
    figures: Figures = {"rows": args.rows, "unit": "tokens/s", "context": contexts}
    for name, mode in MODES.items():
        engine = small_engine(model, args.rows, max(contexts), mode)
        fill(engine)
        rates = []
        for context in contexts:
            rates.append(args.rows / step_seconds(engine, args.rows, context, args.device, args.steps))
            print("decode", name, context, f"{rates[-1]:.0f} tokens/s", flush=True)
        figures[name] = [round(rate, 1) for rate in rates]
        del engine
    figures["crossover"] = crossover(contexts, figures["sparse"], figures["dense"])
    return figures


def prefill(model: Transformer, args: argparse.Namespace) -> Figures:
    """Tokens per second of one prompt, in latent attention (absorbed) and in multi-head attention: masked, or over all keys."""
    lengths = [length for length in PROMPTS if length <= args.longest]
    figures: Figures = {"unit": "tokens/s", "length": lengths, "max_step_tokens": 8192}
    modes = {**MODES, "sparse, masked": AttentionMode(form="auto", masked_factor=1e9),
             "dense, expanded": AttentionMode(sparse=False, form="expanded")}  # fmt: skip
    draw = np.random.default_rng(1)
    for name, mode in modes.items():
        engine = small_engine(model, 1, max(lengths), mode)
        rates = []
        for length in lengths:
            if name not in MODES and length > LONGEST_MULTI_HEAD:
                rates.append(0.0)
                continue
            prompt = draw.integers(2, model.config.vocab_size, length).tolist()
            params = SamplingParams(max_tokens=1, temperature=0)
            engine.generate([prompt], params)
            runs = [generation_seconds(engine, [prompt], params, args.device) for _ in range(2)]
            rates.append(length / min(runs))
            print("prefill", name, length, f"{rates[-1]:.0f} tokens/s", flush=True)
        figures[name] = [round(rate, 1) or None for rate in rates]
        del engine
    best = {
        kind: [max(a, b or 0) for a, b in zip(figures[kind], figures[other], strict=True)]
        for kind, other in (("sparse", "sparse, masked"), ("dense", "dense, expanded"))
    }
    figures["crossover"] = crossover(lengths, best["sparse"], best["dense"])
    figures["masked_crossover"] = crossover(lengths, figures["sparse"], [rate or 0 for rate in figures["sparse, masked"]])
    engine = small_engine(model, 1, 32768, AttentionMode())
    prompt = draw.integers(2, model.config.vocab_size, min(32768, args.longest)).tolist()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    table = kernel_table(lambda: engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0)), args.device)
    figures["kernels_at_32768"] = {"ms": sum(each["us"] for each in table) / 1e3, "kernels": table[:20]}
    print(json.dumps(figures["kernels_at_32768"], indent=1), flush=True)
    return figures


def crossover(lengths: list[int], sparse: list[float], dense: list[float]) -> int | None:
    """The least length from which on sparse is the faster one throughout; None where it is not at the longest."""
    faster = [a >= b for a, b in zip(sparse, dense, strict=True)]
    return next((length for i, length in enumerate(lengths) if all(faster[i:])), None)


def steps(model: Transformer, args: argparse.Namespace) -> Figures:
    """A decode step's wall clock over the sum of its kernels' times."""
    figures: Figures = {}
    context = min(4096, args.longest)
    for name, rows, dtype in (("graphs", args.rows, "model"), ("graphs", 4 * args.rows, "model"), ("graphs", 1, "model"),
                              ("graphs, FP8 cache", 4 * args.rows, "fp8"), ("no graphs", args.rows, "model")):  # fmt: skip
        engine = small_engine(model, rows, context, AttentionMode(), cache_dtype=dtype)
        fill(engine)
        if name == "no graphs" and engine.decoder is not None:
            engine.decoder = engine._decoder(captures=False)
        wall = step_seconds(engine, rows, context, args.device, args.steps)
        kernels, table = kernel_seconds(engine, rows, context, args)
        overhead = wall / kernels - 1 if kernels else None
        figures[f"{name}, {rows} rows at {context}"] = {
            "ms_per_step": wall * 1e3, "kernels_ms_per_step": kernels * 1e3, "overhead": overhead, "kernels": table[:25],
            "kernel_launches_per_step": sum(each["calls_per_step"] for each in table),
        }  # fmt: skip
        print("steps", name, rows, context, f"wall {wall * 1e3:.3f} ms, kernels {kernels * 1e3:.3f} ms", overhead, flush=True)
        for each in table[:25]:
            print("   ", each, flush=True)
        del engine
    return figures


def kernel_seconds(engine: Engine, rows: int, context: int, args: argparse.Namespace) -> tuple[float, list[Figures]]:
    """Seconds of all kernels of one step, and the kernels by their time."""
    requests = placed(engine, rows, context, 128 + 4 * args.steps)
    for _ in range(2):
        engine.step()
    counts: list[int] = []

    def some_steps() -> None:
        first = engine.counters.steps
        while engine.counters.steps - first < 16:
            engine.step()
        counts.append(engine.counters.steps - first)

    table = kernel_table(some_steps, args.device)
    released(engine, requests)
    count = counts[0]
    rows_of_table = [
        {"name": each["name"], "us_per_step": round(each["us"] / count, 2), "calls_per_step": each["calls"] / count}
        for each in table
    ]
    return sum(each["us"] for each in table) / count / 1e6, rows_of_table


def kernel_table(call: Callable[[], None], device: str) -> list[Figures]:
    """The kernels that a call launches, the longest first: their time in microseconds and their number."""
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as told:
        call()
        synchronize(device)
    kernels = [each for each in told.key_averages() if str(each.device_type).endswith("CUDA") and each.self_device_time_total]
    kernels.sort(key=lambda each: -each.self_device_time_total)
    return [{"name": each.key[:90], "us": each.self_device_time_total, "calls": each.count} for each in kernels]


def rollouts(args: argparse.Namespace) -> Figures:
    """Sampling for GRPO with the recipe `tiny`: groups of 8 of one prompt; tokens per second by number of requests and dtype."""
    figures: Figures = {}
    for dtype in ("bfloat16", "float32"):
        model = model_of("tiny", args.device, max_positions=1024).to(getattr(torch, dtype))
        for requests in args.requests:
            engine = Engine(model, EngineConfig(cache_tokens=requests * 640, max_running=requests, max_step_tokens=16384, seed=1,
                                                record_selection=True))  # fmt: skip
            draw = np.random.default_rng(3)
            heads = [draw.integers(2, model.config.vocab_size, 300).tolist() for _ in range(requests // 8)]
            # Random weights say nothing in particular; so cold, they keep about as few tokens as trained ones do.
            recorded = dict(record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True)
            params = SamplingParams(max_tokens=128, temperature=0.15, top_p=0.95, **recorded)
            prompts = [head for head in heads for _ in range(8)]
            engine.generate(prompts, params)
            profiler = cProfile.Profile()
            seconds = generation_seconds(engine, prompts, params, args.device)
            profiler.enable()
            done = engine.generate(prompts, params)
            profiler.disable()
            text = io.StringIO()
            pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(22)
            rate = requests * 128 / seconds
            kept = np.diff(done[0].kept_tokens.offsets).mean()
            figures[f"{dtype}, {requests} requests"] = {"tokens_per_s": rate, "seconds": seconds, "mean_kept": float(kept)}
            print("rollouts", dtype, requests, f"{rate:.0f} tokens/s", flush=True)
            print(text.getvalue()[:4500], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["decode", "steps", "prefill", "rollouts"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_engine.json")
    parser.add_argument("--commit", help="where the checkout's own can't be read")
    args = parser.parse_args()
    figures: Figures = {}
    model = model_of("small", args.device, max_positions=131072)
    for part in args.part:
        try:
            figures[part] = rollouts(args) if part == "rollouts" else globals()[part](model, args)
        except Exception:
            traceback.print_exc()
            figures[part] = {"failed": traceback.format_exc(limit=3)}
        told = {"command": "python -m benchmarks.gpu_engine", "date": time.strftime("%Y-%m-%d", time.gmtime()), **environment()}
        device = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
        record = {**told, **({"commit": args.commit} if args.commit else {}), **device, "model": dataclasses.asdict(model.config)}
        write_atomically(args.out, json.dumps({**record, "figures": figures}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
