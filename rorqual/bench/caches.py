"""Cases of `rorqual bench`: the cache writers."""

from __future__ import annotations

import argparse
from typing import Any

from rorqual.bench.timing import Case, bf16, replayed


def write_latents_case(args: argparse.Namespace) -> Case:
    """--queries rows into the FP8 cache, in slots in random order."""
    import torch

    from rorqual.kernels.cache_writers import write_latents_plain
    from rorqual.kernels.cache_writers_triton import write_latents

    N = args.queries
    inputs = torch.randperm(2 * N, device="cuda")[:N], bf16(N, 576), bf16(512), 1e-6, *_angles(N)
    return _writer_case((2 * N, 656), inputs, write_latents, write_latents_plain, N * (1152 + 656 + 256))


def write_index_keys_case(args: argparse.Namespace) -> Case:
    """--queries rows into the FP8 index-key cache of pages of 64, in slots in random order."""
    import torch

    from rorqual.kernels.cache_writers import write_index_keys_plain
    from rorqual.kernels.cache_writers_triton import write_index_keys

    N = args.queries
    inputs = torch.randperm(2 * N, device="cuda")[:N], bf16(N, 128), bf16(128), bf16(128), 1e-6, *_angles(N)
    return _writer_case((-(-2 * N // 64), 64, 132), inputs, write_index_keys, write_index_keys_plain, N * (256 + 132 + 256))


def _angles(N: int) -> tuple[Any, Any]:
    import torch

    turns = torch.rand(N, 32, device="cuda") * 6.28
    return turns.cos(), turns.sin()


def _writer_case(shape: tuple[int, ...], inputs: tuple[Any, ...], ours: Any, plain: Any, bytes_moved: int) -> Case:
    """The error is the share of stored bytes that differ from the plain form's (values at a rounding's edge)."""
    import torch

    caches = [torch.zeros(shape, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def error() -> float:
        ours(caches[0], *inputs)
        plain(caches[1], *inputs)
        return (caches[0] != caches[1]).float().mean().item()

    peers = {"plain": lambda: plain(caches[1], *inputs)}
    return Case(replayed(lambda: ours(caches[0], *inputs), 20), error, 1e-3, 0.0, bytes_moved, peers, calls=20)
