"""With everything replayed, trainer and sampler agree to 1e-5 on long rollouts above top-k, prefix cache and preemption in play;
each replay left out shows a larger gap, at equal weights where the sampler truncates or heats, and after the weights have
moved by one optimiser step's worth where it only decides. The model has random weights, so gaps are a lower bound's kind:
they show what each replay is for, not how large the gap of a trained model is.
"""

from __future__ import annotations

from typing import Any

import torch

from rorqual.engine import Engine, EngineConfig
from rorqual.model.transformer import Transformer
from rorqual.train.samples import ReplayConfig
from tests.system.test_trainer_equals_sampler import CONFIG, ENGINE, gaps, played

SECONDS, QUICK_SECONDS = 60, 30
MOVES = (0.0, 0.001, 0.003, 0.01)
"""Standard deviations of what is added to every weight."""
ARMS = {"all replayed": {}} | {
    f"{name} left out": {name: False} for name in ("routing", "selection", "kept_tokens", "temperature")
}


def main(quick: bool) -> dict[str, Any]:
    seeds = (2,) if quick else (2, 3, 4)
    figures: dict[str, Any] = {}
    for move in MOVES[:3] if quick else MOVES:
        found = {name: [_gap(seed, move, ReplayConfig(**left)) for seed in seeds] for name, left in ARMS.items()}
        figures[f"moved {move}"] = {
            name: {k: sum(g[k] for g in each) / len(each) for k in each[0]} for name, each in found.items()
        }
    same, moved = figures["moved 0.0"], figures["moved 0.003"]
    assert same["all replayed"]["max"] < 1e-5, same
    for name in ("kept_tokens left out", "temperature left out"):
        assert same[name]["mean"] > 1e-2, (name, same)
    for name in ("routing left out", "selection left out"):
        assert moved[name]["mean"] > 1.05 * moved["all replayed"]["mean"], (name, moved)
    return figures


_PLAYED: dict[int, Any] = {}


def _gap(seed: int, move: float, replay: ReplayConfig) -> dict[str, float]:
    """Mean and largest |log ratio| of the sampled tokens."""
    if seed not in _PLAYED:
        _PLAYED[seed] = played(Engine(Transformer(CONFIG, seed=seed), EngineConfig(**vars(ENGINE))))
    model = Transformer(CONFIG, seed=seed)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * move)
    found = gaps(model, _PLAYED[seed], replay)
    return {"mean": float(found.mean()), "max": float(found.max())}
