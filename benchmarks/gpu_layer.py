"""The attention stack of one layer of the 671B shape by position, dense against sparse: results/gpu_layer.json.

    python -m benchmarks.gpu_layer [--out FILE] [--commit ID]

Prefill: 4,096 queries that end at the position; dense is causal attention of 128 heads (192/128) by cuDNN, sparse is FP8 index
scores, selection and sparse attention. Decode: 64 sequences, one query each; dense reads the whole latent cache (FlashMLA's dense
kernel where it is installed), sparse is paged FP8 index scores, selection and sparse attention over the bf16 cache. Times are of
these kernels alone, in ms a layer; projections and experts are the same in both.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from rorqual.bench.attention import dense_attention
from rorqual.bench.timing import RELEASED_SCALE, bf16, median_seconds, peer, replayed
from rorqual.kernels.select_tokens_triton import select_cached_tokens, select_tokens
from rorqual.kernels.sparse_attention_triton import attend

POSITIONS = (4096, 8192, 16384, 32768, 65536, 131072)
DECODE_POSITIONS = (2048, 4096, 8192, 16384, 32768, 65536)
BATCH, PAGE = 64, 64


def prefill(position: int) -> dict[str, float]:
    T = 4096
    args = argparse.Namespace(queries=T, context=position, heads=128)
    dense = median_seconds(dense_attention(args), 3, 1)
    torch.cuda.empty_cache()
    q8, k8 = bf16(T, 64, 128).to(torch.float8_e4m3fn), bf16(position, 128).to(torch.float8_e4m3fn)
    scale, w = torch.rand(position, device="cuda") + 0.5, torch.randn(T, 64, device="cuda") / 8
    q, kv = bf16(T, 128, 576), bf16(position, 576)
    indices = select_tokens(q8, k8, w, 2048, k_scale=scale)
    select = median_seconds(lambda: select_tokens(q8, k8, w, 2048, k_scale=scale), 5, 2)
    attention = median_seconds(lambda: attend(q, kv, indices, RELEASED_SCALE, 512), 5, 2)
    return {"position": position, "dense": dense * 1e3, "select": select * 1e3, "attend": attention * 1e3}


def decode(position: int) -> dict[str, float]:
    blocks = position // PAGE
    table = torch.randperm(BATCH * blocks, device="cuda").view(BATCH, blocks).int()
    lengths = torch.full((BATCH,), position, device="cuda", dtype=torch.int32)
    cache = torch.randint(0, 120, (BATCH * blocks, PAGE, 132), device="cuda", dtype=torch.uint8)
    cache.view(BATCH * blocks, -1)[:, PAGE * 128 :] = torch.ones(PAGE, device="cuda").view(torch.uint8)
    q8, w = bf16(BATCH, 64, 128).to(torch.float8_e4m3fn), torch.randn(BATCH, 64, device="cuda") / 8
    q, kv = bf16(BATCH, 128, 576), bf16(BATCH * position, 576)

    def sparse() -> Any:
        chosen = select_cached_tokens(q8, cache, table, w, 2048, lengths)
        slots = table.gather(1, chosen.clamp_min(0).long() // PAGE) * PAGE + chosen % PAGE
        return attend(q, kv, torch.where(chosen < 0, -1, slots).int(), RELEASED_SCALE, 512)

    figures = {"position": position, "sparse": median_seconds(replayed(sparse), 10, 2) * 1e3}
    flash: dict[str, str] = {}
    call = peer("vllm.third_party.flashmla.flash_mla_interface", "flash_mla_with_kvcache", flash)
    if call:
        meta = peer("vllm.third_party.flashmla.flash_mla_interface", "get_mla_metadata", flash)()[0]
        paged = kv.view(-1, PAGE, 1, 576)
        dense = lambda: call(q[:, None], paged, table, lengths, 512, meta, softmax_scale=RELEASED_SCALE)  # noqa: E731
        figures["dense"] = median_seconds(dense, 10, 2) * 1e3
    else:
        rows = torch.arange(position, device="cuda").int() + torch.arange(BATCH, device="cuda").int()[:, None] * position
        figures["dense"] = median_seconds(lambda: attend(q, kv, rows, RELEASED_SCALE, 512), 5, 1) * 1e3
    return figures


def crossover(points: list[dict[str, float]], sparse: Any) -> float | None:
    """The position at which sparse becomes cheaper, by straight lines between the points; None where it always or never is."""
    gaps = [(p["position"], p["dense"] - sparse(p)) for p in points]
    for (a, below), (b, above) in itertools.pairwise(gaps):
        if below < 0 <= above:
            return a + (b - a) * -below / (above - below)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_layer.json"))
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    record: dict[str, Any] = {"command": "python -m benchmarks.gpu_layer", "commit": options.commit, "prefill": [], "decode": []}
    record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "ms a layer", "decode_batch": BATCH}
    for name, measured, positions in (("prefill", prefill, POSITIONS), ("decode", decode, DECODE_POSITIONS)):
        for position in positions:
            try:
                record[name].append(measured(position))
                print(name, record[name][-1], flush=True)
            except Exception as error:
                print(name, position, "failed:", repr(error)[:500], flush=True)
            torch.cuda.empty_cache()
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    record["prefill_crossover"] = crossover(record["prefill"], lambda p: p["select"] + p["attend"])
    record["decode_crossover"] = crossover(record["decode"], lambda p: p["sparse"])
    print("crossovers:", record["prefill_crossover"], record["decode_crossover"])
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
