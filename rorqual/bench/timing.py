"""What every case of `rorqual bench` is made of: an op checked first, then timed beside its limit and its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rorqual.errors import UserError

RELEASED_SCALE = 0.13523377888
"""softmax_scale of the 671B model, YaRN included."""


@dataclass
class Case:
    """One op on one shape: what is timed, what it must agree with, and what it is compared with."""

    ours: Callable[[], Any]
    error: Callable[[], float]
    """Relative error (or for selections the share of wrong rows) of `ours` against the reference, on some of its rows."""
    tolerance: float
    flops: float
    bytes: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that cannot be used here, and why."""
    fp8: bool = False
    """Whether the operations are FP8 (the limit then counts twice the bf16 rate)."""
    calls: int = 1
    """How many times `ours` runs the op: one call of a small one would be lost in the time of a launch."""


def check(op: str, case: Case) -> float:
    """The error of a case; UserError if it is above the tolerance or no number."""
    error = float(case.error())
    if not error <= case.tolerance:
        raise UserError(
            f"bench {op}: not timed, for its result is wrong: error {error:.3g}, at most {case.tolerance:.3g} expected"
        )
    return error


def compare(peer: Callable[[], Any], ours_s: float, repeats: int) -> dict[str, Any]:
    """A peer's time, how many times faster ours is, and the memory it holds; a peer that fails says why."""
    try:
        seconds = median_seconds(peer, repeats)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    return {"ms": seconds * 1e3, "ratio": seconds / ours_s, "held_gib": held_bytes(peer) / 2**30}


def describe(figures: dict[str, Any]) -> str:
    """The figures as lines for a reader."""
    lines = [
        f"{figures['op']} on {figures['device']}: {figures['ms']:.3f} ms, {figures['tflops']:.0f} TFLOP/s, "
        f"{figures['gb_per_s']:.0f} GB/s, {figures['share_of_limit']:.0%} of the limit ({figures['limit_ms']:.3f} ms)",
        f"  error {figures['error']:.2g} (at most {figures['tolerance']:.2g}), {figures['held_gib']:.2f} GiB held meanwhile",
    ]
    for name, peer in figures["peers"].items():
        lines.append(f"  {name}: " + (peer.get("failed") or f"{peer['ms']:.3f} ms, ours is {peer['ratio']:.2f} times as fast"))
    lines += [f"  {name}: not here ({why})" for name, why in figures["absent"].items()]
    return "\n".join(lines)


def median_seconds(call: Callable[[], Any], repeats: int = 10, warmups: int = 2) -> float:
    """Median time between two events around a call. Inputs of the cases are larger than the cache, or gathered at random."""
    import torch

    for _ in range(warmups):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2] / 1e3


def held_bytes(call: Callable[[], Any]) -> int:
    """The memory that a call holds at most beside its inputs and its results; of a replayed graph, nothing."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del results
    return held


def replayed(call: Callable[[], Any], calls: int = 1) -> Callable[[], Any]:
    """The call, `calls` times, as a replayed graph, as an engine runs decode: the launches then cost nothing on the host."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def replay(_held: Callable[[], Any] = call) -> None:
        """The graph reads what `call` holds, so it must live as long."""
        graph.replay()

    return replay


_ceilings: list[tuple[float, float]] = []


def ceilings() -> tuple[float, float]:
    """This GPU's bf16 matrix rate (FLOP/s) and copy rate (bytes read and written per second), measured once."""
    import torch

    if not _ceilings:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        matrix = 2 * 8192**3 / median_seconds(lambda: a @ b)
        _ceilings.append((matrix, 2 * source.nbytes / median_seconds(lambda: target.copy_(source))))
    return _ceilings[0]


def peer(module: str, name: str, absent: dict[str, str]) -> Callable[..., Any] | None:
    """A function of an installed peer, or None and a note why not."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        absent[name] = f"{type(error).__name__}: {error}"[:200]
        return None


def bf16(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def random_indices(T: int, topk: int, S: int) -> Any:
    """Distinct positions of each row, in random order."""
    import torch

    rows = [torch.randperm(S, device="cuda")[:topk] for _ in range(min(T, 512))]
    return torch.stack(rows).repeat(-(-T // len(rows)), 1)[:T].int().contiguous()


def relative(found: Any, expected: Any) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
