"""Every Triton and Gluon kernel under compute-sanitizer, on the small GPU tests: results/gpu_sanitizer.json.

python -m benchmarks.gpu_sanitizer [--out FILE] [--commit ID] [--limit SECONDS] [--jobs N]

memcheck looks for reads and writes outside allocations (PyTorch's caching allocator is off, so that each tensor is one),
racecheck for hazards in shared memory. Each file of tests/kernels runs in a process of its own under each tool; which kernels it
launched is read from the compiled kernels' caches, so a kernel that no test launched shows as missing. Run the tests once
before: compiling under the tools is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck")
LONG = "long_rows or 100_runs or large_vocabulary or released or exceed or 2_31 or memory"
"""Tests whose sizes are too large to run some hundred times slower."""
KERNELS_FILE = "RORQUAL_LAUNCHED_KERNELS"


def jit_kernels() -> dict[str, Any]:
    """MODULE.NAME -> each Triton or Gluon kernel of rorqual.kernels that has been imported."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("rorqual.kernels."):
            for name, value in vars(module).items():
                if name.endswith("_kernel") and hasattr(value, "device_caches") and value.fn.__module__ == module_name:
                    found[f"{module_name.removeprefix('rorqual.kernels.')}.{name}"] = value
    return found


def pytest_sessionfinish() -> None:
    """As a pytest plugin (-p benchmarks.gpu_sanitizer): write which kernels were launched."""
    if path := os.environ.get(KERNELS_FILE):
        launched = [name for name, kernel in jit_kernels().items() if any(cache[0] for cache in kernel.device_caches.values())]
        Path(path).write_text(json.dumps(launched))


def test_files() -> list[Path]:
    return [
        path
        for path in sorted((ROOT / "tests/kernels").glob("test_*.py"))
        if re.search(r"on_each_device|mark\.gpu", path.read_text())
    ]


def check(tool: str, path: Path, limit: float) -> dict[str, Any]:
    """One tool over one file's small GPU tests."""
    with tempfile.NamedTemporaryFile(suffix=".json") as launched:
        command = [
            "compute-sanitizer", "--tool", tool, "--print-limit", "5", "--error-exitcode", "99",
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", f"not ({LONG})", "-p", "no:cacheprovider",
            "-p", "benchmarks.gpu_sanitizer", str(path.relative_to(ROOT)),
        ]  # fmt: skip
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", KERNELS_FILE: launched.name}
        try:
            run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"tool": tool, "tests": path.name, "failed": f"not done after {limit:.0f} s", "kernels": []}
        output = run.stdout + run.stderr
        text = Path(launched.name).read_text()
    summary = re.search(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    outcome = re.search(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected).*?)(?: in [\d.]+s.*)?$", output, re.M)
    return {
        "tool": tool, "tests": path.name, "summary": summary.group(1) if summary else None,
        "pytest": outcome.group(1) if outcome else None, "status": run.returncode, "kernels": json.loads(text) if text else [],
        "clean": run.returncode in (0, 5), "output": "" if run.returncode in (0, 5) else output[-3000:],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/gpu_sanitizer.json"))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--limit", type=float, default=240, help="seconds for one file under one tool")
    parser.add_argument("--jobs", type=int, default=6)
    options = parser.parse_args()
    jobs = [(tool, path, options.limit) for tool in TOOLS for path in test_files()]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: check(*job), jobs))
    record = {"command": "python -m benchmarks.gpu_sanitizer", "commit": options.commit} | report(results)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    for result in results:
        print(result["tool"], result["tests"], result.get("summary"), result.get("pytest"), result.get("failed", ""), flush=True)
    print("launched:", len(record["launched"]), "not launched:", record["not_launched"])


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results with the device, and which of all kernels each tool saw launched."""
    import importlib

    import torch

    for path in sorted((ROOT / "rorqual/kernels").glob("*_*.py")):
        if path.stem.endswith(("_triton", "_gluon")):
            importlib.import_module(f"rorqual.kernels.{path.stem}")
    launched = {tool: {name for result in results if result["tool"] == tool for name in result["kernels"]} for tool in TOOLS}
    both = set.intersection(*launched.values())
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "launched": sorted(both),
        "not_launched": sorted(set(jit_kernels()) - both), "results": results,
    }  # fmt: skip


if __name__ == "__main__":
    main()
