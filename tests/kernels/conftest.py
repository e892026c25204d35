"""Every kernel test runs with NaN in all memory that is not written: a result that reads it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # e4m3's NaN
            return tensor
        if tensor.dtype.is_floating_point:
            return tensor.fill_(torch.nan)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return filled


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251201)
