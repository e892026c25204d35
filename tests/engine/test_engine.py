"""The engine gives what the model's own forward gives, whatever the batch, the chunks, the preemptions, the prefix cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.engine import Engine, EngineConfig, cache
from rorqual.errors import UserError
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.replay import Replay
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams, StopReason

CONFIG = ModelConfig(
    vocab_size=97, dim=48, n_layers=3, n_dense_layers=1, inter_dim=80, max_positions=512, n_heads=3, q_lora_rank=24,
    kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, yarn=None, index_n_heads=4, index_head_dim=16,
    index_topk=7, n_routed_experts=8, n_activated_experts=3, moe_inter_dim=24, n_expert_groups=4, n_limited_groups=2,
    init_std=0.15,
)  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0)
DRAWN = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.8, seed=5, record_kept_tokens=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, seed=3)


def prompts(count=5, seed=0, shared=0) -> list[list[int]]:
    g = np.random.default_rng(seed)
    head = g.integers(2, 97, shared).tolist()
    return [head + g.integers(2, 97, g.integers(1, 40)).tolist() for _ in range(count)]


def alone(model, prompt, params):
    """One request in an engine of its own, everything in one chunk, nothing cached."""
    return Engine(model, EngineConfig(prefix_cache=False, max_step_tokens=512)).generate([prompt], params)[0]


def same(a, b):
    assert a.tokens == b.tokens
    assert np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.model_logprobs, b.model_logprobs)


@torch.no_grad()
def own_greedy(model, prompt, count):
    """The model's full forward over the whole sequence for each token: no cache, no engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_greedy_equals_the_models_own_full_forward_above_top_k(model):
    for prompt, done in zip(prompts(), Engine(model).generate(prompts(), GREEDY), strict=True):
        assert done.tokens == own_greedy(model, prompt, 12)
        assert done.stop_reason == StopReason.LENGTH


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(max_step_tokens=5, block_size=4, max_running=3),
        EngineConfig(block_size=4, cache_tokens=96),  # blocks run out: preemption and recomputation
        EngineConfig(block_size=8, max_step_tokens=17, speculative=True),
        EngineConfig(block_size=4, cache_tokens=96, max_step_tokens=11, speculative=True),
    ],
    ids=["batch", "chunks", "preemption", "speculative", "all"],
)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_request_gets_the_same_bits_whatever_its_company(model, config, params):
    asked = prompts(7, shared=9)
    engine = Engine(model, config)
    for prompt, done in zip(asked, engine.generate(asked, params), strict=True):
        same(done, alone(model, prompt, params))
    if config.cache_tokens == 96:
        assert engine.counters.preemptions > 0
    assert engine.pool.num_held == 0


@pytest.mark.parametrize(("shortest", "most"), [(1, 1 << 16), (1, 90), (256, 300)])
def test_how_requests_are_flocked_changes_no_bit(model, monkeypatch, shortest, most):
    monkeypatch.setattr(cache, "MIN_FLOCK_TOKENS", shortest)
    monkeypatch.setattr(cache, "FLOCK_TOKENS", most)
    asked = [prompt * n for n, prompt in enumerate(prompts(9, seed=6), 1)]
    engine = Engine(model, EngineConfig(block_size=4, speculative=True, max_step_tokens=50))
    for prompt, done in zip(asked, engine.generate(asked, DRAWN), strict=True):
        same(done, alone(model, prompt, DRAWN))


def test_dense_attention_too_is_the_same_bits_whatever_the_company(model):
    dense, asked = AttentionMode(sparse=False), prompts(6, seed=7, shared=5)
    together = Engine(model, EngineConfig(block_size=4, max_step_tokens=21), dense).generate(asked, DRAWN)
    for prompt, done in zip(asked, together, strict=True):
        same(done, Engine(model, EngineConfig(prefix_cache=False), dense).generate([prompt], DRAWN)[0])


def test_a_prefix_hit_changes_nothing_but_the_work(model):
    asked = prompts(4, shared=33)
    engine = Engine(model, EngineConfig(block_size=4, record_selection=True))
    params = SamplingParams(max_tokens=6, temperature=0, record_routed_experts=True, record_selected_indices=True)
    for prompt in asked:
        cold = Engine(model, EngineConfig(record_selection=True, prefix_cache=False)).generate([prompt], params)[0]
        warm = engine.generate([prompt], params)[0]
        same(warm, cold)
        assert np.array_equal(warm.routed_experts, cold.routed_experts)
        assert all(np.array_equal(a, b) for a, b in zip(warm.selected_indices, cold.selected_indices, strict=True))
    again = engine.generate([asked[0]], params)[0]
    assert again.cached_len == (len(asked[0]) - 1) // 4 * 4 > 32
    same(again, alone(model, asked[0], SamplingParams(max_tokens=6, temperature=0)))


def test_a_group_that_arrives_at_once_computes_its_common_prompt_once(model):
    asked = [prompt for prompt in prompts(3, seed=9, shared=40) for _ in range(4)]
    params = [SamplingParams(max_tokens=5, seed=i, record_kept_tokens=True) for i in range(len(asked))]
    engine = Engine(model, EngineConfig(block_size=4))
    for prompt, each, done in zip(asked, params, engine.generate(asked, params), strict=True):
        same(done, alone(model, prompt, each))
    plain = Engine(model, EngineConfig(block_size=4, prefix_cache=False))
    plain.generate(asked, params)
    spared = plain.counters.computed_tokens - engine.counters.computed_tokens
    assert (
        spared
        == engine.counters.cached_tokens
        == sum(len(each) - 1 - (len(each) - 1) % 4 for each in asked)
        - sum(len(each) - 1 - (len(each) - 1) % 4 for each in asked[::4])
        + 2 * 40
    )


@torch.no_grad()
def test_records_replayed_in_one_forward_give_the_samplers_logprobs(model):
    params = SamplingParams(
        max_tokens=20, temperature=0.8, top_k=9, seed=1,
        record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True,
    )  # fmt: skip
    engine = Engine(model, EngineConfig(block_size=4, max_step_tokens=9, record_selection=True))
    for done in engine.generate(prompts(3), params):
        whole = torch.tensor([[*done.prompt_tokens, *done.tokens[:-1]]])
        assert done.routed_experts.shape == (whole.shape[1], 2, 3)
        replay = Replay(torch.tensor(done.routed_experts)[None], [torch.tensor(layer)[None] for layer in done.selected_indices])
        trace = Trace(routed_experts=True, selected_indices=True)
        logits = model(whole, replay=replay, trace=trace)[0, len(done.prompt_tokens) - 1 :] / 0.8
        for layer in range(3):
            assert np.array_equal(trace.selected[layer].numpy(), done.selected_indices[layer])
        for t, token in enumerate(done.tokens):
            kept = torch.tensor(done.kept_tokens.row(t)).long()
            over_kept = logits[t][kept].double().log_softmax(-1)
            assert abs(float(over_kept[kept.tolist().index(token)]) - done.logprobs[t]) < 1e-5


def test_speculation_is_lossless_and_reports_what_was_accepted(model):
    asked = prompts(6, seed=4)
    for params in (GREEDY, DRAWN):
        plain = Engine(model).generate(asked, params)
        engine = Engine(model, EngineConfig(speculative=True))
        for a, b in zip(engine.generate(asked, params), plain, strict=True):
            same(a, b)
            assert np.array_equal(a.kept_tokens.tokens, b.kept_tokens.tokens) if a.kept_tokens else True
        assert engine.counters.drafted > 0
        assert engine.counters.acceptance_rate == engine.counters.accepted / engine.counters.drafted


def test_a_right_draft_spares_a_step(model, monkeypatch):
    engine = Engine(model, EngineConfig(speculative=True))
    truth = own_greedy(model, prompts()[1], 12)
    monkeypatch.setattr(engine.runner, "guesses", lambda step, following, rows: [oracle(engine, truth)] * len(rows))

    def oracle(engine, truth):
        return truth[min(engine.scheduler.running[0].num_sampled, 11)]

    done = engine.generate([prompts()[1]], GREEDY)[0]
    assert done.tokens == truth
    assert engine.counters.acceptance_rate == 1 and engine.counters.steps <= 8, "12 tokens: one alone, then two a step"


def test_update_weights_never_mixes_versions_unless_asked_to(model):
    other = Transformer(CONFIG, seed=8)
    asked = prompts(3, seed=2)
    for mixing in (False, True):
        engine = Engine(Transformer(CONFIG, seed=3), EngineConfig(block_size=4))
        requests = [engine.add(prompt, GREEDY) for prompt in asked]
        for _ in range(5):
            engine.step()
        late = engine.add(asked[0], GREEDY)
        assert engine.update_weights(other.state_dict().items(), mixing=mixing) == 1
        while not engine.scheduler.is_idle:
            engine.step()
        versions = [set(engine.completion(r).policy_versions.tolist()) for r in requests]
        assert all(v == ({0, 1} if mixing else {0}) for v in versions)
        same(engine.completion(late), alone(other, asked[0], GREEDY))
        if not mixing:
            for request, prompt in zip(requests, asked, strict=True):
                same(engine.completion(request), alone(model, prompt, GREEDY))


def test_update_weights_refuses_the_unknown_before_anything_changes(model):
    engine = Engine(Transformer(CONFIG, seed=3))
    before = engine.model.norm.weight.clone()
    with pytest.raises(UserError, match="the model has no nonsense"):
        engine.update_weights([("norm.weight", before * 2), ("nonsense", before)])
    with pytest.raises(UserError, match=r"norm\.weight: expected \[48\], found \[47\]"):
        engine.update_weights([("norm.weight", before[1:])])
    assert torch.equal(engine.model.norm.weight, before) and engine.version == 0


def test_what_does_not_fit_is_an_answer(model):
    engine = Engine(model, EngineConfig(block_size=4, cache_tokens=40, max_context=60))
    long, longest = engine.generate([[5] * 45, [5] * 60], GREEDY)
    assert long.stop_reason == longest.stop_reason == StopReason.TOO_LONG and long.tokens == ()
    grown = engine.generate([[5] * 30], SamplingParams(max_tokens=30, temperature=0))[0]
    assert grown.stop_reason == StopReason.OUT_OF_MEMORY and 5 <= len(grown.tokens) < 30
    assert engine.pool.num_held == 0


def test_stop_tokens_limits_and_constraints_end_a_completion(model):
    engine = Engine(model)
    free = engine.generate([prompts()[0]], GREEDY)[0]
    stop = free.tokens[4]
    stopped = engine.generate([prompts()[0]], SamplingParams(max_tokens=12, temperature=0, stop_tokens=(stop,)))[0]
    assert stopped.stop_reason == StopReason.STOP and stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert engine.generate([[3]], SamplingParams(max_tokens=0))[0].stop_reason == StopReason.LENGTH

    def three_sevens(sampled):
        allowed = torch.zeros(97, dtype=torch.bool)
        allowed[7] = len(sampled) < 3
        return allowed

    held = engine.generate([[3, 4]], [GREEDY], [three_sevens])[0]
    assert held.tokens == (7, 7, 7) and held.stop_reason == StopReason.CONSTRAINT


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], GREEDY, "prompt: expected at least one token"),
        ([97], GREEDY, r"prompt: expected ids in \[0, 97\), found 97"),
        ([1], SamplingParams(logit_bias={200: 1.0}), "logit_bias: expected ids"),
        ([1], SamplingParams(record_selected_indices=True), "record_selection=True"),
    ],
)
def test_bad_requests_are_refused_by_name(model, prompt, params, text):
    with pytest.raises(UserError, match=text):
        Engine(model).generate([prompt], params)


def test_aborting_frees_the_blocks_at_once(model):
    engine = Engine(model)
    request = engine.add([1, 2, 3], GREEDY)
    engine.step()
    assert engine.pool.num_held == 1
    engine.abort(request)
    assert engine.pool.num_held == 0 and engine.completion(request).stop_reason == StopReason.ABORTED
