"""The plan for the released model: its parameters, its parts against figures worked out by hand, and the paper's curve."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rorqual.errors import UserError
from rorqual.stages.recipe import load_recipe
from rorqual.train.plan import ClusterConfig, PlanConfig, StagePlan, plan


@pytest.fixture(scope="module")
def paper() -> dict:
    recipe = load_recipe("paper")
    return plan(recipe.model, recipe.plan)


def test_the_stages_have_the_papers_token_counts(paper):
    tokens = {stage["name"]: stage["tokens"] for stage in paper["stages"]}
    assert tokens["warm_indexer"] == 1000 * 16 * 131072 and tokens["train_sparse"] == 15000 * 480 * 131072
    assert tokens["extend"] == pytest.approx(209e9, rel=0.01)


def test_time_is_flops_over_peak_and_efficiency():
    recipe, cluster = load_recipe("paper"), ClusterConfig(devices=256, matmul_efficiency=0.5)
    found = plan(recipe.model, PlanConfig(cluster, (StagePlan("x", 1, 256, 4096, "dense"),)))["stages"][0]
    # 36.63B activated without the embedding, less what is no matrix product; 2 FLOPs, 4 passes.
    by_hand = 256 * 4096 * 2 * 36.63e9 * 4 / (256 * 989e12 * 0.5)
    assert found["step_seconds"]["weights"] == pytest.approx(by_hand, rel=0.002)
    pairs = 61 * 2049 * 128 * 2 * (192 + 128)
    assert found["step_seconds"]["attention"] == pytest.approx(256 * 4096 * pairs * 4.5 / (256 * 989e12 * 0.6), rel=1e-9)
    assert found["memory_gib"]["weights, gradients, optimiser"] * 2**30 == pytest.approx(16 * 683.5e9 / 256, rel=1e-3)


def test_costs_cross_over_and_slope_as_the_papers_figure_does(paper):
    """Figure 3 read off: prefill's slope is 6.7 times steeper when dense; it crosses over near 10K."""
    rows = {row["position"]: row for row in paper["cost_by_position"]}
    assert rows[2048]["dense"] < rows[2048]["sparse"] and rows[131071]["dense"] > 2 * rows[131071]["sparse"]
    dense, sparse = (rows[131071][name] - rows[32768][name] for name in ("dense", "sparse"))
    assert 3 < dense / sparse < 9


def test_layouts_that_do_not_divide_are_refused():
    model = load_recipe("paper").model
    for stage in (StagePlan("x", 1, 1, 8, context=7), StagePlan("x", 1, 1, 8, expert=512)):
        with pytest.raises(UserError, match="plan: stage x"):
            plan(model, PlanConfig(ClusterConfig(devices=2048), (stage,)))


def test_planning_allocates_nothing():
    code = (
        "import resource, sys; from rorqual.cli import main; main(['run', 'paper', '--plan', '--json']);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["stages"]) == 3
    assert int(result.stderr.split()[-1]) < 3 << 20, "more than 3 GiB"
