"""Time one kernel on this GPU, checked first, beside its limit and every peer that is installed.

    rorqual bench sparse-attention --context 32768 --json

Prints the median time, TFLOP/s or GB/s, the share of the limit (the larger of operations over this GPU's measured matrix rate and
bytes over its measured copy rate), the memory it holds beside inputs and results, the ratio to each peer importable here and to
dense attention, and the error against a float32 reference. What is wrong is not timed: an error above the op's tolerance ends
the command.

Ops: sparse-attention, sparse-decode, sparse-decode-fp8 (the 656-byte cache), sparse-backward, masked-prefill, select, top-k,
index-loss, token-logprobs, fp8-matmul, quantize-activation, quantize-weight, write-latents, write-index-keys, experts,
grouped-matmul. Peers are used where they import: FlashMLA and DeepGEMM (inside vllm), fast_topk (sgl_kernel).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from rorqual.bench import attention, caches, indexing, products
from rorqual.bench.timing import Case, ceilings, check, compare, describe, held_bytes, median_seconds
from rorqual.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=sorted(CASES), help="the kernel")
    parser.add_argument("--queries", type=int, default=4096, help="query rows, at the end of the context (prefill and training)")
    parser.add_argument("--context", type=int, default=32768, help="keys")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="sequences (decode)")
    parser.add_argument("--out-dim", type=int, default=7168, help="columns of the product (fp8-matmul, quantize-weight)")
    parser.add_argument("--in-dim", type=int, default=16384, help="terms of the product; with --out-dim 7168 the layer wo")
    parser.add_argument("--experts", type=int, default=64, help="routed experts, 8 of them a token (experts, grouped-matmul)")
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
    seconds = median_seconds(case.ours, args.repeats) / case.calls
    limit = max(case.flops / (rate * (2 if case.fp8 else 1)), case.bytes / bandwidth)
    figures: dict[str, Any] = {
        "op": op,
        "queries": args.queries, "context": args.context, "heads": args.heads, "topk": args.topk, "batch": args.batch,
        "out_dim": args.out_dim, "in_dim": args.in_dim, "experts": args.experts,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "ms": seconds * 1e3, "tflops": case.flops / seconds / 1e12, "gb_per_s": case.bytes / seconds / 1e9,
        "limit_ms": limit * 1e3, "share_of_limit": limit / seconds, "error": error, "tolerance": case.tolerance,
        "matrix_tflops": rate / 1e12, "copy_tb_per_s": bandwidth / 1e12, "held_gib": held_bytes(case.ours) / 2**30,
        "peers": {name: compare(peer, seconds, args.repeats) for name, peer in case.peers.items()}, "absent": case.absent,
    }  # fmt: skip
    return figures


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "sparse-attention": attention.sparse_attention_case,
    "sparse-decode": attention.sparse_decode_case,
    "sparse-decode-fp8": attention.sparse_decode_fp8_case,
    "sparse-backward": attention.sparse_backward_case,
    "masked-prefill": attention.masked_prefill_case,
    "select": indexing.select_case,
    "top-k": indexing.top_k_case,
    "index-loss": indexing.index_loss_case,
    "token-logprobs": products.token_logprobs_case,
    "fp8-matmul": products.fp8_matmul_case,
    "quantize-activation": products.quantize_activation_case,
    "quantize-weight": products.quantize_weight_case,
    "write-latents": caches.write_latents_case,
    "write-index-keys": caches.write_index_keys_case,
    "experts": products.experts_case,
    "grouped-matmul": products.grouped_matmul_case,
}
