"""Decoding in runs of steps on a device: what the ordinary engine gives, token by token, with the same records."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rorqual.engine import Engine, EngineConfig
from rorqual.engine.cache import PagedCache
from rorqual.engine.decoder import round_up_rows
from rorqual.engine.records import RecordStore
from rorqual.engine.runner import Runner
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams, StopReason
from tests.engine.test_engine import CONFIG, GREEDY, prompts

pytest.importorskip("triton")
RECORDED = dict(record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True)
DRAWN = SamplingParams(max_tokens=11, temperature=0.9, top_p=0.8, seed=5, **RECORDED)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, seed=3)


def decoding(model: Transformer, config: EngineConfig) -> Engine:
    """An engine on the CPU that decodes as one on a GPU does, without graphs."""
    engine = Engine(model, config)
    cpu = torch.device("cpu")
    packed = config.cache_dtype == "fp8"
    engine.cache = PagedCache(
        model.config, engine.pool.num_blocks, config.block_size, torch.float32, cpu, spare=True, packed=packed
    )
    for store in [*engine.cache._kv, *engine.cache._index_keys]:
        if store is not None and not packed:
            store.fill_(torch.nan)
    engine.records = RecordStore(model.config, engine.cache.num_slots, config.record_routing, config.record_selection, cpu)
    engine.runner = Runner(model, engine.cache, engine.records, engine.attention)
    engine.decoder = engine._decoder(captures=False)
    return engine


CONFIGS = {
    "runs": EngineConfig(block_size=4, device_steps=4, record_selection=True),
    "blocks run out": EngineConfig(block_size=4, cache_tokens=96, device_steps=8, record_selection=True),
    "few at once": EngineConfig(block_size=8, max_running=3, device_steps=16, max_step_tokens=17, record_selection=True),
    "single steps": EngineConfig(block_size=4, device_steps=1, record_selection=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_run_of_steps_gives_what_single_steps_on_the_host_give(model, config, params):
    asked = prompts(6, shared=9)
    each = [SamplingParams(**{**vars(params), "max_tokens": 3 + 2 * i}) for i in range(len(asked))]
    engine = decoding(model, config)
    found, expected = engine.generate(asked, each), Engine(model, config).generate(asked, each)
    assert engine.pool.num_held == 0
    for got, want in zip(found, expected, strict=True):
        assert got.tokens == want.tokens and got.stop_reason == want.stop_reason
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        np.testing.assert_allclose(got.model_logprobs, want.model_logprobs, atol=1e-4)
        if params is DRAWN:
            assert np.array_equal(got.kept_tokens.tokens, want.kept_tokens.tokens)
            assert np.array_equal(got.kept_tokens.offsets, want.kept_tokens.offsets)
            assert np.array_equal(got.routed_experts, want.routed_experts)
            for own, other in zip(got.selected_indices, want.selected_indices, strict=True):
                assert np.array_equal(own, other)


def test_a_stop_token_ends_a_request_within_a_run(model):
    prompt = prompts(1)[0]
    whole = Engine(model).generate([prompt], GREEDY)[0]
    params = SamplingParams(max_tokens=12, temperature=0, stop_tokens=(whole.tokens[5],))
    first = whole.tokens.index(whole.tokens[5])
    engine = decoding(model, EngineConfig(block_size=4, device_steps=16))
    done = engine.generate([prompt, prompts(2)[1]], [params, GREEDY])
    assert done[0].stop_reason == StopReason.STOP and done[0].tokens == whole.tokens[: first + 1]
    assert len(done[1].tokens) == 12 and engine.pool.num_held == 0


def test_requests_that_need_the_host_are_drawn_there(model):
    biased = SamplingParams(max_tokens=6, temperature=0, logit_bias={7: 100.0}, top_logprobs=2)
    engine = decoding(model, EngineConfig(block_size=4))
    done = engine.generate(prompts(2), [biased, GREEDY])
    assert done[0].tokens == (7,) * 6 and len(done[0].top_logprobs) == 6
    assert done[1].tokens == Engine(model).generate(prompts(2), GREEDY)[1].tokens


def test_weights_that_have_diverged_are_an_error(model):
    broken = Transformer(CONFIG, seed=3)
    engine = decoding(broken, EngineConfig(block_size=4))
    request = engine.add(prompts(1)[0], GREEDY)
    engine.step()
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not numbers"):
        engine.step()
    assert not request.is_finished


def test_rows_are_rounded_up_to_few_sizes():
    assert [round_up_rows(n) for n in (1, 2, 3, 9, 32, 33, 64, 65, 300)] == [1, 2, 4, 16, 32, 64, 64, 96, 320]


WIDE = dataclasses.replace(CONFIG, kv_lora_rank=128, index_head_dim=32, index_topk=20)


def test_an_fp8_cache_gives_nearly_the_same_log_probs_in_a_quarter_of_the_bytes():
    wide = Transformer(WIDE, seed=3)
    asked, params = prompts(20, shared=9), SamplingParams(max_tokens=2, temperature=0)
    plain = Engine(wide, EngineConfig(block_size=4))
    expected = plain.generate(asked, params)
    engines = [make(wide, EngineConfig(block_size=4, cache_dtype="fp8", device_steps=4)) for make in (Engine, decoding)]
    found = [engine.generate(asked, params) for engine in engines]
    assert [each.tokens for each in found[0]] == [each.tokens for each in found[1]]  # single steps and runs read the same bytes
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    moved = []
    for got, want in zip(found[0], expected, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=True)) if a != b), len(want.tokens))
        moved.append(np.abs(got.model_logprobs[:same] - want.model_logprobs[:same]))
    moved = np.concatenate(moved)
    assert len(moved) > 12 and 1e-5 < moved.mean() < 0.1, moved  # rounded to 8 bits, and no more than that
    assert engines[0].cache.num_bytes < 0.4 * plain.cache.num_bytes


def test_an_fp8_cache_says_what_it_takes(model):
    with pytest.raises(UserError, match="multiple of 128, found 20"):
        Engine(model, EngineConfig(cache_dtype="fp8"))
