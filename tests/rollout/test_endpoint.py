"""An endpoint that misbehaves in every usual way, on a real socket: asked again with bounds, then named, never raised."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rorqual.policy import SamplingParams, StopReason
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

GOOD = {
    "choices": [{"message": {"content": "hi", "reasoning": "r", "tool_calls": [{"id": "1"}]}, "finish_reason": "tool_calls"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


@pytest.fixture
def server():
    """Plays a script of answers, one per request; the last one stays. Records what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer(200, {"data": [{"id": "listed"}]})

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            step = script.pop(0) if len(script) > 1 else script[0]
            if step == "stall":
                time.sleep(1.0)
                return
            if step == "drop":
                self.connection.close()
                return
            self.answer(*step)

        def answer(self, status, body, headers=()):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in [("content-length", str(len(data))), *headers]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    script, asked = [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.script, httpd.asked = script, asked
    yield httpd
    httpd.shutdown()


def ask(server, *script, **options):
    server.script[:] = script
    config = EndpointConfig(f"http://127.0.0.1:{server.server_port}", first_pause_s=0.01, timeout_s=0.3, **options)

    async def main():
        async with EndpointPolicy(config) as policy:
            tools = [{"type": "function", "function": {"name": "f"}}]
            return await policy.reply([{"role": "user", "content": "q"}], tools, SamplingParams(max_tokens=5, top_k=3))

    return asyncio.run(main())


def test_a_reply_carries_reasoning_calls_and_usage(server):
    found = ask(server, (200, GOOD))
    assert found.message == {"role": "assistant", "content": "hi", "reasoning_content": "r", "tool_calls": [{"id": "1"}]}
    assert found.stop_reason == StopReason.STOP and found.usage["prompt_tokens"] == 3
    asked = server.asked[0]
    assert asked["model"] == "listed" and asked["top_k"] == 3 and "min_p" not in asked and asked["tools"]


@pytest.mark.parametrize(
    "failure",
    [(503, {}), (429, {}, [("retry-after", "0.05")]), (200, b"garbage"), (200, {"choices": []}), (200, [1]), "stall", "drop"],
)
def test_failures_that_pass_are_asked_again(server, failure):
    assert ask(server, failure, failure, (200, GOOD)).message["content"] == "hi"


def test_an_endpoint_that_stays_away_is_a_named_value_after_bounded_tries(server):
    found = ask(server, (503, {}), max_tries=3)
    assert found.stop_reason == StopReason.UNAVAILABLE and "status 503" in found.message["failure"]
    assert len(server.asked) == 3


def test_what_will_not_pass_is_not_asked_again(server):
    found = ask(server, (400, {"error": {"message": "too long"}}))
    assert found.stop_reason == StopReason.UNAVAILABLE and "too long" in found.message["failure"]
    assert len(server.asked) == 1
    assert "answered with" in ask(server, (200, b"x" * 5000), max_body_bytes=4096).message["failure"]
