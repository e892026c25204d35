"""A training step beside transformers' deepseek_v3 of the same shape and optimiser on a GPU: results/gpu_training_speed.json.

    python -m benchmarks.gpu_training_speed [--out FILE]

The measurement is that of benchmarks/prove_training_speed.py: bf16, 8 rows of 1,024 tokens, steps in turn. The figure is kept
whether or not it reaches its aim.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.prove_training_speed import measure
from rorqual.errors import UserError
from rorqual.runlog import environment, write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_training_speed.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and torch finds none; python -m benchmarks.prove training_speed measures a CPU")
    told = {"command": "python -m benchmarks.gpu_training_speed", "date": time.strftime("%Y-%m-%d", time.gmtime())}
    record = {**told, **environment()}  # asked before anything could harm the device
    record["figures"] = measure(quick=False)
    write_atomically(Path(options.out), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
