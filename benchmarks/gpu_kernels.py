"""Every kernel's figures on one GPU, each checked, then timed beside its peers in the same run: results/gpu_kernels.json.

python -m benchmarks.gpu_kernels [--out FILE] [--commit ID] [--ops OP ...]
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from rorqual.bench import timing
from rorqual.commands import bench

RUNS = [
    *({"op": "sparse-attention", "context": T} for T in (8192, 32768, 131072)),
    *({"op": "sparse-decode", "batch": B, "context": 4096} for B in (1, 8, 64, 128)),
    *({"op": "sparse-decode-fp8", "batch": B, "context": 4096} for B in (1, 8, 64, 128)),
    {"op": "sparse-backward", "context": 32768},
    *({"op": "masked-prefill", "context": S} for S in (4096, 8192, 16384)),
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


def kept_figures(path: Path, ops: list[str] | None) -> list[dict[str, Any]]:
    """The figures of other ops in the file, each with the commit it was made at; none where all ops run."""
    if ops is None or not path.exists():
        return []
    record = json.loads(path.read_text())
    return [{"commit": record.get("commit")} | figure for figure in record["figures"] if figure["op"] not in ops]


def place(figure: dict[str, Any]) -> int:
    """Where a figure's op stands among all."""
    return [run["op"] for run in RUNS].index(figure["op"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_kernels.json"))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--ops", nargs="*", help="only these; the file's figures of others stay, each with its commit")
    options = parser.parse_args()
    chosen = [run for run in RUNS if options.ops is None or run["op"] in options.ops]
    figures = kept_figures(Path(options.out), options.ops)
    for run in chosen:
        began = time.time()
        try:
            torch.cuda.reset_peak_memory_stats()
            figures.append({"commit": options.commit} | bench.measure(str(run["op"]), arguments(**run)))
            print(timing.describe(figures[-1]), f"[{time.time() - began:.0f} s]", flush=True)
        except Exception as error:
            traceback.print_exc(limit=-4)
            figures.append({"commit": options.commit, **run, "failed": str(error)[:500]})
        torch.cuda.empty_cache()
        record = {"command": "python -m benchmarks.gpu_kernels", "figures": sorted(figures, key=place)}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
