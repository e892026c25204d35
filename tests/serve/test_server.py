"""The server through the real openai client: every feature, streams delta by delta, refusals in OpenAI's shape."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.request

import httpx
import numpy as np
import openai
import pytest

from rorqual.chat import encode_tokens, with_tools
from rorqual.engine import EngineConfig
from rorqual.policy import SamplingParams
from tests.serve.conftest import TOKENIZER, LiveServer, ServerConfig, forced_backend, written

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "n": {"type": "integer"}}}}}
    for name in ("weather", "time")
]  # fmt: skip
ASK = [{"role": "user", "content": "Weather in Rome?"}]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


CALLS = {
    "role": "assistant", "content": "Let me look.", "reasoning_content": "I need <tools>.",
    "tool_calls": [call("weather", city="  Rome\n", n=3), call("time", city="Ré")],
}  # fmt: skip
ANSWER = {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Done."}


def say(server, *messages, thinking=True):
    server.backend.script[:] = [written(message, thinking) for message in messages]


def create(client, **fields):
    return client.chat.completions.create(**{"model": "small", "messages": ASK, "max_tokens": 900} | fields)


def test_a_message_comes_back_with_its_reasoning_calls_and_usage(server, client):
    say(server, CALLS)
    done = create(client, tools=TOOLS)
    message = done.choices[0].message
    assert done.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look." and message.reasoning_content == "I need <tools>."
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
        ("weather", {"city": "  Rome\n", "n": 3}), ("time", {"city": "Ré"})]  # fmt: skip
    assert len({c.id for c in message.tool_calls}) == 2
    prompt = encode_tokens(with_tools(ASK, TOOLS), TOKENIZER)
    assert done.usage.prompt_tokens == len(prompt) and done.usage.completion_tokens == len(written(CALLS))
    assert done.usage.completion_tokens_details.reasoning_tokens == len(TOKENIZER.encode("I need <tools>.")) + 1


def test_a_stream_gives_the_same_message_delta_by_delta_and_no_marker(server, client):
    say(server, CALLS)
    reasoning, content, calls, finish, usage = "", "", {}, None, None
    kinds = []
    for chunk in create(client, tools=TOOLS, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta
            thought = getattr(delta, "reasoning_content", None) or ""
            reasoning, content = reasoning + thought, content + (delta.content or "")
            kinds.append("r" if thought else "c" if delta.content else "t" if delta.tool_calls else "")
            for part in delta.tool_calls or []:
                held = calls.setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                assert part.id is None or held["id"] == part.id
                held["name"] += part.function.name or ""
                held["arguments"] += part.function.arguments or ""
            assert "DSML" not in str(chunk) and "<think>" not in str(chunk)
            finish = choice.finish_reason or finish
    assert (reasoning, content, finish) == ("I need <tools>.", "Let me look.", "tool_calls")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls.values()] == [
        ("weather", {"city": "  Rome\n", "n": 3}), ("time", {"city": "Ré"})]  # fmt: skip
    assert "".join(kinds).strip("rct") == "" and "".join(kinds).index("c") > "".join(kinds).rindex("r")
    assert kinds.count("t") > 10, "arguments stream before they end"
    assert usage.completion_tokens == len(written(CALLS))


def test_a_conversation_through_http_writes_the_prompt_that_the_format_writes(server, client):
    say(server, CALLS, ANSWER)
    first = create(client, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": c.id, "content": f"r{i}"} for i, c in enumerate(first.tool_calls)]
    history = [*ASK, first.model_dump(exclude_none=True), *reversed(results)]
    done = create(client, messages=history, tools=TOOLS, extra_body={"return_token_ids": True})
    assert done.choices[0].message.content == "It is sunny."
    given = done.choices[0].rollout["prompt_token_ids"]
    assert given == encode_tokens(
        with_tools([*ASK, CALLS | {"tool_calls": [c.model_dump() for c in first.tool_calls]}, *results], TOOLS), TOKENIZER
    )
    assert TOKENIZER.decode(given).index("<result>r0") < TOKENIZER.decode(given).index("<result>r1")
    assert done.usage.prompt_tokens_details.cached_tokens > 0, "the earlier turn was in the prefix cache"


def test_golden_conversations_give_the_same_messages_through_http(server, client, shared_data):
    given = json.loads((shared_data / "encoding" / "test_input.json").read_text())
    messages = given["messages"]
    messages[0]["tools"] = given["tools"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not (message.get("reasoning_content") or message.get("tool_calls")):
            continue
        say(server, message)
        got = create(client, messages=messages[:index], max_tokens=2000).choices[0].message
        assert got.content == (message.get("content") or (None if message.get("tool_calls") else ""))
        assert (getattr(got, "reasoning_content", None) or "") == (message.get("reasoning_content") or "")
        assert [json.loads(c.function.arguments) for c in got.tool_calls or []] == [
            json.loads(c["function"]["arguments"]) for c in message.get("tool_calls") or []
        ]


def test_thinking_can_be_switched_off_in_each_way_that_clients_do(server, client):
    plain = {"role": "assistant", "content": "Hi."}
    for body in (
        {"thinking": False},
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"thinking": False}},
        {"reasoning_effort": "none"},
    ):
        say(server, plain, thinking=False)
        done = create(client, extra_body=body)
        assert done.choices[0].message.content == "Hi." and not getattr(done.choices[0].message, "reasoning_content", None)
        assert done.usage.completion_tokens_details.reasoning_tokens == 0


def test_one_call_is_enough_where_parallel_calls_are_off(server, client):
    say(server, CALLS)
    done = create(client, tools=TOOLS, parallel_tool_calls=False)
    assert len(done.choices[0].message.tool_calls) == 1 and done.usage.completion_tokens < len(written(CALLS))


def test_tool_choice_and_schemas_bind_what_a_random_model_writes(server, client):
    server.backend.script[:] = []
    named = create(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "time"}}, max_tokens=60,
                   extra_body={"thinking": False, "return_token_ids": True})  # fmt: skip
    text = TOKENIZER.decode(named.choices[0].rollout["token_ids"])
    assert text.startswith('\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="time">')
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
              "x-guidance": {"whitespace_flexible": False}}  # fmt: skip
    shaped = create(client, extra_body={"thinking": False},
                    response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})  # fmt: skip
    assert set(json.loads(shaped.choices[0].message.content)) == {"ok"} and shaped.choices[0].finish_reason == "stop"
    free = create(client, tools=TOOLS, tool_choice="none", max_tokens=200, temperature=5, extra_body={"return_token_ids": True})
    assert TOKENIZER.special_id("｜DSML｜") not in free.choices[0].rollout["token_ids"]


def test_n_and_seed_give_different_choices_that_repeat(server, client):
    server.backend.script[:] = []
    first, again = (create(client, n=3, seed=7, max_tokens=12, temperature=1) for _ in range(2))
    texts = [c.message.model_dump() for c in first.choices]
    assert [c.message.model_dump() for c in again.choices] == texts
    assert len({json.dumps(t) for t in texts}) == 3 and [c.index for c in first.choices] == [0, 1, 2]
    assert first.choices[0].finish_reason == "length" and first.usage.completion_tokens == 36


def test_logprobs_are_the_raw_models_with_the_likeliest_beside_them(server, client):
    server.backend.script[:] = []
    done = create(
        client, logprobs=True, top_logprobs=3, max_tokens=6, temperature=0.3, top_p=0.5, extra_body={"return_token_ids": True}
    )
    entries, ids = done.choices[0].logprobs.content, done.choices[0].rollout["token_ids"]
    again = server.engine.generate(
        [done.choices[0].rollout["prompt_token_ids"]], SamplingParams(max_tokens=1, temperature=0, top_logprobs=3)
    )[0]
    assert len(entries) == len(ids) == 6 and all(len(e.top_logprobs) == 3 for e in entries)
    assert [t.logprob for t in entries[0].top_logprobs] == pytest.approx([p for _, p in again.top_logprobs[0]], abs=1e-6)
    assert done.choices[0].rollout["sampled_logprobs"][0] > entries[0].logprob, "truncation raises what was sampled from"


def test_stop_strings_cut_before_they_show_even_across_tokens(server, client):
    say(server, {"role": "assistant", "content": "one two END three", "reasoning_content": "r"})
    done = create(client, stop=["END", "never"])
    assert done.choices[0].message.content == "one two " and done.choices[0].finish_reason == "stop"
    say(server, {"role": "assistant", "content": "one two END three", "reasoning_content": "r"})
    streamed = "".join(c.choices[0].delta.content or "" for c in create(client, stop="END", stream=True) if c.choices)
    assert streamed == "one two "


def test_rollout_fields_hold_what_a_trainer_replays(server, client):
    server.backend.script[:] = []
    wanted = {f"return_{name}": True for name in ("token_ids", "kept_tokens", "routed_experts", "selected_indices")}
    done = create(client, max_tokens=5, top_p=0.5, extra_body=wanted).choices[0].rollout
    read = lambda f: np.frombuffer(base64.b64decode(f["data"]), f["dtype"]).reshape(f["shape"])  # noqa: E731
    computed = len(done["prompt_token_ids"]) + 4
    assert read(done["routed_experts"]).shape == (computed, 1, 2)
    assert [read(layer).shape for layer in done["selected_indices"]] == [(computed, 32)] * 2
    assert len(read(done["kept_tokens"]["offsets"])) == 6
    exact = server.engine.generate([done["prompt_token_ids"]], SamplingParams(max_tokens=0))[0]
    assert exact.prompt_tokens == tuple(done["prompt_token_ids"])


def test_plain_completions_take_text_or_ids_and_stream(server, client):
    server.backend.script[:] = []
    ids = TOKENIZER.encode("def ")
    by_text = client.completions.create(model="small", prompt="def ", max_tokens=8, temperature=0)
    by_ids = client.completions.create(model="small", prompt=ids, max_tokens=8, temperature=0, logprobs=2)
    streamed = "".join(
        c.choices[0].text for c in client.completions.create(model="small", prompt=ids, max_tokens=8, temperature=0, stream=True)
    )
    assert by_text.choices[0].text == by_ids.choices[0].text == streamed
    assert len(by_ids.choices[0].logprobs.tokens) == 8 and len(by_ids.choices[0].logprobs.top_logprobs[0]) <= 2
    two = client.completions.create(model="small", prompt=[ids, ids], n=2, max_tokens=2, seed=1)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool result"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "not permitted"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"model": "other"}, "model", "not other"),
        ({"max_tokens": 10**6}, "max_tokens", "only"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", "takes"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "zzz"}}}},
            "response_format",
            "zzz",
        ),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0"),
    ],
)
def test_what_is_malformed_is_refused_in_openais_shape_naming_the_field(client, fields, param, text):
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, **fields)
    assert 400 <= caught.value.status_code < 500
    error = caught.value.response.json()["error"]
    assert text in error["message"] and (param is None or error["param"] == param), error


def test_broken_json_is_a_400(server):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b'{"model": ')
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_health_models_and_metrics(server, client):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert [m.id for m in client.models.list().data] == ["small"]
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'rorqual_http_requests_total{path="/health",status="200"}' in figures
    assert "rorqual_engine_held_blocks 0" in figures


def test_a_client_that_disconnects_frees_its_request(server):
    server.backend.script[:] = []
    for stream in (True, False):
        body = json.dumps(
            {"messages": ASK, "max_tokens": 3000, "stream": stream, "logit_bias": {TOKENIZER.eos_id: -100}}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            time.sleep(0.3)
            assert server.engine.pool.num_held > 0
        deadline = time.monotonic() + 5
        while server.engine.pool.num_held and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.engine.pool.num_held == 0


def test_a_full_queue_answers_429_with_retry_after_and_a_key_is_asked_for():
    live = LiveServer(lambda: forced_backend(EngineConfig(max_running=1, cache_tokens=8192), max_waiting=1), api_key="sesame")
    try:
        assert httpx.post(f"{live.url}/v1/chat/completions", json={"messages": ASK}).status_code == 401
        assert httpx.get(f"{live.url}/health").status_code == 200
        headers = {"Authorization": "Bearer sesame"}
        ask = lambda: httpx.post(f"{live.url}/v1/chat/completions", headers=headers, timeout=60,  # noqa: E731
                                 json={"messages": ASK, "max_tokens": 400, "logit_bias": {TOKENIZER.eos_id: -100}})  # fmt: skip
        found = []
        threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        refused = [r for r in found if r.status_code == 429]
        assert refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert any(r.status_code == 200 for r in found)
    finally:
        live.stop()


def test_bodies_beyond_the_limit_are_refused_however_they_are_sent():
    live = LiveServer(forced_backend, ServerConfig(port=0, max_body_bytes=2048))
    try:
        big = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]}).encode()
        assert httpx.post(f"{live.url}/v1/chat/completions", content=big).status_code == 413
        chunks = httpx.post(f"{live.url}/v1/chat/completions", content=iter([big[:1500], big[1500:]]))
        assert chunks.status_code == 413
    finally:
        live.stop()


def test_shutdown_finishes_what_is_under_way_and_then_takes_nothing():
    live = LiveServer(lambda: forced_backend(EngineConfig(cache_tokens=8192)))
    found = []

    def ask():
        body = json.dumps({"messages": ASK, "max_tokens": 300, "logit_bias": {TOKENIZER.eos_id: -100}}).encode()
        request = urllib.request.Request(f"{live.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        found.append(json.loads(urllib.request.urlopen(request, timeout=60).read()))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    live.stop()
    thread.join(60)
    assert found and found[0]["usage"]["completion_tokens"] > 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{live.url}/health")
