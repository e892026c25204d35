"""An OpenAI-compatible server for tests whose every reply a function gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = str | list[dict[str, Any]] | bytes
"""A message's text; or its calls, each with a name and arguments in JSON; or the bytes of a reply that is none."""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": json.dumps(arguments)}


@contextmanager
def scripted_model(reply: Callable[[dict[str, Any]], Step]) -> Iterator[str]:
    """The server's address, until the block ends. reply: what is said to a request's body, in a thread of the request's own."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(json.dumps({"data": [{"id": "scripted"}]}).encode())

        def do_POST(self) -> None:
            self._send(_answer(reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))))

        def _send(self, data: bytes) -> None:
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _answer(step: Step) -> bytes:
    if isinstance(step, bytes):
        return step
    message: dict[str, Any] = {"role": "assistant", "content": step if isinstance(step, str) else ""}
    if not isinstance(step, str):
        message["tool_calls"] = [{"id": f"c{i}", "type": "function", "function": f} for i, f in enumerate(step)]
    reason = "stop" if isinstance(step, str) else "tool_calls"
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()
