"""Cases of `rorqual bench`: block FP8, experts and token log-probs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from rorqual.bench.timing import Case, bf16, relative, replayed


def token_logprobs_case(args: argparse.Namespace) -> Case:
    """16,384 tokens, width 1,024, vocabulary 129,280: log-probs with both gradients."""
    import torch

    from rorqual.kernels.token_logprobs_triton import token_logprobs

    N, D, V = 16384, 1024, 129280
    hidden, head = bf16(N, D).requires_grad_(), (bf16(V, D) * D**-0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")

    def ours() -> Any:
        return torch.autograd.grad(cast(Any, token_logprobs(hidden, head, targets)).sum(), (hidden, head))

    def naive(hidden: Any, head: Any, targets: Any) -> Any:
        return -torch.nn.functional.cross_entropy((hidden @ head.t()).float(), targets, reduction="none")

    compiled = torch.compile(naive)

    def error() -> float:
        few = slice(0, 128)
        leaves = [x[few].double().requires_grad_() if x is hidden else x.double().requires_grad_() for x in (hidden, head)]
        wanted = torch.autograd.grad(naive(leaves[0], leaves[1], targets[few]).sum(), leaves)
        part = hidden[few].detach().requires_grad_()
        found = torch.autograd.grad(cast(Any, token_logprobs(part, head, targets[few])).sum(), (part, head))
        return max(relative(a, b) for a, b in zip(found, wanted, strict=True))

    peers = {"torch.compile": lambda: torch.autograd.grad(compiled(hidden, head, targets).sum(), (hidden, head))}
    return Case(ours, error, 1e-2, 6.0 * N * D * V, (N * D + V * D) * 2 * 3, peers)


def fp8_matmul_case(args: argparse.Namespace) -> Case:
    """--queries rows times a weight [out-dim, in-dim] in the released layout, quantised beforehand, to bf16."""
    import torch

    from rorqual.kernels.fp8 import dequantize_activation, dequantize_weight
    from rorqual.kernels.fp8_triton import (
        fp8_matmul,
        library_takes,
        quantize_activation,
        quantize_weight,
        scaled_matmul,
        triton_matmul,
    )

    N, M, K = args.queries, args.out_dim, args.in_dim
    x, weight = bf16(N, K), bf16(M, K)
    (a, a_scale), (b, b_scale) = quantize_activation(x), quantize_weight(weight)
    product = lambda form: lambda: form(a, a_scale, b, b_scale, torch.bfloat16)  # noqa: E731
    peers = {"bf16 product": lambda: x @ weight.t(), "Triton": product(triton_matmul)}
    if library_takes(a, b, torch.bfloat16):
        peers["torch._scaled_mm"] = product(scaled_matmul)

    def error() -> float:
        exact = dequantize_activation(a[:64], a_scale[:64], torch.float64) @ dequantize_weight(b, b_scale, torch.float64).t()
        return relative(product(fp8_matmul)()[:64], exact)

    bytes_moved = N * K + M * K + N * M * 2
    peers = {name: replayed(call) for name, call in peers.items()}
    return Case(replayed(product(fp8_matmul)), error, 4e-3, 2.0 * N * M * K, bytes_moved, peers, fp8=True)


def quantize_activation_case(args: argparse.Namespace) -> Case:
    from rorqual.kernels.fp8 import quantize_activation_plain
    from rorqual.kernels.fp8_triton import quantize_activation

    x = bf16(args.queries, args.in_dim)
    return _quantize_case(x, lambda: quantize_activation(x), lambda: quantize_activation_plain(x))


def quantize_weight_case(args: argparse.Namespace) -> Case:
    from rorqual.kernels.fp8 import quantize_weight_plain
    from rorqual.kernels.fp8_triton import quantize_weight

    weight = bf16(args.out_dim, args.in_dim)
    return _quantize_case(weight, lambda: quantize_weight(weight), lambda: quantize_weight_plain(weight))


def _quantize_case(x: Any, ours: Callable[[], Any], plain: Callable[[], Any]) -> Case:
    """The error is the share of bytes and scales that differ from the plain form's."""

    def error() -> float:
        (values, scale), (wanted, wanted_scale) = ours(), plain()
        return (values.float() != wanted.float()).float().mean().item() + (scale != wanted_scale).float().mean().item()

    return Case(replayed(ours, 5), error, 0.0, 0.0, x.numel() * 3, {"plain": plain}, calls=5)


def _experts_inputs(args: argparse.Namespace) -> tuple[Any, ...]:
    """--queries tokens, 8 of --experts experts each, of the small released shape 1,024 x 1,024."""
    import torch

    N, E, D, F = args.queries, args.experts, 1024, 1024
    weights = bf16(E, F, D) * D**-0.5, bf16(E, D, F) * F**-0.5, bf16(E, F, D) * D**-0.5
    return bf16(N, D), *weights, torch.rand(N, E, device="cuda").topk(8).indices, torch.rand(N, 8, device="cuda")


def experts_case(args: argparse.Namespace) -> Case:
    from rorqual.kernels.experts import experts_plain
    from rorqual.kernels.experts_triton import experts

    inputs = x, w1, w2, w3, chosen, gates = _experts_inputs(args)

    def error() -> float:
        wanted = experts_plain(x[:64].double(), w1.double(), w2.double(), w3.double(), chosen[:64], gates[:64].double())
        return relative(experts(*inputs)[:64], wanted)

    rows = chosen.numel()
    bytes_moved = 2.0 * (sum(w.numel() for w in (w1, w2, w3)) + 2 * x.numel())
    peers = {"loop over experts": lambda: experts_plain(*inputs)}
    return Case(lambda: experts(*inputs), error, 1e-2, 6.0 * rows * 1024 * 1024, bytes_moved, peers)


def grouped_matmul_case(args: argparse.Namespace) -> Case:
    """One of the experts' products alone, rows sorted by expert."""
    import torch

    from rorqual.kernels.experts_triton import grouped, plan

    x, w1, _, _, chosen, _ = _experts_inputs(args)
    routed = plan(chosen, len(w1))
    rows = x[routed.order // chosen.shape[1]]
    starts = [0, *routed.ends.tolist()]

    def loop() -> Any:
        return torch.cat([rows[low:high] @ w.t() for w, low, high in zip(w1, starts, starts[1:], strict=False)])

    def error() -> float:
        return relative(grouped(rows, w1.transpose(1, 2), routed), loop())

    ours = lambda: grouped(rows, w1.transpose(1, 2), routed)  # noqa: E731
    return Case(
        ours, error, 5e-3, 2.0 * rows.numel() * w1.shape[1], 2.0 * (2 * rows.numel() + w1.numel()), {"loop of products": loop}
    )
