"""Where an iteration of GRPO spends its time (rollouts, training, weight sync, idle) and how many tokens a second it samples and
trains, with rollouts in turn and one version ahead; batches are never further behind than stated. On a CPU both share the same
cores, so running ahead gains little here: it is for a sampler that has a device of its own. Speeds are reported, not claimed.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rorqual.parallel.world import World
from rorqual.runlog import RunLog, read_metrics
from rorqual.stages import grpo
from rorqual.stages.sorting import SHAPE
from rorqual.train.loop import Pace, Site
from tests.stages.test_grpo import CONFIG, POOL, TOKENIZER, save_taught

SECONDS, QUICK_SECONDS = 60, 25
FIGURES = (
    "time/step_s", "time/rollout", "time/train", "time/sync", "time/idle", "rollout/seconds", "rollout/tokens_per_s",
    "train/tokens_per_s", "rollout/staleness", "rollout/success",
)  # fmt: skip


def main(quick: bool) -> dict[str, Any]:
    steps = 4 if quick else 12
    shape = replace(SHAPE, vocab_size=TOKENIZER.vocab_size, max_positions=256, dim=64 if quick else 128)
    figures: dict[str, Any] = {"parameters_dim": shape.dim}
    with tempfile.TemporaryDirectory() as folder:
        init = save_taught(Path(folder) / "init", shape)
        for staleness in (0, 1):
            directory = Path(folder) / str(staleness)
            config = replace(CONFIG, staleness=staleness, pace=Pace(steps=steps), groups=replace(CONFIG.groups, size=16))
            log = RunLog(directory, quiet=True)
            grpo.main(config, init, POOL, Site(directory, World(0, 1, torch.device("cpu")), log))
            log.close()
            found = {name: [value for _, value in read_metrics(directory, name)] for name in FIGURES}
            assert max(found["rollout/staleness"]) <= staleness, found["rollout/staleness"]
            shares = [sum(each) for each in zip(*(found[f"time/{n}"] for n in ("rollout", "train", "sync", "idle")), strict=True)]
            assert all(abs(share - 1) < 1e-6 for share in shares), shares
            # The first step loads libraries.
            figures[f"staleness {staleness}"] = {name: round(fmean(values[1:]), 4) for name, values in found.items()}
    return figures
