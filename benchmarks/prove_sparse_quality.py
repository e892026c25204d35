"""A tiny model, trained for real on CPU cores, keeps its quality when attention becomes sparse.

Against a control that goes on with dense attention for the same tokens: held-out loss within 1 %; in each layer the selection
captures at least 95 % of the attention mass that the true top-k would; needle retrieval with top-k at a quarter of the length
within 2 points of the control, which itself must reach 80 % (else the comparison is void, and this fails saying so); and
untrained indexers retrieve at most half of what trained ones do.

Small steps gain little from several threads, so as many processes as the machine has cores (a power of two, at most 16) share
each batch. Stages resume, so a second call goes on where a killed one stopped (RORQUAL_PROOF_DIR names the directory; default a
fresh one).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rorqual.config import RECIPES, load
from rorqual.data.store import TokenStore
from rorqual.parallel.world import ParallelConfig, start, stop
from rorqual.runlog import RunLog
from rorqual.stages import adapt, prepare, pretrain
from rorqual.stages.recipe import Recipe
from rorqual.train.loop import Place

SECONDS, QUICK_SECONDS = 3000, 90
RECIPE = RECIPES / "quality.toml"
SHORT = ["--pretrain.pace.steps=4"]
SHORT_ADAPT = ["--warm_indexer.pace.steps=3", "--train_sparse.pace.steps=3", "--quality.needles.count=4"]


def main(quick: bool) -> dict[str, Any]:
    directory = Path(os.environ.get("RORQUAL_PROOF_DIR") or tempfile.mkdtemp())
    processes = 1 << (min(os.cpu_count() or 1, 16).bit_length() - 1)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr=127.0.0.1"]
    arguments = ["-m", "benchmarks.prove_sparse_quality", str(directory), *(["quick"] if quick else [])]
    command = [sys.executable, *launcher, "--master-port", str(_free_port()), *arguments]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    report = json.loads((directory / "work" / adapt.REPORT).read_text(encoding="utf-8"))
    print(json.dumps(report["verdict"]), flush=True)
    if not quick:
        failed = {name: claim for name, claim in report["verdict"]["claims"].items() if claim["holds"] is not True}
        assert not failed, f"does not hold, or is void: {failed}"
    return {"processes": processes, **report}


def train(directory: Path, quick: bool) -> None:
    """One of the processes: dense pre-training, then everything that `rorqual adapt` does."""
    world = start(ParallelConfig(), "cpu")
    recipe = load(Recipe, RECIPE, SHORT if quick else [])
    settings = load(adapt.Config, RECIPES / "quality-adapt.toml", SHORT_ADAPT if quick else [])
    assert recipe.pretrain is not None
    if world.is_main:
        prepare.main(recipe.prepare, directory / "data", RunLog(directory))
    world.barrier()
    store = TokenStore(directory / "data")
    init = pretrain.main(recipe.pretrain, recipe.model, Place.open(directory / "dense", store, world, not world.is_main))
    adapt.main(settings, init, directory / "sparse", directory / "work", world, not world.is_main)
    stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2:] == ["quick"])
