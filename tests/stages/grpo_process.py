"""Started by torchrun or alone: a few iterations of GRPO on the toy of test_grpo, one thread each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from rorqual.parallel.apply import ComputeConfig
from rorqual.parallel.world import ParallelConfig, start, stop
from rorqual.runlog import RunLog
from rorqual.stages import grpo
from rorqual.train.loop import Pace, Site
from rorqual.train.optimizer import OptimizerConfig
from tests.stages.test_grpo import CONFIG, POOL

torch.set_num_threads(1)
# An epsilon far above rounding, where Adam would turn noise into full steps.
SETTINGS = replace(
    CONFIG, pace=Pace(steps=3), updates=2, compute=ComputeConfig(save_dtype="float32"),
    optimizer=OptimizerConfig(learning_rate=0.004, schedule="constant", weight_decay=0.0, epsilon=1e-5),
)  # fmt: skip

if __name__ == "__main__":
    world, out = start(ParallelConfig(), "cpu"), Path(sys.argv[2])
    try:
        log = RunLog(out if world.is_main else out / "ranks" / str(world.rank), quiet=True)
        grpo.main(SETTINGS, Path(sys.argv[1]), POOL, Site(out, world, log))
    finally:
        stop()
