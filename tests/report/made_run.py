"""A run's directory made by hand, with everything in it that the page can show, and figures that a test can know."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.rollout.archive import Archive
from rorqual.rollout.trajectory import End, Observation, Trajectory, Turn
from rorqual.runlog import RunLog
from rorqual.tasks.verdict import failed, passed

TOKENS, TOPK, LAYERS = 48, 8, 2
BEGAN = 1_795_000_000.0
HOSTILE = "</script><img src=x onerror=alert(1)>"
"""Text that must stay text wherever it is shown."""
STAGES = ("pretrain", "extend", "warm-indexer", "train-sparse", "cold-start", "specialists/retail", "distill", "grpo")


def made_run(directory: Path) -> Path:
    log = RunLog(directory, quiet=True)
    log.event("begin", config="Recipe", time=BEGAN)
    sizes = {"train": {"documents": 90, "tokens": 9000}, "held_out": {"documents": 10, "tokens": 1000}}
    log.event("prepared", corpora={"python": sizes}, time=BEGAN)
    log.event("sample", prompt="def ", text=f"main({HOSTILE})", time=BEGAN + 1000)
    log.close()
    environment = {"rorqual": "0.1.0", "python": "3.11.7", "cores": 2, "commit": "a" * 40, "torch": "2.13.0", "device": "cpu"}
    (directory / "environment.json").write_text(json.dumps(environment))
    for number, name in enumerate(STAGES):
        _stage(directory / name, number)
    _exhibits(directory / "exhibits")
    for stage in STAGES[4:]:
        _evaluation(directory, stage, "none", 0.3 + 0.1 * STAGES.index(stage) / 4)
    for context in ("summary", "discard-all"):
        _evaluation(directory, "grpo", context, 0.6)
    (directory / "tasks" / "general").mkdir(parents=True)
    manifest = {"counts": {"task": 12, "world": 5, "rejected": 7}, "rejected": {"cheap_policies_fail": 4, "crash": 3}}
    (directory / "tasks" / "general" / "manifest.json").write_text(json.dumps(manifest))
    _lineage(directory / "model")
    return directory


def _stage(directory: Path, number: int) -> None:
    log = RunLog(directory, quiet=True)
    (directory / "config.toml").write_text("[batch]\nrows = 4\nlength = 64\n" if number < 4 else "seed = 0\n")
    began = BEGAN + 100 * number
    log.event("begin", config="Config", time=began)
    for step in range(20):
        values: dict[str, float] = {"train/tokens_per_s": 1000.0 + step, "train/memory_bytes": 5e8 + number}
        if directory.name in ("retail", "grpo"):
            values |= {"rollout/success": step / 40, "rollout/success/general": step / 40, "reward/mean": step / 30,
                       "train/kl": 0.01 * step, "train/masked_share": 0.02, "train/clip_share": 0.1, "train/ratio_max": 1.5,
                       "train/mismatch_abs": 1e-6, "train/entropy": 2 - step / 20, "train/tokens": 500.0}  # fmt: skip
        elif directory.name != "warm-indexer":
            values |= {"train/loss": 4 - number / 4 - step / 40, "train/tokens": 256.0}
        if directory.name in ("warm-indexer", "train-sparse"):
            values["train/index_loss"] = 1 / (step + 1)
            for layer in range(LAYERS):
                values |= {f"captured/{layer}": 0.5 + step / 100, f"oracle/{layer}": 0.8}
        log.metrics(step, time=began + step, **values)
    log.event("stage ended", stage=directory.name, steps=20, seconds=20.0, time=began + 20)
    log.close()


def selected(layer: int) -> np.ndarray:
    """bool [TOKENS, TOKENS]: in layer 0 the last 8 tokens; in layer 1 the first 4 and the last 4. By 8 tokens seen, all."""
    chosen = np.zeros((TOKENS, TOKENS), bool)
    for t in range(TOKENS):
        near = range(max(0, t + 1 - TOPK), t + 1) if layer == 0 or t < TOPK else [*range(4), *range(t - 3, t + 1)]
        chosen[t, list(near)] = True
    return chosen


def _exhibits(directory: Path) -> None:
    directory.mkdir()
    pieces = [f" w{i}" for i in range(TOKENS)]
    pieces[3], pieces[5], pieces[6] = HOSTILE, "\n", "\n"
    layers = {
        str(layer): {
            "selected": base64.b64encode(np.packbits(selected(layer), axis=1).tobytes()).decode(),
            "captured": [0.75] * TOKENS, "oracle": [0.9] * TOKENS,
        }
        for layer in range(LAYERS)
    }  # fmt: skip
    text = {"title": "First text", "about": "Made by hand.", "length": TOKENS, "first": 0, "chosen": 40, "pieces": pieces}
    other = {**text, "title": "Second text", "chosen": 5}
    positions = [0, 16, 64, 256, 511]
    cost = {
        "top_k": TOPK, "positions": positions, "dense_flops": [100 * (p + 1) for p in positions],
        "sparse_flops": [100 * min(p + 1, TOPK) + 10 * (p + 1) for p in positions],
        "dense_read": [64 * (p + 1) for p in positions], "sparse_read": [64 * min(p + 1, TOPK) + 8 * (p + 1) for p in positions],
        "crossovers": {"decode_flops": 9, "prefill_flops": None, "read_bf16": 10, "read_fp8": 11},
    }  # fmt: skip
    losses = {name: {"about": name, "loss": loss, "edges": [0, 256], "by_position": [loss + 0.1, None]}
              for name, loss in (("sparse", 4.02), ("same weights, dense", 4.0), ("before, dense", 4.1))}  # fmt: skip
    by_layer = {str(layer): {"captured": 0.72, "oracle": 0.8, "recall": 0.6} for layer in range(LAYERS)}
    exhibits: dict[str, Any] = {
        "model": {"parameters": 2_040_000, "activated": 1_100_000, "shape": {}},
        "cost": {"this": cost, "paper": {**cost, "prefill_dollars": [{"position": 0, "dense": 0.1, "sparse": 0.1},
                                                                     {"position": 131071, "dense": 0.7, "sparse": 0.3}]}},
        "quality": {"length": 512, "top_k": TOPK, "held_out_tokens": 8192, "loss": losses, "selection": by_layer,
                    "random_selection": by_layer,
                    "retrieval": {"documents": 32, "others": 3, "accuracy": {"sparse": 0.9, "before, dense": 0.95}}},
        "selection": {"top_k": TOPK, "texts": [{**text, "layers": layers}, {**other, "layers": layers}]},
    }  # fmt: skip
    for name, value in exhibits.items():
        (directory / f"{name}.json").write_text(json.dumps(value))


def _evaluation(run: Path, stage: str, context: str, score: float) -> None:
    suffix = "" if context == "none" else f"-{context}"
    directory = run / "evaluation" / f"{stage.replace('/', '-')}-primer{suffix}"
    found = {"value": score, "low": score - 0.1, "high": score + 0.1}
    curve = [{"label": f"at most {n}", "steps": 4.0 * n, "score": score * n / 3, "low": 0.0, "high": 0.9} for n in (1, 2, 3)]
    results = {
        "benchmark": "heldout", "context": context, "policy": f"{run}/{stage}/model", "score": found, "tasks": 60, "samples": 2,
        "pass_at_k": {"1": found, "2": found}, "mean_steps": 12.0, "unscored_attempts": 1, "curve": curve,
        "accounts": {"resets": 3, "sampled_tokens": 12345},
    }  # fmt: skip
    archive = Archive(directory / "attempts")
    archive.save(_attempt("task-1", True))
    archive.save(_attempt("task-2", False))
    (directory / "results.json").write_text(json.dumps(results))


def _attempt(task: str, is_passed: bool) -> Trajectory:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "look_up", "arguments": json.dumps({"city": "Lyon", "n": 2})},
    }
    tool = {"type": "function", "function": {"name": "look_up", "description": "Looks a city up."}}
    first = {"role": "assistant", "reasoning_content": f"I should look. {HOSTILE}", "content": "", "tool_calls": [call]}
    last = {"role": "assistant", "content": f"The answer to {task} is 42."}
    messages = (
        {"role": "system", "content": "You are an agent.", "tools": [tool]},
        {"role": "user", "content": f"What of {task}?"}, first,
        {"role": "tool", "tool_call_id": "call_1", "content": "population 522,000"}, last,
    )  # fmt: skip
    turns = (Turn(first, None, (Observation("call_1", "look_up", "population 522,000"),)), Turn(last, None))
    verdict = passed() if is_passed else failed("wrong_number")
    return Trajectory(task, 0, turns, End.ANSWERED, verdict, messages)


def _lineage(directory: Path) -> None:
    directory.mkdir()
    records: dict[str, Any] = {}
    before: list[str] = []
    for name in ("given", "prepare", *STAGES):
        own = f"{math.comb(40, len(records) + 3):064x}"[::-1]
        parents = [{"role": "init", "id": parent, "content": {}} for parent in before]
        records[own] = {"stage": name, "parents": parents, "content": {"weights": own}, "seeds": {"seed": 0}, "config": {}}
        before = [own] if name in ("given", "prepare") else [*before[:1], own]
    (directory / "lineage.json").write_text(json.dumps({"id": own, "records": records}))
