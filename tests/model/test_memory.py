"""Peak memory of a forward grows with the context and no faster: no [T, S] tensor is ever whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from pathlib import Path

import torch
from rorqual.model import AttentionMode, Cache, ModelConfig, Trace, Transformer

torch.set_num_threads(1)
length, kind = int(sys.argv[1]), sys.argv[2]
config = ModelConfig(
    vocab_size=64, dim=32, n_layers=1, n_dense_layers=1, inter_dim=32, n_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, yarn=None, index_n_heads=2, index_head_dim=16, index_topk=64,
    n_mtp_layers=0,
)
model = Transformer(config)
tokens = torch.randint(0, 64, (1, length))
if kind == "whole matrix":
    torch.ones(length, length).softmax(1)
elif kind == "training":
    trace = Trace(index_loss="restricted")
    loss = model.states(tokens, trace=trace).hidden.square().mean()
    (loss + trace.index_losses[0].mean()).backward()
else:
    with torch.no_grad():
        model.states(tokens, cache=Cache(config) if kind == "prefill" else None, mode=AttentionMode(sparse=kind != "dense"))
# VmHWM begins anew with this program; getrusage's maximum would include what the test runner held when it forked.
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def peak_bytes(length: int, kind: str) -> int:
    run = subprocess.run([sys.executable, "-c", CODE, str(length), kind], capture_output=True, text=True, check=True)
    return int(run.stdout)


def check(kind: str, length: int) -> None:
    """Differences, so that the process itself (some 250 MB) hides nothing: what doubling the context twice adds each time."""
    once, twice, four = (peak_bytes(n, kind) for n in (length, 2 * length, 4 * length))
    growth, slack = (four - twice) / 2, 8 << 20
    assert growth <= 1.25 * (twice - once) + slack, f"{once >> 20}, {twice >> 20}, {four >> 20} MiB at {length} tokens and on"
    assert four - once < 2 * (4 * length) ** 2, "half of one float32 [T, S] matrix"


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("prefill", 8192),
        ("training", 2048),
        pytest.param("training", 8192, marks=pytest.mark.slow),
        pytest.param("dense", 8192, marks=pytest.mark.slow),
    ],
)
def test_memory_grows_no_faster_than_the_context(kind: str, length: int) -> None:
    check(kind, length)


def test_a_whole_score_matrix_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="MiB at 2048 tokens and on"):
        check("whole matrix", 2048)
