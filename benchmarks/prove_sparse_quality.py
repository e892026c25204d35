"""A tiny model, trained for real on two CPU cores, keeps its quality when attention becomes sparse.

Against a control that goes on with dense attention for the same tokens: held-out loss within 1 %; in each layer the selection
captures at least 95 % of the attention mass that the true top-k would; needle retrieval with top-k at a quarter of the length
within 2 points of the control, which itself must reach 80 % (else the comparison is void, and this fails saying so); and
untrained indexers retrieve at most half of what trained ones do.

Stages resume, so a second call goes on where a killed one stopped (RORQUAL_PROOF_DIR names the directory; default a fresh one).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rorqual.config import RECIPES, load
from rorqual.parallel.world import ParallelConfig, start
from rorqual.runlog import RunLog
from rorqual.stages import adapt, prepare, pretrain
from rorqual.stages.recipe import Recipe
from rorqual.train.loop import Place

SECONDS, QUICK_SECONDS = 1200, 90
RECIPE = RECIPES / "quality.toml"
SHORT = ["--pretrain.pace.steps=20"]
SHORT_ADAPT = ["--warm_indexer.pace.steps=5", "--train_sparse.pace.steps=5", "--quality.needles.count=4"]


def main(quick: bool) -> dict[str, Any]:
    directory = Path(os.environ.get("RORQUAL_PROOF_DIR") or tempfile.mkdtemp())
    world = start(ParallelConfig(), "cpu")
    recipe = load(Recipe, RECIPE, SHORT if quick else [])
    settings = load(adapt.Config, RECIPES / "quality-adapt.toml", SHORT_ADAPT if quick else [])
    assert recipe.pretrain is not None
    store = prepare.main(recipe.prepare, directory / "data", RunLog(directory))
    init = pretrain.main(recipe.pretrain, recipe.model, Place.open(directory / "dense", store, world))
    report = adapt.main(settings, init, directory / "sparse", directory / "work", world)
    claims = report["verdict"]["claims"]
    if not quick:
        failed = {name: claim for name, claim in claims.items() if claim["holds"] is not True}
        assert not failed, f"does not hold, or is void: {failed}"
    return report
