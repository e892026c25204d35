"""Which form of an op runs: the plain PyTorch one is the definition, X_triton.py beside it is speed with the same signature."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch


@functools.cache
def _triton_form(op: str, file: str) -> Callable | None:
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(f"rorqual.kernels.{file}_triton") is None:
        return None
    return getattr(importlib.import_module(f"rorqual.kernels.{file}_triton"), op)


def triton_form(op: str, *tensors: torch.Tensor, file: str | None = None) -> Callable | None:
    """The function `op` of rorqual/kernels/FILE_triton.py (by default OP_triton.py) where all tensors lie on a CUDA device and
    Triton is there, else None."""
    return _triton_form(op, file or op) if all(tensor.is_cuda for tensor in tensors) else None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device: (9, 0) is Hopper."""
    return torch.cuda.get_device_capability(device)
