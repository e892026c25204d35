"""On a GPU the model computes what it computes on a CPU; in bf16 the same up to bf16's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.model import AttentionMode, Cache, Trace, Transformer
from tests.model.small_models import random_tokens, small_model

pytestmark = pytest.mark.gpu

ROUND: dict[str, Any] = {
    "dim": 256, "n_heads": 16, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 64, "moe_inter_dim": 128, "init_std": 0.05,
    "n_routed_experts": 16,
}  # fmt: skip
SIZES = {"round sizes": ROUND, "odd sizes": {}}
MODES = {
    "sparse": AttentionMode(),
    "dense": AttentionMode(sparse=False),
    "expanded": AttentionMode(form="expanded"),
}
T = 150


def documents() -> Tensor:
    ids = torch.zeros(2, T, dtype=torch.long)
    ids[0, 100:] = 1
    ids[1, 140:] = -1
    return ids


def losses(model: Transformer, mode: AttentionMode, device: str) -> tuple[Tensor, Tensor]:
    """Logits and a loss that reaches every weight."""
    tokens, ids = random_tokens(2, T).to(device), documents().to(device)
    trace = Trace(index_loss="restricted" if mode.sparse else "dense")
    states = model.states(tokens, documents=ids, trace=trace, mode=mode)
    logits, mtp_logits = model.logits(states.hidden), model.logits(model.mtp_hidden(states))
    index_loss = torch.stack([each.mean() for each in trace.index_losses.values()]).sum()
    return logits, logits.logsumexp(-1).mean() + mtp_logits.logsumexp(-1).mean() + logits.square().mean() + index_loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES)
def test_float32_values_and_gradients_equal_those_of_the_cpu(sizes: str, mode: str) -> None:
    cpu = small_model(**SIZES[sizes])
    gpu = small_model(**SIZES[sizes]).cuda()
    (expected, loss), (found, gpu_loss) = losses(cpu, MODES[mode], "cpu"), losses(gpu, MODES[mode], "cuda")
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)
    loss.backward()
    gpu_loss.backward()
    gradients = dict(cpu.named_parameters())
    for name, parameter in gpu.named_parameters():
        want, have = gradients[name].grad, parameter.grad
        assert (want is None) == (have is None), name
        if want is not None and have is not None and want.any():
            error = ((have.cpu() - want).norm() / want.norm()).item()
            assert error < 1e-2, f"{name}: gradient off by {error:.1e}"


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_stays_near_float32(mode: str) -> None:
    wide, narrow = small_model(**ROUND).cuda(), small_model(**ROUND).cuda().to(torch.bfloat16)
    with torch.no_grad():
        expected, found = losses(wide, MODES[mode], "cuda")[0], losses(narrow, MODES[mode], "cuda")[0]
    assert found.dtype == torch.float32
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 0.1, f"off by {error:.3f} of its size"


@torch.no_grad()
def test_decoding_equals_prefill_to_rounding() -> None:
    model = small_model(**ROUND).cuda()
    tokens = random_tokens(2, T).cuda()
    cache = Cache(model.config, 2)
    parts = [model(tokens[:, :90], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(90, T))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=2e-3)


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        model = small_model(**ROUND).cuda().to(torch.bfloat16)
        logits, loss = losses(model, AttentionMode(), "cuda")
        loss.backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
