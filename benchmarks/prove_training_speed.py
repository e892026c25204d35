"""A training step here is at least as fast as transformers' deepseek_v3 of the same shape and optimiser (on a GPU: twice).

Both models hold the same weights, see the same tokens and take AdamW steps from torch; losses must agree before anything is
timed. Rounds alternate, and the figure is the ratio of the medians, asserted in the full form only. Dense attention, length
1024; CPU: float32; GPU: bf16.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.model.weights import load_model, save_model
from rorqual.train.objectives import Inputs, Objective, ObjectiveConfig, count_targets
from rorqual.train.optimizer import Optimizer, OptimizerConfig

SECONDS, QUICK_SECONDS = 150, 60
FLOOR = {"cpu": 1.0, "cuda": 2.0}


def shape(device: str) -> ModelConfig:
    """Eight layers of width 512 on a CPU (the shape of the project's other CPU comparisons, with half the layers)."""
    big = device == "cuda"
    return ModelConfig(
        vocab_size=32768 if big else 8192,
        dim=1024 if big else 512,
        n_layers=12 if big else 4,
        n_dense_layers=1,
        inter_dim=2816 if big else 1408,
        max_positions=4096,
        init_std=0.02,
        n_heads=16 if big else 8,
        q_lora_rank=512 if big else 256,
        kv_lora_rank=512 if big else 128,
        qk_nope_head_dim=128 if big else 64,
        qk_rope_head_dim=64 if big else 32,
        v_head_dim=128 if big else 64,
        yarn=None,
        indexers="none",
        n_routed_experts=32 if big else 16,
        n_activated_experts=4,
        moe_inter_dim=512 if big else 256,
        n_expert_groups=4,
        n_limited_groups=2,
        n_mtp_layers=0,
    )


def our_step(model: Transformer, tokens: torch.Tensor) -> Callable[[], float]:
    from rorqual.data.loader import Batch

    objective = Objective(model, ObjectiveConfig(mtp_weight=0, balance_weight=0), AttentionMode(sparse=False, form="expanded"))
    optimizer = Optimizer(model, OptimizerConfig())
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))

    def step() -> float:
        inputs = Inputs.of(batch)
        losses = objective(inputs, count_targets([inputs]))
        losses.total.backward()
        optimizer.step(1e-4)
        return float(losses.total.detach())

    return step


def captured_step(model: Transformer, tokens: torch.Tensor) -> Callable[[], float]:
    """As our_step, its forward and backward captured once in a CUDA graph: the host launches one thing instead of thousands."""
    from rorqual.data.loader import Batch

    objective = Objective(model, ObjectiveConfig(mtp_weight=0, balance_weight=0), AttentionMode(sparse=False, form="expanded"))
    optimizer = Optimizer(model, OptimizerConfig())
    inputs = Inputs.of(Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)))
    counts = count_targets([inputs])

    def gradients() -> torch.Tensor:
        total = objective(inputs, counts).total
        total.backward()
        return total.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
            optimizer.adam.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = gradients()
    held = {name: master.grad for name, master in optimizer.masters.items()}

    def step() -> float:
        graph.replay()
        for name, master in optimizer.masters.items():
            master.grad = held[name]
        optimizer.step(1e-4)
        return float(total)

    return step


def their_step(model: Any, tokens: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(quick: bool) -> dict[str, Any]:
    """Both models' first losses, which must agree, then the times of their steps in turn."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rounds = 3 if quick else 7
    rows = 8 if device == "cuda" else 1
    tokens = torch.randint(0, 8192, (rows, 1024), generator=torch.Generator().manual_seed(0)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Transformer(shape(device), seed=0), Path(folder) / "m", "float32", layout="fused")
        ours = load_model(Path(folder) / "m", dtype, device).train()
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=dtype).to(device).train()
    steps = {"rorqual": our_step(ours, tokens), "transformers": their_step(theirs, tokens)}
    untrained = copy.deepcopy(ours) if device == "cuda" else None
    losses = {name: step() for name, step in steps.items()}
    tolerance = 1e-4 if device == "cpu" else 2e-2
    assert max(losses.values()) - min(losses.values()) < tolerance, f"the first losses differ: {losses}"
    times = timed(steps, rounds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["transformers"] / medians["rorqual"]
    figures = {
        "device": device,
        "threads": torch.get_num_threads(),
        "first_losses": losses,
        "tokens_per_s": {name: tokens.numel() / value for name, value in medians.items()},
        "seconds": {name: [round(x, 4) for x in values] for name, values in times.items()},
        "ratio": ratio,
        "aim": FLOOR[device],
    }
    print(figures, flush=True)
    if untrained is not None:
        figures["captured"] = captured(untrained, steps["transformers"], tokens, losses["transformers"], rounds)
        print(figures["captured"], flush=True)
    return figures


def captured(
    model: Transformer, theirs: Callable[[], float], tokens: torch.Tensor, first_loss: float, rounds: int
) -> dict[str, Any]:
    """The step with its forward and backward in a CUDA graph, in turn with transformers'; or what forbids it."""
    try:
        steps = {"rorqual": captured_step(model, tokens), "transformers": theirs}
        loss = steps["rorqual"]()
        assert abs(loss - first_loss) < 2e-2, f"the captured step's first loss is {loss}, not {first_loss}"
        times = timed(steps, rounds, "cuda")
    except Exception as error:
        return {"not measured, because": repr(error)[:300]}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens_per_s": {name: tokens.numel() / value for name, value in medians.items()},
        "seconds": {name: [round(x, 4) for x in values] for name, values in times.items()},
        "ratio": medians["transformers"] / medians["rorqual"],
    }


def timed(steps: dict[str, Callable[[], float]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, in turn; on a GPU after three untimed ones, since kernels are compiled as they are met."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in [*steps.values()] * (3 if device == "cuda" else 0):
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return times


def main(quick: bool) -> dict[str, Any]:
    figures = measure(quick)
    ratio, device = figures["ratio"], figures["device"]
    assert quick or ratio >= FLOOR[device], f"{ratio:.2f} times transformers' speed, below {FLOOR[device]}"
    return figures
