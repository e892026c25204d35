"""The laboratory: injections do what they say and nothing else, replays take them back, cells are resumed, the table is fair."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams
from rorqual.rollout.trajectory import End, Trajectory, Turn, samples
from rorqual.stages import mismatch_lab as lab
from rorqual.stages.injections import ForwardSampler, Strengths, disagree, rounded
from rorqual.stages.sorting import SHAPE, SortingConfig, draw_prompts, taught, verdict
from rorqual.train.samples import Item, ReplayConfig, sample_batch, score

TINY = lab.Config(
    seeds=2, steps=2, prompts=2, group=4, measured=8, injections=("none", "routing"), task=SortingConfig(digits=3, lessons=4),
    strengths=Strengths(staleness=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    return taught(SHAPE, SortingConfig(digits=3, lessons=10), 0)


def gap(model, injected, replay=None, **strengths) -> float:
    """The largest |log ratio| between the trainer and a sampler with an injection."""
    sampler = ForwardSampler.of(model)
    disagree(sampler.model, injected, Strengths(**strengths), (1,))
    top_p = 0.6 if "truncation" in injected else 1.0
    done = sampler.complete(draw_prompts(6, 3, (2,)), SamplingParams(max_tokens=3, top_p=top_p), range(6))
    items = [Item(samples(Trajectory("t", i, (Turn({}, c),), End.ANSWERED))[0], 1.0, i) for i, c in enumerate(done)]
    batch = sample_batch(items, torch.device("cpu"), replay)
    with torch.no_grad():
        scored = score(model, batch)
    return float((scored.logprobs - batch.sampler_logprobs)[batch.mask].abs().max())


ANEW = ReplayConfig(routing=False, selection=False, kept_tokens=False)


def test_without_an_injection_sampler_and_trainer_agree_to_1e_5(model):
    assert gap(model, (), ANEW) < 1e-5 and gap(model, ()) < 1e-5


@pytest.mark.parametrize("injection", ["routing", "selection", "truncation"])
def test_each_injection_is_seen_and_its_replay_takes_it_back(model, injection):
    """Noise on biases and indexers changes decisions alone, and truncation the kept set alone: replayed, nothing is left."""
    assert gap(model, (injection,), ANEW, routing=1.0, selection=2.0) > 1e-2
    assert gap(model, (injection,), routing=1.0, selection=2.0) < 1e-5


def test_low_precision_is_no_decision_and_no_replay_takes_it_back(model):
    assert gap(model, ("precision",), precision=2) > 1e-2


def test_rounding_keeps_so_many_bits_to_nearest():
    x = torch.tensor([1.0, 1.24, 1.26, -3.1, 0.0, 1e-20, 6.9])
    assert rounded(x, 1).tolist() == pytest.approx([1.0, 1.0, 1.5, -3.0, 0.0, rounded(x, 1)[5].item(), 6.0])
    assert torch.equal(rounded(x, 23), x)
    e4m3 = torch.linspace(-3, 3, 1001)
    assert torch.equal(rounded(e4m3[e4m3.abs() > 0.02], 3), e4m3[e4m3.abs() > 0.02].to(torch.float8_e4m3fn).float())


def test_a_verdict_is_of_the_whole_answer():
    assert (
        verdict([10, 3, 1, 2, 11], [1, 2, 3]) == 1
        and verdict([10, 3, 1, 2, 11], [1, 2]) == verdict([10, 3, 1, 2, 11], [3, 1, 2]) == 0
    )


def test_arms_switch_exactly_their_stabiliser():
    plain = lab.policy_of(TINY, lab.Cell("all", "plain", 0))
    assert plain.kl == "k3" and plain.default.off_policy_delta is None and plain.replay == ANEW
    for arm, change in {
        "unbiased_kl": dict(kl="unbiased"),
        "sequence_mask": dict(default=replace(plain.default, off_policy_delta=TINY.delta)),
        "keep_routing": dict(replay=replace(ANEW, routing=True)),
        "keep_sampling_mask": dict(replay=replace(ANEW, kept_tokens=True)),
        "keep_selection": dict(replay=replace(ANEW, selection=True)),
    }.items():
        assert lab.policy_of(TINY, lab.Cell("all", arm, 0)) == replace(plain, **change)
    whole = lab.policy_of(TINY, lab.Cell("all", "all", 0))
    assert whole.kl == "unbiased" and whole.default.off_policy_delta == TINY.delta and whole.replay == ReplayConfig()


def test_a_run_ends_with_table_and_page_and_a_second_one_computes_only_what_is_missing(tmp_path):
    table = lab.main(TINY, tmp_path, quiet=True)
    cells = sorted((tmp_path / "cells").iterdir())
    assert len(cells) == 2 * len(TINY.cells) == 10
    page = (tmp_path / "mismatch.html").read_text(encoding="utf-8")
    assert "plotly" in page and "http://" not in page.split("</script>")[-1] and "keep routing" in page
    first = cells[0].read_text()
    kept = {path: path.stat().st_mtime_ns for path in cells[1:]}
    cells[0].unlink()
    again = lab.main(TINY, tmp_path, quiet=True)
    assert cells[0].read_text() == first, "a cell is a function of its settings"
    assert again == table and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(UserError, match="another configuration"):
        lab.main(replace(TINY, steps=3), tmp_path, quiet=True)


def test_a_budget_ends_a_run_early_with_a_table_of_what_is_there(tmp_path):
    assert lab.main(replace(TINY, budget_s=0.0, injections=("none",)), tmp_path, quiet=True)["rows"] == []
    lab.main(replace(TINY, injections=("none",)), tmp_path, quiet=True)
    rows = lab.main(replace(TINY, budget_s=0.0, seeds=3), tmp_path, quiet=True)["rows"]
    assert [(row["injection"], row["arm"], row["seeds"]) for row in rows] == [("none", "plain", 2), ("none", "all", 2)]


def fake(success):
    curves = {name: [0.0, success / 2] for name in lab.CURVES}
    return {"success": success, "start": 0.3, "curves": curves, "disagreement": {"mean": 0.0}}


def test_the_table_says_no_more_than_its_intervals_allow():
    config = replace(TINY, seeds=3)
    values = {
        ("none", "plain"): (0.7, 0.8, 0.75), ("none", "all"): (0.7, 0.81, 0.74), ("routing", "plain"): (0.4, 0.5, 0.46),
        ("routing", "keep_routing"): (0.65, 0.74, 0.72), ("routing", "all"): (0.9, 0.1, 0.5),
    }  # fmt: skip
    found = {lab.Cell(*cell, seed).name: fake(value) for cell, seeds in values.items() for seed, value in enumerate(seeds)}
    rows = lab.tabulate(config, found)
    says = {(row["injection"], row["arm"]): row["clean"].get("says", "") for row in rows}
    assert rows[0]["sampled"]["success"]["mean"] == pytest.approx(0.75 / 4), "the mean of the last batches"
    assert says == {
        ("none", "plain"): "", ("none", "all"): "no effect shown", ("routing", "plain"): "breaks",
        ("routing", "keep_routing"): "helps", ("routing", "all"): "no effect shown",
    }  # fmt: skip
    assert json.dumps(lab.tabulate(config, found))


def test_the_interval_is_students():
    found = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3 and found["high"] - 3 == pytest.approx(2.776 * np.sqrt(2.5 / 5))


def test_cells_side_by_side_are_the_cells_in_turn(tmp_path):
    config = replace(TINY, injections=("none",), measured=4)
    in_turn = lab.main(config, tmp_path / "in turn", quiet=True)
    side_by_side = lab.main(replace(config, side_by_side=2), tmp_path / "side by side", quiet=True)
    assert side_by_side["rows"] == in_turn["rows"] and side_by_side["curves"] == in_turn["curves"]
    assert not list((tmp_path / "side by side" / "taught").glob("*.part"))
