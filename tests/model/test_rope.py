"""RoPE and YaRN have the released model's published numbers, and the two layouts are what they are called."""

from __future__ import annotations

import math

import pytest
import torch

from rorqual.model import ModelConfig
from rorqual.model.rope import frequencies, rotate_half_split, rotate_interleaved, rotation, softmax_scale

RELEASED = ModelConfig()


def test_the_released_softmax_scale() -> None:
    assert softmax_scale(RELEASED) == pytest.approx(0.13523377888, rel=1e-9)
    assert softmax_scale(ModelConfig(yarn=None)) == 192**-0.5


def test_the_released_frequencies_are_kept_up_to_dim_10_and_divided_by_40_from_dim_23_on() -> None:
    ratio = frequencies(RELEASED) / frequencies(ModelConfig(yarn=None))
    expected = [1 - min(max((i - 10) / 13, 0), 1) * (1 - 1 / 40) for i in range(32)]
    torch.testing.assert_close(ratio, torch.tensor(expected), rtol=1e-5, atol=0)
    assert ratio[10] == 1 and ratio[11] < 1


def test_positions_far_out_turn_by_their_float32_angles() -> None:
    turned = rotation(torch.tensor([0, 1, 163839]), RELEASED)
    assert turned.cos[0].eq(1).all() and turned.sin[0].eq(0).all()
    assert turned.cos[2, 0].item() == pytest.approx(math.cos(163839), abs=1e-6)


@pytest.mark.parametrize(("rotate", "first", "second"), [(rotate_interleaved, 0, 1), (rotate_half_split, 0, 32)])
def test_each_layout_turns_its_own_pairs(rotate, first: int, second: int) -> None:
    turned = rotate(torch.eye(64)[[first]], rotation(torch.tensor([1]), RELEASED))[0]
    assert turned.nonzero()[:, 0].tolist() == [first, second]
    assert turned[[first, second]].tolist() == pytest.approx([math.cos(1), math.sin(1)])


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_scores_depend_on_distance_alone_and_lengths_are_kept(rotate) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 64, generator=generator)
    score = [
        (rotate(q, rotation(torch.tensor([p + 7]), RELEASED)) @ rotate(k, rotation(torch.tensor([p]), RELEASED)).T).item()
        for p in (0, 5, 900)
    ]
    assert score == pytest.approx([score[0]] * 3, rel=1e-3)
    assert rotate(q, rotation(torch.tensor([77]), RELEASED)).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_heads_of_a_row_turn_alike() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    turned = rotation(torch.tensor([4, 0, 9]), RELEASED)
    for rotate in (rotate_interleaved, rotate_half_split):
        assert torch.equal(rotate(x, turned)[:, 2], rotate(x[:, 2], turned))
