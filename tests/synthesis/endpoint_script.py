"""A scripted OpenAI-compatible server that plays a model with typical mistakes, for tests of the author's loop."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .planted import NO_ANSWER, SOLUTION, TOOLS, VERIFIER, slots

DATABASE = "\n".join(
    [
        "CREATE TABLE slots (id TEXT PRIMARY KEY, room TEXT, price INTEGER, free INTEGER);",
        "CREATE TABLE bookings (id TEXT PRIMARY KEY, slot TEXT, seats INTEGER);",
        *(f"INSERT INTO slots VALUES ('{a}', '{b}', {c}, {d});" for a, b, c, d in slots()),
        f"INSERT INTO bookings VALUES ('BK-77AF', '{slots()[3][0]}', 1);",
    ]
)
TASK = json.dumps({"prompt": "Book 2 seats in the cheapest slot that has them free, and hand in its price.", "asks_answer": True})
ALWAYS = "def verify(initial, final, answer):\n    return True\n"
WRONG_TOOL = SOLUTION.replace("tools.book(", "tools.reserve_seats(")
WITH_DATABASE = "import sqlite3\n" + SOLUTION.replace("tools.list_slots()", "sqlite3.connect('world.db').execute('SELECT 1')")
BEST = min((row for row in slots() if row[3] >= 2), key=lambda row: row[2])
TRAP = SOLUTION.replace('row["free"] >= 2]', 'row["free"] >= 2 and row["room"] != "room 2"]')
HARDER_TASK = json.dumps(
    {"prompt": "Book 2 seats in the cheapest slot with room for them, outside room 2; hand in its price.", "asks_answer": True}
)
HARDER_VERIFIER = VERIFIER.replace('if row["free"] >= 2)', 'if row["free"] >= 2 and row["room"] != "room 2")')
HARDER_BEST = min((row for row in slots() if row[3] >= 2 and row[1] != "room 2"), key=lambda row: row[2])


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": json.dumps(arguments)}


def write(path: str, text: str) -> dict[str, Any]:
    return call("write_file", path=path, text=text)


BUILD = [write("database.sql", DATABASE), write("tools.py", TOOLS), write("task.json", TASK)]
SCRIPTS: dict[str, list[Any]] = {
    # Explores, calls a tool that is not there, sends broken arguments; then each typical mistake, repaired one by one.
    "repairs": [
        [call("bash", command="echo hello && python3 -c 'print(6*7)'"), call("search", query="Europe", source="zones")],
        [call("browse", url="https://example.org"), {"name": "bash", "arguments": "{not json"}],
        [*BUILD, write("solution.py", WRONG_TOOL), write("verify.py", ALWAYS)],
        [call("check")],
        [write("solution.py", WITH_DATABASE), call("check")],
        [write("solution.py", SOLUTION), call("check")],
        [write("verify.py", VERIFIER), call("check")],
        [call("submit")],
        [write("task.json", HARDER_TASK), call("check")],
        [write("solution.py", TRAP), write("verify.py", HARDER_VERIFIER), call("check")],
        [call("submit")],
    ],
    "always passes": [[*BUILD, write("solution.py", SOLUTION), write("verify.py", ALWAYS)], *[[call("submit")]] * 20],
    "ignores answer": [[*BUILD, write("solution.py", SOLUTION), write("verify.py", NO_ANSWER)], *[[call("check")]] * 20],
    "stops": [BUILD, "I have made the files.", "It is done, really.", "Good-bye."],
    "bad sql": [[write("database.sql", "CREATE TABEL x;"), call("check")], *[[call("check")]] * 20],
    "tools hang": [
        [
            *BUILD,
            write("tools.py", TOOLS + "\nwhile True:\n    pass\n"),
            write("solution.py", SOLUTION),
            write("verify.py", VERIFIER),
        ],
        *[[call("check")]] * 20,
    ],
    "chatters": [[call("bash", command="true")]] * 200,
}


class Script(BaseHTTPRequestHandler):
    """Answers by the category that the first user message names, and by how far the conversation is."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = body["messages"]
        asked = next(m["content"] for m in messages if m["role"] == "user")
        said = sum(m["role"] == "assistant" for m in messages)
        if not asked.startswith("Category: "):
            return self._send(answer(self._solve(messages, said)))
        name = asked.removeprefix("Category: ").rstrip(".")
        if name == "garbage":
            return self._raw(b"<html>502 Bad Gateway</html>")
        if name == "stalls":
            time.sleep(5)
        if name == "breaks off":
            return self._raw(b'{"choices": [{"mess')
        steps = SCRIPTS.get(name, [])
        self._send(answer(steps[said] if said < len(steps) else "I stop here."))

    def _solve(self, messages: list[dict[str, Any]], said: int) -> Any:
        """Solves what it is shown; the harder task only every other time."""
        is_harder = "outside" in next(m["content"] for m in messages if m["role"] == "user")
        slip = self.server.slips = not getattr(self.server, "slips", False) if said == 0 else getattr(self.server, "slips", False)  # type: ignore[attr-defined]
        best = HARDER_BEST if is_harder and not slip else BEST
        return [[call("book", slot=best[0], seats=2)], [call("submit", answer=str(best[2]))]][min(said, 1)]

    def _send(self, value: Any) -> None:
        self._raw(json.dumps(value).encode())

    def _raw(self, data: bytes) -> None:
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass


def answer(step: Any) -> dict[str, Any]:
    if isinstance(step, str):
        return {"choices": [{"message": {"role": "assistant", "content": step}, "finish_reason": "stop"}]}
    calls = [{"id": f"c{i}", "type": "function", "function": function} for i, function in enumerate(step)]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"choices": [{"message": message, "finish_reason": "tool_calls"}]}


def serve() -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
