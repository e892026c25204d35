"""Cases of `rorqual bench`: index scores, selection and the indexer's loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from rorqual.bench.attention import dense_attention
from rorqual.bench.timing import RELEASED_SCALE, Case, bf16, peer, relative


def _index_inputs(args: argparse.Namespace) -> tuple[Any, ...]:
    import torch

    q, k = bf16(args.queries, 64, 128).to(torch.float8_e4m3fn), bf16(args.context, 128).to(torch.float8_e4m3fn)
    scale = torch.rand(args.context, device="cuda") + 0.5
    ends = torch.arange(args.context - args.queries + 1, args.context + 1, device="cuda", dtype=torch.int32)
    return q, k, scale, torch.randn(args.queries, 64, device="cuda") / 8, torch.zeros_like(ends), ends


def select_case(args: argparse.Namespace) -> Case:
    """FP8 index scores and selection together, within the bounded score buffer."""
    import torch

    from rorqual.kernels.select_tokens_triton import select_tokens

    q, k, scale, w, starts, ends = _index_inputs(args)
    ours = lambda: select_tokens(q, k, w, args.topk, k_scale=scale)  # noqa: E731
    absent: dict[str, str] = {}
    logits = peer("vllm.third_party.deep_gemm", "fp8_mqa_logits", absent)
    topk = peer("sgl_kernel.top_k", "fast_topk_v2", absent)
    peers = {}
    if logits and topk and args.topk == 2048:
        chunk = max(1, min(args.queries, (1 << 31) // (4 * args.context)))

        def both() -> None:
            for low in range(0, args.queries, chunk):
                rows = slice(low, low + chunk)
                scores = logits(q[rows], (k, scale), w[rows], starts[rows], ends[rows], clean_logits=False)
                topk(scores, ends[rows], 2048)

        peers = {"DeepGEMM and fast_topk": both}

    def error() -> float:
        """How far below the exact k-th best score, relative to the largest, the worst chosen one lies."""
        chosen, worst = cast(Any, ours())[-8:].long(), 0.0
        for row in range(-8, 0):
            exact = (torch.relu(q[row].double() @ k.double().t()) * w[row].double()[:, None]).sum(0) * scale.double()
            exact = exact[: ends[row]]
            assert len(set(chosen[row].tolist())) == args.topk, "a position was chosen twice"
            gap = exact.topk(args.topk).values[-1] - exact[chosen[row]].min()
            worst = max(worst, (gap / exact.abs().max()).item())
        return worst

    pairs = ends.sum().item()
    return Case(ours, error, 5e-4, 2 * pairs * 64 * 128, pairs * 4 * 2, peers, absent, fp8=True)


def top_k_case(args: argparse.Namespace) -> Case:
    """Selection alone, from scores in memory."""
    import torch

    from rorqual.kernels.select_tokens_triton import select_rows

    scores = torch.randn(args.queries, args.context, device="cuda")
    ends = torch.arange(args.context - args.queries + 1, args.context + 1, device="cuda", dtype=torch.int32)
    starts, out = torch.zeros_like(ends), torch.full((args.queries, args.topk), -1, device="cuda", dtype=torch.int32)

    def ours() -> None:
        select_rows(scores, args.topk, starts, ends, out, None)

    def error() -> float:
        ours()
        masked = scores[:256].masked_fill(torch.arange(args.context, device="cuda") >= ends[:256, None], -torch.inf)
        exact = masked.sort(dim=1, descending=True, stable=True).indices[:, : args.topk].sort(1).values
        return (exact != out[:256]).any(1).float().mean().item()

    absent: dict[str, str] = {}
    fast = peer("sgl_kernel.top_k", "fast_topk_v2", absent)
    peers: dict[str, Callable[[], Any]] = {"torch.topk": lambda: scores.topk(args.topk)}
    if fast and args.topk == 2048:
        peers["fast_topk"] = lambda: fast(scores, ends, 2048)
    return Case(ours, error, 0.0, 0.0, ends.sum().item() * 4, peers, absent)


def index_loss_case(args: argparse.Namespace) -> Case:
    """The dense warm-up's loss with its gradients, the main attention's log-sums given."""
    import torch

    from rorqual.kernels.index_loss import index_loss_plain
    from rorqual.kernels.index_loss_triton import dense_sums, index_loss

    T, S, H = args.queries, args.context, args.heads
    inputs = bf16(T, 64, 128), bf16(S, 128), torch.randn(T, 64, device="cuda") / 8
    leaves = [x.requires_grad_() for x in inputs]
    q, kv = bf16(T, H, 576) * 0.5, bf16(S, 576)
    starts, ends = torch.zeros(T, device="cuda").int(), torch.arange(S - T + 1, S + 1, device="cuda").int()
    lse = torch.cat([dense_sums(q[:64], kv, RELEASED_SCALE, starts[:64], ends[:64]), torch.full((T - 64, H), 9.0, device="cuda")])

    def both(form: Any, rows: slice, **options: Any) -> Any:
        some = [leaves[0][rows], leaves[1], leaves[2][rows]]
        loss = form(*some, q[rows], kv, RELEASED_SCALE, starts[rows], ends[rows], **options)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    def error() -> float:
        few = slice(0, 64)
        found, wanted = both(index_loss, few, lse=lse[few]), both(index_loss_plain, few)
        return max(relative(a, b) for a, b in zip(found, wanted, strict=True))

    pairs = ends.sum().item()
    flops = 2.0 * pairs * (2 * H * 576 + 64 * 128 * 6)
    return Case(
        lambda: both(index_loss, slice(0, T), lse=lse), error, 2e-2, flops, pairs * 4 * 10,
        {"dense forward (cuDNN SDPA)": dense_attention(args)},
    )  # fmt: skip
