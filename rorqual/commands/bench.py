"""Time one kernel on this GPU, checked first, beside its limit and every peer that is installed.

    rorqual bench sparse-attention --context 32768 --json

Prints the median time, TFLOP/s or GB/s, the share of the limit (the larger of operations over this GPU's measured matrix rate and
bytes over its measured copy rate), the ratio to each peer importable here and to dense attention, and the error against a
float32 reference. What is wrong is not timed: an error above the op's tolerance ends the command.

Ops: sparse-attention, sparse-decode, sparse-backward, select, top-k, index-loss, token-logprobs. Peers are used where they
import: FlashMLA and DeepGEMM (inside vllm), fast_topk (sgl_kernel).
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=sorted(CASES), help="the kernel")
    parser.add_argument("--queries", type=int, default=4096, help="query rows, at the end of the context (prefill and training)")
    parser.add_argument("--context", type=int, default=32768, help="keys")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="sequences (decode)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench: needs a CUDA GPU that PyTorch can use; `rorqual doctor` says what is missing")
    figures = measure(args.op, args)
    print(json.dumps(figures) if args.json else describe(figures))
    return 0


def measure(op: str, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time, one op. Raises UserError where the result is wrong."""
    import torch

    torch.manual_seed(0)
    case = CASES[op](args)
    error = check(op, case)
    rate, bandwidth = ceilings()
    seconds = median_seconds(case.ours, args.repeats)
    limit = max(case.flops / (rate * (2 if case.fp8 else 1)), case.bytes / bandwidth)
    figures: dict[str, Any] = {
        "op": op,
        "queries": args.queries, "context": args.context, "heads": args.heads, "topk": args.topk, "batch": args.batch,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "ms": seconds * 1e3, "tflops": case.flops / seconds / 1e12, "gb_per_s": case.bytes / seconds / 1e9,
        "limit_ms": limit * 1e3, "share_of_limit": limit / seconds, "error": error, "tolerance": case.tolerance,
        "matrix_tflops": rate / 1e12, "copy_tb_per_s": bandwidth / 1e12,
        "peers": {name: compare(peer, seconds, args.repeats) for name, peer in case.peers.items()}, "absent": case.absent,
    }  # fmt: skip
    return figures


def check(op: str, case: Case) -> float:
    """The error of a case; UserError if it is above the tolerance or no number."""
    error = float(case.error())
    if not error <= case.tolerance:
        raise UserError(
            f"bench {op}: not timed, for its result is wrong: error {error:.3g}, at most {case.tolerance:.3g} expected"
        )
    return error


def compare(peer: Callable[[], Any], ours_s: float, repeats: int) -> dict[str, Any]:
    """A peer's time and how many times faster ours is; a peer that fails says why."""
    try:
        seconds = median_seconds(peer, repeats)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    return {"ms": seconds * 1e3, "ratio": seconds / ours_s}


def describe(figures: dict[str, Any]) -> str:
    """The figures as lines for a reader."""
    lines = [
        f"{figures['op']} on {figures['device']}: {figures['ms']:.3f} ms, {figures['tflops']:.0f} TFLOP/s, "
        f"{figures['gb_per_s']:.0f} GB/s, {figures['share_of_limit']:.0%} of the limit ({figures['limit_ms']:.3f} ms)",
        f"  error {figures['error']:.2g} (at most {figures['tolerance']:.2g})",
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


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a replayed graph, as an engine runs decode: the launches then cost nothing on the host."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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


def attention_reference(q: Any, kv: Any, indices: Any, scale: float) -> Any:
    """Sparse attention of a few rows in float64, the value dimension 512."""
    rows = kv[indices.long()].double()
    return ((q.double() @ rows.transpose(1, 2)) * scale).softmax(-1) @ rows[..., :512]


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
    return Case(ours, error, 8e-3, flops, 2 * T * H * (2 * 576 + 512) * 2 + args.context * 576 * 6)


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


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "sparse-attention": sparse_attention_case,
    "sparse-decode": sparse_decode_case,
    "sparse-backward": sparse_backward_case,
    "select": select_case,
    "top-k": top_k_case,
    "index-loss": index_loss_case,
    "token-logprobs": token_logprobs_case,
}
