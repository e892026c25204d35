"""A stage that is asked to stop saves the step in hand, and goes on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from rorqual.errors import UserError
from rorqual.parallel.world import World
from rorqual.train.checkpoints import random_state
from rorqual.train.loop import Pace, Site, run_steps
from rorqual.train.optimizer import Optimizer, OptimizerConfig


def stage(directory: Path, asked_at: int | None, number: signal.Signals) -> list[int]:
    """Run eight steps that add one to a weight; the steps that were taken. Asked to stop during step asked_at."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    taken: list[int] = []

    def one_step(step: int) -> dict[str, float]:
        taken.append(step)
        model.weight.data += 1
        if step == asked_at:
            signal.raise_signal(number)
        return {"train/loss": 1.0}

    optimizer = Optimizer(model, OptimizerConfig())
    site = Site.open(directory, World(0, 1, torch.device("cpu")), quiet=True)
    tensors = {"model.weight": model.weight.detach()} | random_state()
    run_steps("counting", Pace(steps=8, checkpoint_every=100), one_step, optimizer, tensors, site)
    assert float(model.weight.detach()) == 8
    return taken


@pytest.mark.parametrize(("number", "why"), [(signal.SIGALRM, "time is over"), (signal.SIGTERM, "by a signal")])
def test_a_stage_asked_to_stop_saves_its_step_and_goes_on_after_it(tmp_path: Path, number: signal.Signals, why: str) -> None:
    before = signal.getsignal(number)
    with pytest.raises(UserError, match=rf"{why}.* after step 3"):
        stage(tmp_path, 2, number)
    assert signal.getsignal(number) is before
    assert stage(tmp_path, None, number) == [3, 4, 5, 6, 7]
