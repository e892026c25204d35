"""An OpenAI-shaped endpoint on loopback that says what a test wants, and fails as a test wants."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Live:
    """`answer(body, number)` gives the text of the number-th reply, or (status, raw bytes) in its place; None hangs up."""

    def __init__(self, answer):
        self.answer, self.bodies, self.lock = answer, [], threading.Lock()

    def take(self, body):
        with self.lock:
            self.bodies.append(body)
            return self.answer(body, len(self.bodies))


def reply(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def live_endpoint(answer):
    """Yields (url, Live)."""
    live = Live(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def send(self, status, data):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            with suppress(OSError):  # a client that gave up
                self.end_headers()
                self.wfile.write(data)

        def do_GET(self):
            self.send(200, json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode())

        def do_POST(self):
            said = live.take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if said is None:
                self.close_connection = True
                self.connection.close()
            elif isinstance(said, str):
                self.send(200, json.dumps(reply(said)).encode())
            else:
                self.send(*said)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", live
    finally:
        server.shutdown()
        server.server_close()
