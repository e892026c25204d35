"""Every kernel's figures on one GPU, each checked, then timed beside its peers in the same run: results/gpu_kernels.json.

python -m benchmarks.gpu_kernels [--out FILE] [--commit ID]
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

import torch

from rorqual.bench import timing
from rorqual.commands import bench

RUNS = [
    *({"op": "sparse-attention", "context": T} for T in (8192, 32768, 131072)),
    *({"op": "sparse-decode", "batch": B, "context": 4096} for B in (1, 8, 64, 128)),
    *({"op": "sparse-decode-fp8", "batch": B, "context": 4096} for B in (1, 8, 64, 128)),
    {"op": "sparse-backward", "context": 32768},
    *({"op": "masked-prefill", "context": S} for S in (2048, 4096, 8192, 16384)),
    *({"op": "select", "context": T} for T in (8192, 32768, 131072)),
    *({"op": "top-k", "context": T, "queries": rows} for rows, T in ((4096, 8192), (4096, 32768), (2048, 131072))),
    {"op": "index-loss", "context": 32768},
    {"op": "token-logprobs"},
    *({"op": "fp8-matmul", "queries": N} for N in (64, 512, 4096)),
    {"op": "quantize-activation"},
    {"op": "quantize-weight"},
    *({"op": op, "queries": N} for op in ("write-latents", "write-index-keys") for N in (64, 65536)),
    {"op": "experts", "queries": 8192},
    {"op": "grouped-matmul", "queries": 8192},
]


def arguments(**chosen: int | str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(chosen.pop("op")), *(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_kernels.json"))
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    figures = []
    for run in RUNS:
        began = time.time()
        try:
            torch.cuda.reset_peak_memory_stats()
            figures.append(bench.measure(str(run["op"]), arguments(**run)))
            print(timing.describe(figures[-1]), f"[{time.time() - began:.0f} s]", flush=True)
        except Exception as error:
            traceback.print_exc(limit=-4)
            figures.append({**run, "failed": str(error)[:500]})
        torch.cuda.empty_cache()
        record = {"command": "python -m benchmarks.gpu_kernels", "commit": options.commit, "figures": figures}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
