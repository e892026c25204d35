"""Another engine behind the TokenPolicy protocol: our own server over a socket, and servers that play the forms that vLLM and
SGLang document (they are fakes: none of the two engines runs here)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rorqual.engine import Engine, EngineConfig
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.policy import SamplingParams, StopReason
from rorqual.rollout.dialects import ExpertLayout
from rorqual.rollout.endpoint import EndpointConfig
from rorqual.rollout.remote import RemoteConfig, RemotePolicy, check
from rorqual.serve.app import ServerConfig
from tests.serve.conftest import CONFIG, TOKENIZER, LiveServer, forced_backend

PROMPT = (3, 4, 5, 6, 7)
EVERYTHING = SamplingParams(
    max_tokens=8, temperature=0.9, top_p=0.8, top_k=20, seed=5, stop_tokens=(TOKENIZER.eos_id,), record_kept_tokens=True,
    record_routed_experts=True, record_selected_indices=True,
)  # fmt: skip


def asked(config, *jobs, **options):
    async def main():
        async with RemotePolicy(config, **options) as policy:
            return [await job(policy) for job in jobs], policy

    return asyncio.run(main())


def complete(params=EVERYTHING, prompt=PROMPT):
    return lambda policy: policy.complete(prompt, params)


# --- our own server


@pytest.fixture(scope="module")
def live():
    server = LiveServer(forced_backend, ServerConfig(port=0, weights_from_disk=True))
    yield server
    server.stop()


def test_our_server_gives_over_a_socket_what_the_engine_gives_in_process(live):
    config = RemoteConfig("rorqual", EndpointConfig(live.url))
    (found, again), _ = asked(config, complete(), complete())
    (truth,) = Engine(Transformer(CONFIG, seed=1), EngineConfig(record_selection=True)).generate([PROMPT], EVERYTHING)
    assert found.tokens == truth.tokens == again.tokens and found.stop_reason == truth.stop_reason
    np.testing.assert_array_equal(found.logprobs, truth.logprobs)
    np.testing.assert_array_equal(found.routed_experts, truth.routed_experts)
    np.testing.assert_array_equal(found.kept_tokens.tokens, truth.kept_tokens.tokens)
    np.testing.assert_array_equal(found.kept_tokens.offsets, truth.kept_tokens.offsets)
    for ours, theirs in zip(found.selected_indices, truth.selected_indices, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.temperature == 0.9 and found.policy_version == 0


def test_a_prompt_that_does_not_fit_is_a_value(live):
    (found,), _ = asked(RemoteConfig("rorqual", EndpointConfig(live.url)), complete(prompt=(3,) * CONFIG.max_positions))
    assert found.stop_reason is StopReason.TOO_LONG and found.tokens == ()


def test_weights_reach_our_server_by_disk_and_completions_say_their_version(live, tmp_path):
    other = Transformer(CONFIG, seed=9)
    save_model(other, tmp_path / "w", "float32")
    config = RemoteConfig("rorqual", EndpointConfig(live.url))
    (_, found), policy = asked(config, lambda p: p.reload(str(tmp_path / "w"), 7), complete())
    (truth,) = Engine(other, EngineConfig(record_selection=True)).generate([PROMPT], EVERYTHING)
    assert found.tokens == truth.tokens and found.policy_version == policy.version == 7
    with pytest.raises(UserError, match="holds no checkpoint"):
        asked(config, lambda p: p.reload(str(tmp_path / "none"), 8))
    asked(config, lambda p: p.reload(str(_saved(tmp_path / "first", 1)), 0))


def _saved(path, seed):
    save_model(Transformer(CONFIG, seed=seed), path, "float32")
    return path


def test_a_server_that_does_not_allow_it_takes_no_weights(tmp_path):
    server = LiveServer(forced_backend)
    try:
        with pytest.raises(UserError, match="404"):
            asked(RemoteConfig("rorqual", EndpointConfig(server.url)), lambda p: p.reload(str(tmp_path), 1))
    finally:
        server.stop()


# --- fakes that play the documented forms of vLLM and SGLang


@pytest.fixture
def fake():
    """Answers by path from `answers` (a body, a status, or a function of the request); records what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            httpd.asked.append((self.path, json.loads(body) if body else None))
            answer = httpd.answers[self.path.split("?")[0]]
            answer = answer(httpd.asked[-1][1]) if callable(answer) else answer
            status, data = (answer, b"") if isinstance(answer, int) else (200, json.dumps(answer).encode())
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.answers, httpd.asked = {}, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


LAYOUT = ExpertLayout(n_layers=3, n_dense_layers=1, n_activated_experts=2)
PLAIN = SamplingParams(max_tokens=3, stop_tokens=(2,), record_kept_tokens=True, record_routed_experts=True)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def vllm_choice(**more):
    return {"choices": [{
        "index": 0, "text": "ab", "finish_reason": "stop", "stop_reason": 2, "token_ids": [8, 9, 2],
        "prompt_token_ids": list(PROMPT),
        "logprobs": {"tokens": ["a", "b", ""], "token_logprobs": [-0.5, -1.0, -0.25], "top_logprobs": [{}] * 3},
        "routed_experts": npy(np.arange(7 * 2 * 2, dtype=np.int32).reshape(7, 2, 2)), **more,
    }]}  # fmt: skip


def test_vllms_form_is_read_and_written(fake):
    fake.answers["/v1/completions"] = vllm_choice(sampling_mask=[[8], [9, 4], [2]])
    config = RemoteConfig("vllm", EndpointConfig(fake.url, model="m"), processed_logprobs=True)
    params = replace(PLAIN, top_p=0.9, temperature=0.7, seed=3)
    (found,), _ = asked(config, complete(params), experts=LAYOUT, version=4)
    assert found.tokens == (8, 9, 2) and found.logprobs.tolist() == [-0.5, -1.0, -0.25] and found.policy_version == 4
    assert found.routed_experts.shape == (7, 2, 2) and found.routed_experts[-1].tolist() == [[24, 25], [26, 27]]
    assert [found.kept_tokens.row(t).tolist() for t in range(3)] == [[8], [4, 9], [2]]
    sent = fake.asked[0][1]
    assert sent["prompt"] == list(PROMPT) and sent["return_token_ids"] and sent["stop_token_ids"] == [2] and sent["model"] == "m"
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.7, 0.9, 3, 3)


def test_vllms_weights_are_read_while_nothing_is_under_way(fake):
    fake.answers |= dict.fromkeys(("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"), 200)
    _, policy = asked(RemoteConfig("vllm", EndpointConfig(fake.url)), lambda p: p.reload("/ckpt", 3))
    assert [path for path, _ in fake.asked] == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert fake.asked[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": "/ckpt"}} and policy.version == 3


def sglang_answer(**more):
    ids = np.arange(7 * 3 * 2, dtype=np.int32)  # all three layers, the dense one first
    return {"text": "ab", "meta_info": {
        "finish_reason": {"type": "length", "length": 3},
        "output_token_logprobs": [[-9.0, 8, None], [-9.0, 9, None], [-9.0, 7, None]],
        "output_token_sampling_mask": [[9, 8], [9], [7]], "output_token_sampling_logprobs": [-0.5, 0.0, 0.0],
        "routed_experts": base64.b64encode(ids.tobytes()).decode(), "weight_version": "6", "cached_tokens": 2, **more,
    }}  # fmt: skip


def test_sglangs_form_is_read_and_written(fake):
    fake.answers["/generate"] = sglang_answer()
    config = RemoteConfig("sglang", EndpointConfig(fake.url))
    (found,), _ = asked(config, complete(replace(PLAIN, top_p=0.9, top_k=40)), experts=LAYOUT)
    assert found.tokens == (8, 9, 7) and found.stop_reason is StopReason.LENGTH and found.policy_version == 6
    assert found.logprobs.tolist() == [-0.5, 0.0, 0.0], "of the kept set, not the raw ones"
    assert found.kept_tokens.row(0).tolist() == [8, 9] and found.cached_len == 2
    assert found.routed_experts.shape == (7, 2, 2) and found.routed_experts[0].tolist() == [[2, 3], [4, 5]], "no dense layer"
    sent = fake.asked[0][1]
    assert sent["input_ids"] == list(PROMPT) and sent["return_logprob"] and sent["return_sampling_mask"]
    assert sent["sampling_params"]["max_new_tokens"] == 3 and sent["sampling_params"]["stop_token_ids"] == [2]


def test_without_truncation_sglangs_plain_log_probs_are_taken_and_all_tokens_are_kept(fake):
    fake.answers["/generate"] = sglang_answer()
    (found,), _ = asked(RemoteConfig("sglang", EndpointConfig(fake.url)), complete(PLAIN), experts=LAYOUT)
    assert found.logprobs.tolist() == [-9.0] * 3 and found.kept_tokens.offsets.tolist() == [0, 0, 0, 0]


def test_sglangs_refusal_of_weights_is_said(fake):
    fake.answers["/update_weights_from_disk"] = {"success": False, "message": "Failed to get weights iterator"}
    with pytest.raises(UserError, match="refused the weights: Failed to get"):
        asked(RemoteConfig("sglang", EndpointConfig(fake.url)), lambda p: p.reload("/ckpt", 1))


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("vllm", EVERYTHING, "record_selected_indices.*policy.replay.selection=false.*processed_logprobs"),
        ("vllm", replace(PLAIN, temperature=0.7), "raw model's"),
        ("sglang", EVERYTHING, "record_selected_indices"),
        ("sglang", replace(PLAIN, top_p=0.9), "set sampling.top_k"),
        ("sglang", replace(PLAIN, logit_bias={3: 1.0}), "logit_bias"),
    ],
)
def test_what_an_engine_cannot_give_is_refused_by_name_before_it_is_asked(fake, kind, params, message):
    config = RemoteConfig(kind, EndpointConfig(fake.url))
    for attempt in (lambda: check(config, params), lambda: asked(config, complete(params))):
        with pytest.raises(UserError, match=message):
            attempt()
    assert fake.asked == []
    check(RemoteConfig("rorqual", EndpointConfig(fake.url)), params)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (vllm_choice(token_ids=None), "no token_ids, though return_token_ids"),
        (vllm_choice(routed_experts=None), "--enable-return-routed-experts"),
        (vllm_choice(token_ids=[8], routed_experts=npy(np.zeros((5, 2, 2), np.int32))), "1 tokens and 3 log-probs"),
        (vllm_choice(routed_experts=npy(np.zeros((3, 2, 2), np.int32))), "12 expert ids, which do not fit 7 tokens"),
    ],
)
def test_an_answer_that_lacks_what_was_asked_for_is_an_error_never_a_guess(fake, answer, message):
    fake.answers["/v1/completions"] = answer
    with pytest.raises(UserError, match=message):
        asked(RemoteConfig("vllm", EndpointConfig(fake.url)), complete(PLAIN), experts=LAYOUT)


def test_a_truncating_vllm_that_gives_no_mask_is_an_error(fake):
    fake.answers["/v1/completions"] = vllm_choice()
    config = RemoteConfig("vllm", EndpointConfig(fake.url), processed_logprobs=True)
    with pytest.raises(UserError, match="no kept set"):
        asked(config, complete(replace(PLAIN, top_p=0.5)), experts=LAYOUT)


# --- an endpoint that goes away


def away_for(count):
    left = [count]

    def answer(body):
        left[0] -= 1
        return 503 if left[0] >= 0 else sglang_answer()

    return answer


def test_an_endpoint_that_is_away_for_a_while_is_waited_for_and_counted(fake):
    fake.answers["/generate"] = away_for(9)
    endpoint = EndpointConfig(fake.url, max_tries=1, patience_s=30, first_pause_s=0.01, max_pause_s=0.02)
    (found,), policy = asked(RemoteConfig("sglang", endpoint), complete(PLAIN), experts=LAYOUT)
    assert found.tokens == (8, 9, 7) and policy.counts["retries"] == 9 and not policy.counts["given_up"]


def test_patience_is_bounded_and_its_end_is_a_value(fake):
    fake.answers["/generate"] = 503
    endpoint = EndpointConfig(fake.url, max_tries=2, patience_s=0.3, first_pause_s=0.01, max_pause_s=0.05)
    began = time.monotonic()
    (found,), policy = asked(RemoteConfig("sglang", endpoint), complete(PLAIN), experts=LAYOUT)
    assert found.stop_reason is StopReason.UNAVAILABLE and found.tokens == () and time.monotonic() - began >= 0.3
    assert policy.counts["given_up"] == 1 and "status 503" in policy.failures[0]


def test_a_change_of_weights_waits_for_what_is_under_way_and_holds_what_comes(fake):
    order = []

    def generate(body):
        order.append("generate")
        time.sleep(0.2)
        order.append("generated")
        return sglang_answer()

    fake.answers["/generate"] = generate
    fake.answers["/update_weights_from_disk"] = lambda body: order.append("weights") or {"success": True}

    async def main():
        async with RemotePolicy(RemoteConfig("sglang", EndpointConfig(fake.url)), LAYOUT) as policy:
            first = asyncio.create_task(policy.complete(PROMPT, PLAIN))
            while not order:
                await asyncio.sleep(0.01)
            change = asyncio.create_task(policy.reload("/ckpt", 2))
            await asyncio.sleep(0)
            second = asyncio.create_task(policy.complete(PROMPT, PLAIN))
            await asyncio.gather(first, change, second)

    asyncio.run(main())
    assert order == ["generate", "generated", "weights", "generate", "generated"]
