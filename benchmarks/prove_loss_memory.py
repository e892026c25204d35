"""The GRPO loss with token log-probs needs at most a quarter of the memory of a form that holds all logits [T, V], at the
released vocabulary of 129,280, and gives the same loss and gradients; both are timed side by side.

Memory is the growth of the process's own peak during forward and backward, gradients included; each form in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS, QUICK_SECONDS = 90, 30
VOCABULARY, DIM = 129280, 128
SHARE = 0.25

PROGRAM = """
import json, sys, time, torch
from rorqual.kernels.logprobs import token_logprobs
from rorqual.train import grpo_loss

form, rows, width, vocabulary, dim = sys.argv[1], *map(int, sys.argv[2:])

def own_peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

draw = torch.Generator().manual_seed(0)
hidden = torch.randn(rows * width, dim, generator=draw).requires_grad_()
head = (torch.randn(vocabulary, dim, generator=draw) * 0.1).requires_grad_()
targets = torch.randint(vocabulary, (rows * width,), generator=draw)
sampler = torch.rand(rows, width, generator=draw) - 17
advantages, mask = torch.randn(rows, generator=draw), torch.ones(rows, width)

def naive():
    logs = (hidden @ head.T).log_softmax(-1)
    return logs.gather(1, targets[:, None])[:, 0]

def ours():
    return token_logprobs(hidden, head, targets)

token_logprobs(hidden[:16].detach(), head.detach()[:64], targets[:16] % 64)  # libraries loaded before the count begins
open("/proc/self/clear_refs", "w").write("5")
before, began = own_peak(), time.perf_counter()
logprobs = (naive if form == "naive" else ours)()
loss, _ = grpo_loss(logprobs.view(rows, width), sampler, advantages, mask, clip_low=0.2, clip_high=0.2, beta=0.0)
loss.backward()
seconds, peak = time.perf_counter() - began, own_peak() - before
sums = [float(loss), float(hidden.grad.norm()), float(head.grad.norm()), float(head.grad[targets[0]].sum())]
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "sums": sums}))
"""


def main(quick: bool) -> dict[str, Any]:
    rows, width = (4, 128) if quick else (8, 256)
    found = {form: measure(form, rows, width) for form in ("naive", "ours")}
    for a, b in zip(found["naive"].pop("sums"), found["ours"].pop("sums"), strict=True):
        assert abs(a - b) <= 1e-4 * max(abs(a), 1e-3), f"the two forms differ: {a} and {b}"
    ratio = found["ours"]["peak_bytes"] / found["naive"]["peak_bytes"]
    assert ratio <= SHARE, f"memory: {ratio:.3f} of the naive form's, more than {SHARE}"
    time_ratio = found["ours"]["seconds"] / found["naive"]["seconds"]
    return {
        "tokens": rows * width,
        "vocabulary": VOCABULARY,
        "dim": DIM,
        **found,
        "memory_ratio": ratio,
        "time_ratio": time_ratio,
    }


def measure(form: str, rows: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, form, *map(str, (rows, width, VOCABULARY, DIM))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
