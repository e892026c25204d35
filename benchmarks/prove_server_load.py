"""64 clients for 60 seconds, with random disconnects, over-long prompts, broken JSON and slow readers: the server never
crashes, leaks no cache block, keeps its memory flat, and every request it answers is right (equal to the offline engine).

All traffic stays on loopback, bounded in time and in number of clients; in the quick form each client does a fixed number of
deeds instead, and its answers are counted. A second part kills the server with SIGKILL while
requests are in flight and starts it again: what was asked before the kill is lost, nothing else.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 110
QUICK_SECONDS = 25
PROMPTS = [f"Count to {n}." for n in range(8)]


def main(quick: bool) -> dict[str, Any]:
    clients, seconds, deeds = (12, float("inf"), 8) if quick else (64, 60.0, 1 << 30)
    with tempfile.TemporaryDirectory() as directory:
        expected = checkpoint(Path(directory) / "model")
        server = Server(directory)
        try:
            wait_ready(server.port)
            warm = rss(server.pid)
            counts, wrong = storm(server.port, clients, seconds, deeds, expected)
            held, after = settled(server.port), rss(server.pid)
            assert server.process.poll() is None, "the server crashed"
            assert not wrong, wrong[:3]
            assert held == 0, f"{held} cache blocks leaked"
            assert counts["right"] > clients, counts
            assert after < warm + 400e6, f"memory grew from {warm} to {after} bytes"
            restarted_s = killed_and_restarted(server, expected)
        finally:
            server.process.kill()
    return {"clients": clients, "answers": dict(counts), "rss_before": warm, "rss_after": after,
            "restart_seconds": restarted_s}  # fmt: skip


def checkpoint(path: Path) -> dict[str, str]:
    """Write a small model; the greedy answer to each prompt, from the offline engine."""
    from rorqual.chat import encode_tokens, parse_tokens
    from rorqual.engine import Engine
    from rorqual.model.transformer import Transformer
    from rorqual.model.weights import save_model
    from rorqual.policy import SamplingParams
    from tests.serve.conftest import CONFIG, TOKENIZER

    model = Transformer(CONFIG, seed=1)
    save_model(model, path, dtype="float32")
    TOKENIZER.backend.save(str(path / "tokenizer.json"))
    params = SamplingParams(max_tokens=24, temperature=0, stop_tokens=(TOKENIZER.eos_id,))
    prompts = [encode_tokens([{"role": "user", "content": text}], TOKENIZER, thinking=False) for text in PROMPTS]
    done = Engine(model).generate(prompts, params)
    messages = [parse_tokens(each.tokens, TOKENIZER, thinking=False, mode="tolerant") for each in done]
    return {text: message["content"] or "" for text, message in zip(PROMPTS, messages, strict=True)}


class Server:
    """`rorqual serve` as a user starts it, on a free port of loopback."""

    def __init__(self, directory: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable, "-m", "rorqual", "serve", f"{directory}/model", "--port", str(self.port),
            "--cache-tokens", "8192", "--max-waiting", "40", "--no-thinking",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
        self.pid = self.process.pid


def storm(port: int, clients: int, seconds: float, deeds: int, expected: dict[str, str]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(port, seed, end, deeds, expected, counts, wrong)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, wrong


def client(
    port: int, seed: int, end: float, deeds: int, expected: dict[str, str], counts: Counter[str], wrong: list[str]
) -> None:
    draw = random.Random(seed)
    for _ in range(deeds):
        if time.monotonic() >= end:
            break
        deed = draw.choice(["ask", "ask", "ask", "stream", "stream", "vanish", "long", "broken", "slow"])
        try:
            counts[DEEDS[deed](port, draw, expected, wrong)] += 1
        except OSError as error:
            counts[f"socket: {type(error).__name__}"] += 1
            time.sleep(0.05)


def post(port: int, body: bytes, timeout: float = 300) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return raw


def read(raw: socket.socket, pause: float = 0.0) -> tuple[int, str]:
    data = b""
    with raw:
        while chunk := raw.recv(256 if pause else 65536):
            data += chunk
            time.sleep(pause)
    head, _, rest = data.partition(b"\r\n\r\n")
    text = dechunked(rest) if b"chunked" in head.lower() else rest
    return (int(head.split(b" ")[1]) if head else 0), text.decode()


def dechunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        count = int(size or b"0", 16)
        out, data = out + data[:count], data[count + 2 :]
    return out


def request(draw: random.Random, stream: bool) -> tuple[str, bytes]:
    text = draw.choice(PROMPTS)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0, "stream": stream}
    return text, json.dumps(body).encode()


def ask(
    port: int, draw: random.Random, expected: dict[str, str], wrong: list[str], stream: bool = False, pause: float = 0.0
) -> str:
    text, body = request(draw, stream)
    status, answer = read(post(port, body), pause)
    if status == 429:
        time.sleep(0.2)
        return "429"
    if status != 200:
        wrong.append(f"status {status}: {answer[:200]}")
        return "wrong"
    given = streamed(answer) if stream else json.loads(answer)["choices"][0]["message"]["content"] or ""
    if given != expected[text]:
        wrong.append(f"{text}: {given!r} is not {expected[text]!r}")
    return "right"


def streamed(answer: str) -> str:
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices"))


def vanish(port: int, draw: random.Random, expected: dict[str, str], wrong: list[str]) -> str:
    raw = post(port, request(draw, draw.random() < 0.5)[1])
    time.sleep(draw.random() * 0.3)
    raw.close()
    return "vanished"


def refused(body: bytes) -> Any:
    def deed(port: int, draw: random.Random, expected: dict[str, str], wrong: list[str]) -> str:
        status, answer = read(post(port, body))
        if status not in (400, 429):
            wrong.append(f"expected 400, found {status}: {answer[:100]}")
        return f"refused {status}"

    return deed


DEEDS = {
    "ask": ask,
    "stream": lambda *given: ask(*given, stream=True),
    "slow": lambda *given: ask(*given, stream=True, pause=0.02),
    "vanish": vanish,
    "long": refused(json.dumps({"messages": [{"role": "user", "content": "x" * 20000}]}).encode()),
    "broken": refused(b'{"messages": [{"role"'),
}


def wait_ready(port: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if get(port, "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def get(port: int, path: str) -> tuple[int, str]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return read(raw)


def settled(port: int) -> int:
    """Held blocks once nothing is in flight."""
    held = -1
    for _ in range(600):
        figures = dict(line.rsplit(" ", 1) for line in get(port, "/metrics")[1].splitlines() if not line.startswith("#"))
        held = int(figures["rorqual_engine_held_blocks"])
        if held == 0:
            break
        time.sleep(0.1)
    return held


def rss(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def killed_and_restarted(server: Server, expected: dict[str, str]) -> float:
    """SIGKILL with requests in flight, start again, and be answered rightly."""
    draw = random.Random(0)
    flying = [post(server.port, request(draw, True)[1]) for _ in range(4)]
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    for raw in flying:
        raw.close()
    began = time.monotonic()
    server.start()
    wait_ready(server.port)
    wrong: list[str] = []
    assert ask(server.port, draw, expected, wrong) == "right" and not wrong, wrong
    return round(time.monotonic() - began, 2)
