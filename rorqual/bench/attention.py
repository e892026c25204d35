"""Cases of `rorqual bench`: attention over selected keys, forward and backward, prefill and decode."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rorqual.bench.timing import RELEASED_SCALE, Case, bf16, peer, random_indices, relative, replayed


def sparse_attention_case(args: argparse.Namespace) -> Case:
    return _attention(args, args.queries, args.context, graph=False)


def sparse_decode_case(args: argparse.Namespace) -> Case:
    """One query of each of `batch` sequences over its own cache of `context` entries, physical slots as indices."""
    return _attention(args, args.batch, args.batch * args.context, graph=True)


def _attention(args: argparse.Namespace, T: int, S: int, graph: bool) -> Case:
    import torch

    from rorqual.kernels.sparse_attention_triton import attend

    q, kv = bf16(T, args.heads, 576), bf16(S, 576)
    indices = random_indices(T, args.topk, args.context)
    if graph:
        indices += (torch.arange(T, device="cuda") * args.context).int()[:, None]
    ours = lambda: attend(q, kv, indices, RELEASED_SCALE, 512)  # noqa: E731
    absent: dict[str, str] = {}
    flash = peer("vllm.third_party.flashmla.flash_mla_interface", "flash_mla_sparse_fwd", absent)
    peers = {"FlashMLA": lambda: flash(q, kv[:, None], indices[:, None], RELEASED_SCALE, 512)} if flash else {}
    if not graph:
        peers |= {"dense (cuDNN SDPA)": dense_attention(args)}
    wrap = replayed if graph else (lambda call: call)
    return Case(
        ours=wrap(ours),
        error=lambda: relative(ours()[0][:8], attention_reference(q[:8], kv, indices[:8], RELEASED_SCALE)),
        tolerance=5e-3,
        flops=2 * T * args.heads * args.topk * (576 + 512),
        bytes=T * args.heads * (576 + 512) * 2 + min(S, T * args.topk) * 1152,
        peers={name: wrap(call) for name, call in peers.items()},
        absent=absent,
    )


def sparse_decode_fp8_case(args: argparse.Namespace) -> Case:
    """As sparse-decode, over the paged FP8 cache; the bf16 form of the same entries stands among the peers."""
    import torch

    from rorqual.kernels.fp8 import pack_latent, unpack_latent
    from rorqual.kernels.sparse_attention_triton import attend

    B, S = args.batch, args.batch * args.context
    cache = pack_latent(bf16(S, 512), bf16(S, 64))
    kv = torch.cat(unpack_latent(cache, 512, torch.bfloat16), -1)
    q, indices = bf16(B, args.heads, 576), random_indices(B, args.topk, args.context)
    indices += (torch.arange(B, device="cuda") * args.context).int()[:, None]
    ours = lambda: attend(q, cache, indices, RELEASED_SCALE, 512)  # noqa: E731
    absent: dict[str, str] = {}
    peers = {"bf16 cache": lambda: attend(q, kv, indices, RELEASED_SCALE, 512)}
    flash = peer("vllm.third_party.flashmla.flash_mla_interface", "flash_mla_with_kvcache", absent)
    scheduler = peer("vllm.third_party.flashmla.flash_mla_interface", "get_mla_metadata", absent)
    if flash and scheduler:
        schedule = scheduler()[0]
        paged, options = cache.view(-1, 64, 1, 656), {"softmax_scale": RELEASED_SCALE, "is_fp8_kvcache": True}
        peers["FlashMLA"] = lambda: flash(q[:, None], paged, None, None, 512, schedule, indices=indices[:, None], **options)
    return Case(
        ours=replayed(ours),
        error=lambda: relative(ours()[0][:8], attention_reference(q[:8], kv, indices[:8], RELEASED_SCALE)),
        tolerance=5e-3,
        flops=2 * B * args.heads * args.topk * (576 + 512),
        bytes=B * args.heads * (576 + 512) * 2 + B * args.topk * 656,
        peers={name: replayed(call) for name, call in peers.items()},
        absent=absent,
    )


def masked_prefill_case(args: argparse.Namespace) -> Case:
    """A whole prompt of --context tokens, sparse by a mask over expanded heads (192/128), each row with its top-k keys."""
    import torch

    from rorqual.kernels.dense_attention_triton import cudnn_causal_attention, masked_attention
    from rorqual.kernels.sparse_attention_triton import attend

    S, H = args.context, args.heads
    q, k, v, indices = bf16(S, H, 192), bf16(S, H, 192), bf16(S, H, 128), causal_indices(S, args.topk)
    absorbed, kv = bf16(S, H, 576), bf16(S, 576)
    ours = lambda: masked_attention(q, k, v, RELEASED_SCALE, indices)  # noqa: E731

    def error() -> float:
        rows = torch.tensor([0, 1, S // 2, S - 1], device="cuda")
        seen = torch.zeros(4, S + 1, dtype=torch.bool, device="cuda")
        seen.scatter_(1, torch.where(indices[rows] < 0, S, indices[rows]).long(), True)
        scores = torch.einsum("thd,shd->ths", q[rows].double(), k.double()) * RELEASED_SCALE
        weights = scores.masked_fill_(~seen[:, None, :S], -torch.inf).softmax(-1)
        return relative(ours()[rows], torch.einsum("ths,shd->thd", weights, v.double()))

    pairs = S * (S + 1) / 2
    peers = {
        "sparse attention": lambda: attend(absorbed, kv, indices, RELEASED_SCALE, 512),
        "dense (cuDNN SDPA)": lambda: cudnn_causal_attention(q, k, v, RELEASED_SCALE),
    }
    return Case(ours, error, 5e-3, 2 * pairs * H * 320, S * H * (192 + 192 + 128 + 128) * 2 + S * S / 4, peers)


def causal_indices(S: int, topk: int) -> Any:
    """[S, topk]: topk random ones of the keys up to each row's own, all of them in the first rows (-1 beyond)."""
    import torch

    rows = []
    for first in range(0, S, 512):
        at = torch.arange(first, min(first + 512, S), device="cuda")
        drawn = torch.rand(len(at), S, device="cuda").masked_fill_(torch.arange(S, device="cuda") > at[:, None], -1)
        best = drawn.topk(min(topk, S), dim=1)
        rows.append(torch.where(best.values < 0, -1, best.indices).int())
    return torch.cat(rows)


def attention_reference(q: Any, kv: Any, indices: Any, scale: float) -> Any:
    """Sparse attention of a few rows in float64, the value dimension 512."""
    rows = kv[indices.long()].double()
    return ((q.double() @ rows.transpose(1, 2)) * scale).softmax(-1) @ rows[..., :512]


def dense_attention(args: argparse.Namespace) -> Callable[[], Any]:
    """Causal attention of the same queries over all keys in the expanded form (192/128), by torch's cuDNN back end."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (
        bf16(1, args.heads, args.queries, 192),
        bf16(1, args.heads, args.context, 192),
        bf16(1, args.heads, args.context, 128),
    )
    mask: Any = causal_lower_right(args.queries, args.context)

    def call() -> Any:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return call


def sparse_backward_case(args: argparse.Namespace) -> Case:
    from rorqual.kernels.sparse_attention_triton import attend, attend_backward

    T, H = args.queries, args.heads
    q, kv, grad = bf16(T, H, 576), bf16(args.context, 576), bf16(T, H, 512)
    indices = random_indices(T, args.topk, args.context)
    out, lse = attend(q, kv, indices, RELEASED_SCALE, 512)
    ours = lambda: attend_backward(q, kv, indices, RELEASED_SCALE, out, lse, grad, None)  # noqa: E731

    def error() -> float:
        import torch

        few = slice(0, 16)
        leaves = [q[few].double().requires_grad_(), kv.double().requires_grad_()]
        wanted = torch.autograd.grad(
            attention_reference(leaves[0], leaves[1], indices[few], RELEASED_SCALE), leaves, grad[few].double()
        )
        found = attend_backward(q[few], kv, indices[few], RELEASED_SCALE, out[few], lse[few], grad[few], None)
        again = ours()
        assert all(map(torch.equal, ours(), again)), "two runs differ"
        return max(relative(a, b) for a, b in zip(found, wanted, strict=True))

    flops = 2 * T * H * args.topk * (3 * 576 + 2 * 512)
    peers = {"atomic sums": lambda: attend_backward(q, kv, indices, RELEASED_SCALE, out, lse, grad, None, atomic=True)}
    return Case(ours, error, 8e-3, flops, 2 * T * H * (2 * 576 + 512) * 2 + args.context * 576 * 6, peers)
