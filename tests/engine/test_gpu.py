"""The engine on a GPU: captured steps give what the host gives; what batch invariance holds in bfloat16.

In bfloat16 a GPU's products take other kernels for other numbers of rows. What holds, and is tested here: the same requests in
the same order give the same bits; a request's bits do not depend on what the requests beside it say, while the numbers of rows
are the same; and in other company its log-probs move by rounding only.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.engine import Engine, EngineConfig
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams, StopReason
from tests.model.test_gpu import ROUND

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    vocab_size=1000, n_layers=4, n_dense_layers=1, inter_dim=512, max_positions=2048, yarn=None, n_activated_experts=4,
    n_expert_groups=4, n_limited_groups=2, **ROUND,
)  # fmt: skip
RECORDED = dict(record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True)
GREEDY = SamplingParams(max_tokens=40, temperature=0, **RECORDED)
DRAWN = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.8, seed=5, **RECORDED)
BASE = dict(block_size=16, cache_tokens=8192, record_selection=True)


def model(dtype: torch.dtype = torch.float32, device: str = "cuda") -> Transformer:
    return Transformer(CONFIG, seed=3).to(device, dtype).requires_grad_(False)


def prompts(lengths, seed=0):
    g = np.random.default_rng(seed)
    return [g.integers(2, CONFIG.vocab_size, length).tolist() for length in lengths]


def agreeing(a, b) -> int:
    """How many tokens from the start are equal."""
    return next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))


LENGTHS = [5, 130, 61, 64, 300, 17, 90, 200, 33]
CONFIGS = {
    "graphs": EngineConfig(**BASE),
    "chunks, few at once": EngineConfig(**BASE, max_step_tokens=48, max_running=5, device_steps=7),
    "blocks run out": EngineConfig(**{**BASE, "cache_tokens": 640}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_float32_completions_and_records_are_those_of_the_cpu(config, params):
    asked = prompts(LENGTHS)
    engine = Engine(model(), config)
    found = engine.generate(asked, params)
    expected = Engine(model(device="cpu"), EngineConfig(**BASE)).generate(asked, params)
    assert engine.pool.num_held == 0 and engine.decoder is not None
    same = 0
    for got, want in zip(found, expected, strict=True):
        n = agreeing(got, want)  # a near tie may fall to another token: rare, and counted
        same += n == len(want.tokens)
        assert n >= 1
        np.testing.assert_allclose(got.logprobs[:n], want.logprobs[:n], atol=2e-3)
        rows = len(want.prompt_tokens) + n - 1
        equal = (got.routed_experts[:rows] == want.routed_experts[:rows]).all((1, 2)).mean()
        assert equal > 0.99, f"routing differs in {1 - equal:.3f} of the rows"
    assert same >= len(asked) - 1, f"{same} of {len(asked)} completions are equal"


def test_bfloat16_the_same_requests_give_the_same_bits():
    def run():
        return Engine(model(torch.bfloat16), EngineConfig(**BASE)).generate(prompts(LENGTHS), DRAWN)

    for a, b in zip(run(), run(), strict=True):
        assert a.tokens == b.tokens and np.array_equal(a.logprobs, b.logprobs)
        assert np.array_equal(a.routed_experts, b.routed_experts)


def test_bfloat16_what_the_neighbours_say_changes_no_bit():
    engine = Engine(model(torch.bfloat16), EngineConfig(**BASE, prefix_cache=False))
    mine, others = prompts([130])[0], [prompts(LENGTHS[2:7], seed) for seed in (1, 2)]
    first, second = (engine.generate([*company[:2], mine, *company[2:]], DRAWN)[2] for company in others)
    assert first.tokens == second.tokens and np.array_equal(first.logprobs, second.logprobs)


def test_bfloat16_in_other_company_log_probs_move_by_rounding():
    """Measured against float32's own log-probs of the same tokens, by the model's full forward."""
    narrow, asked = model(torch.bfloat16), prompts(LENGTHS)
    together = Engine(narrow, EngineConfig(**BASE)).generate(asked, DRAWN)
    drift = []
    for prompt, done in zip(asked, together, strict=True):
        alone = Engine(narrow, EngineConfig(**BASE, device_steps=0, max_step_tokens=100)).generate([prompt], DRAWN)[0]
        n = agreeing(alone, done)
        drift.append(np.abs(alone.model_logprobs[:n] - done.model_logprobs[:n]))
    moved = np.concatenate(drift)
    print(f"log-probs in other company: mean {moved.mean():.4f}, most {moved.max():.4f} over {len(moved)} tokens")
    assert moved.mean() < 0.05


def test_stop_tokens_weights_and_waiting_requests():
    own = model()
    engine = Engine(own, EngineConfig(**BASE, max_running=3))
    asked = prompts(LENGTHS)
    whole = engine.generate(asked, GREEDY)
    stop = whole[1].tokens[5]
    params = SamplingParams(max_tokens=40, temperature=0, stop_tokens=(stop,))
    done = engine.generate(asked, params)[1]
    assert done.stop_reason == StopReason.STOP and done.tokens == whole[1].tokens[: whole[1].tokens.index(stop) + 1]
    other = Transformer(CONFIG, seed=4)
    engine.update_weights(list(other.named_parameters()))
    fresh = Engine(other.cuda().requires_grad_(False), EngineConfig(**BASE, max_running=3)).generate(asked, GREEDY)
    assert [each.tokens for each in engine.generate(asked, GREEDY)] == [each.tokens for each in fresh]
    assert engine.pool.num_held == 0


def test_speculation_on_a_gpu_changes_no_token():
    asked = prompts(LENGTHS[:4])
    plain = Engine(model(), EngineConfig(**BASE)).generate(asked, GREEDY)
    guessed = Engine(model(), EngineConfig(**BASE, speculative=True)).generate(asked, GREEDY)
    assert sum(a.tokens == b.tokens for a, b in zip(plain, guessed, strict=True)) >= 3


def test_an_fp8_cache_gives_nearly_the_same_log_probs():
    narrow, asked = model(torch.bfloat16), prompts([100] * 60)
    params = SamplingParams(max_tokens=2, temperature=0)
    plain = Engine(narrow, EngineConfig(**BASE)).generate(asked, params)
    packed = Engine(narrow, EngineConfig(**BASE, cache_dtype="fp8")).generate(asked, params)
    single = Engine(narrow, EngineConfig(**BASE, cache_dtype="fp8", device_steps=0)).generate(asked, params)
    for name, other, most in (("of the model's dtype", plain, 0.15), ("read in single steps", single, 0.02)):
        drift = []
        for a, b in zip(packed, other, strict=True):
            n = agreeing(a, b)
            drift.append(np.abs(a.model_logprobs[:n] - b.model_logprobs[:n]))
        moved = np.concatenate(drift)
        told = f"mean {moved.mean():.4f}, most {moved.max():.4f} over {len(moved)} tokens"
        print(f"log-probs with an FP8 cache against one {name}: {told}")
        assert len(moved) > 25 and moved.mean() < most
