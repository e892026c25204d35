"""Peak memory grows linearly with the context: no tensor of [T, S] is held beyond a tile, forward or backward.

Each measurement is a process of its own, whose peak resident size the kernel reports; what the process held before the op is
taken off. At 32K tokens one float32 [T, S] would be 4 GiB.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from rorqual.kernels import dense_attention, index_loss, select_tokens, selection_quality, sparse_attention, token_logprobs
torch.set_num_threads(1)
op, T = sys.argv[1], int(sys.argv[2])
I, C, H, L, R, K = 2, 16, 2, 16, 8, 64
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator)
query, key, weight = draw(T, I, C), draw(T, C), draw(T, I)
q, kv = draw(T, H, L + R), draw(T, L + R)

def sparse():
    indices = select_tokens(query, key, weight, K)
    q.requires_grad_(), kv.requires_grad_()
    sparse_attention(q, kv, indices, 0.2, L)[0].sum().backward()
    loss = index_loss(*(x.requires_grad_() for x in (query, key, weight)), q, kv, 0.2, indices=indices)
    loss.sum().backward()

def dense():
    q.requires_grad_(), kv.requires_grad_()
    dense_attention(q, kv[:, None], kv[:, None, :L], 0.2)[0].sum().backward()

def warm_up():
    index_loss(*(x.requires_grad_() for x in (query, key, weight)), q, kv, 0.2).sum().backward()

def quality():
    selection_quality(q, kv, 0.2, torch.arange(T)[:, None] * torch.ones(K, dtype=torch.int32))

def logprobs():
    head = draw(4096, 32).requires_grad_()
    token_logprobs(draw(T, 32).requires_grad_(), head, torch.arange(T) % 4096).sum().backward()

def naive():
    (q[:, 0] @ kv.t()).softmax(1) @ kv

def peak():  # not ru_maxrss: a child inherits its parent's
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

small = torch.arange(2 ** 20, dtype=torch.float32).sum()  # the allocator and the thread pool are there
before = peak()
globals()[op]()
print(peak() - before)
"""


def peak_mib(op: str, tokens: int) -> float:
    run = subprocess.run([sys.executable, "-c", PROGRAM, op, str(tokens)], capture_output=True, text=True, check=True)
    return float(run.stdout)


def assert_linear(op: str, lengths: tuple[int, int, int]) -> None:
    """Four times the tokens take at most four times the memory, and well below one [T, S] of float32."""
    small, middle, large = (peak_mib(op, tokens) for tokens in lengths)
    figures = f"{op}: {small:.0f}, {middle:.0f}, {large:.0f} MiB at {lengths} tokens"
    print(figures)
    assert small > 1, f"{figures}: nothing was measured"
    assert max(middle, large) <= lengths[2] / lengths[0] * small, figures
    assert large < lengths[-1] ** 2 * 4 / 2**20 / 3, figures


def test_a_whole_score_matrix_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="naive:"):
        assert_linear("naive", (2048, 4096, 8192))


def test_selection_and_sparse_attention_at_32k_tokens() -> None:
    assert_linear("sparse", (8192, 16384, 32768))


def test_token_logprobs_at_32k_tokens() -> None:
    assert_linear("logprobs", (8192, 16384, 32768))


@pytest.mark.parametrize("op", ("dense", "warm_up", "quality"))
def test_dense_ops_at_8k_tokens(op: str) -> None:
    """The same tiles at any length; test_dense_ops_at_32k_tokens is the longer proof."""
    assert_linear(op, (2048, 4096, 8192))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", ("dense", "warm_up", "quality"))
def test_dense_ops_at_32k_tokens(op: str) -> None:
    assert_linear(op, (8192, 16384, 32768))
