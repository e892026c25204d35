"""A row's bits do not depend on the rows beside it, nor on the columns, the layout or the threads."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels.linear import invariant_linear, row_product

ROWS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 18, 23, 31, 33, 48, 63, 65, 100, 128, 129, 255, 257, 511, 1000)
WIDTHS = (16, 24, 64, 96, 128, 160, 192, 256, 320, 512, 576, 1536)


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("columns", (1, 8, 16, 17, 100, 512, 2048))
def test_rows_are_bitwise_the_same_in_any_batch(threads, columns: int, generator) -> None:
    for width in WIDTHS:
        x = torch.randn(max(ROWS), width, generator=generator)
        weight = torch.randn(columns, width, generator=generator)
        whole = invariant_linear(x, weight)
        for rows in ROWS:
            low = (max(ROWS) - rows) // 2
            assert torch.equal(invariant_linear(x[low : low + rows], weight), whole[low : low + rows]), (width, rows)


def test_columns_are_bitwise_the_same_in_any_tile(threads, generator) -> None:
    """What lets one product span several key tiles."""
    for width in WIDTHS:
        x = torch.randn(33, width, generator=generator)
        weight = torch.randn(1024, width, generator=generator)
        whole = row_product(x, weight)
        for columns in (1, 3, 16, 17, 64, 100, 256, 513):
            for low in (0, 1024 - columns):
                assert torch.equal(row_product(x, weight[low : low + columns]), whole[:, low : low + columns]), (width, columns)


def test_layout_changes_no_bit(generator) -> None:
    for width in WIDTHS:
        x = torch.randn(40, width, generator=generator)
        weight = torch.randn(48, width, generator=generator)
        whole = row_product(x, weight)
        assert torch.equal(row_product(x.t().contiguous().t(), weight), whole)
        assert torch.equal(row_product(x, weight.t().contiguous().t()), whole)


@pytest.mark.parametrize("shape", ((5,), (3, 4, 5), (1, 5), (0, 5)))
def test_result_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], generator) -> None:
    x = torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = torch.einsum("...d,md->...m", x, weight) + bias
    torch.testing.assert_close(invariant_linear(x, weight, bias), expected, rtol=1e-13, atol=1e-13)
    if x.numel():
        assert torch.autograd.gradcheck(invariant_linear, (x, weight, bias))
