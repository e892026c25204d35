"""The proxy in front of a completions endpoint gives the same messages as the embedded server, and names what upstream does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from rorqual.serve.backend import UpstreamBackend
from tests.serve.conftest import LiveServer
from tests.serve.test_server import ASK, CALLS, TOOLS, create, say


@pytest.fixture(scope="module")
def proxy(server):
    live = LiveServer(lambda: UpstreamBackend(server.url, "small"))
    yield live
    live.stop()


@pytest.fixture
def client(proxy):
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)


def test_messages_through_the_proxy_equal_those_of_the_embedded_server(server, client):
    say(server, CALLS, CALLS)
    embedded = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    direct, through = (create(each, tools=TOOLS) for each in (embedded, client))
    strip = lambda m: [(c.function.name, c.function.arguments) for c in m.tool_calls]  # noqa: E731
    a, b = direct.choices[0].message, through.choices[0].message
    assert (a.content, a.reasoning_content, strip(a)) == (b.content, b.reasoning_content, strip(b))
    assert through.choices[0].finish_reason == "tool_calls" and through.usage.prompt_tokens == direct.usage.prompt_tokens


def test_streams_through_the_proxy_hold_no_marker(server, client):
    say(server, CALLS)
    chunks = list(create(client, tools=TOOLS, stream=True))
    assert "DSML" not in str(chunks) and "think>" not in str(chunks)
    arguments = "".join(
        part.function.arguments or ""
        for c in chunks
        if c.choices
        for part in c.choices[0].delta.tool_calls or []
        if part.index == 0
    )
    assert json.loads(arguments) == {"city": "  Rome\n", "n": 3}


def test_what_the_upstream_cannot_do_is_refused_and_what_it_answers_is_named(client):
    with pytest.raises(openai.BadRequestError, match="can't constrain its upstream"):
        create(client, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="upstream:"):
        create(client, max_tokens=10, messages=[{"role": "user", "content": "x" * 9000}])


@pytest.mark.parametrize("behaviour", ["down", "garbage", "error"])
def test_an_upstream_that_misbehaves_is_a_502(behaviour):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            self.send_response(500 if behaviour == "error" else 200)
            self.end_headers()
            self.wfile.write(b"data: {not json}\n\n")

    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = upstream.server_port
    if behaviour == "down":
        upstream.server_close()
    else:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
    live = LiveServer(lambda: UpstreamBackend(f"http://127.0.0.1:{port}", "m"))
    try:
        answer = httpx.post(f"{live.url}/v1/chat/completions", json={"messages": ASK}, timeout=30)
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "upstream"
    finally:
        live.stop()
        if behaviour != "down":
            upstream.shutdown()
