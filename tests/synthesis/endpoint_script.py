"""What a model with typical mistakes says, for tests of the author's loop."""

from __future__ import annotations

import json
import time
from typing import Any

from .planted import NO_ANSWER, SOLUTION, TOOLS, VERIFIER, slots
from .scripted_model import Step, call

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


class Script:
    """Answers by the category that the first user message names, and by how far the conversation is."""

    def __init__(self) -> None:
        self._slips = False

    def __call__(self, body: dict[str, Any]) -> Step:
        messages = body["messages"]
        asked = next(m["content"] for m in messages if m["role"] == "user")
        said = sum(m["role"] == "assistant" for m in messages)
        if not asked.startswith("Category: "):
            return self._solve(asked, said)
        name = asked.removeprefix("Category: ").rstrip(".")
        if name == "garbage":
            return b"<html>502 Bad Gateway</html>"
        if name == "stalls":
            time.sleep(5)
        if name == "breaks off":
            return b'{"choices": [{"mess'
        steps = SCRIPTS.get(name, [])
        return steps[said] if said < len(steps) else "I stop here."

    def _solve(self, asked: str, said: int) -> Step:
        """Solves what it is shown; the harder task only every other time."""
        if said == 0:
            self._slips = not self._slips
        best = HARDER_BEST if "outside" in asked and not self._slips else BEST
        return [[call("book", slot=best[0], seats=2)], [call("submit", answer=str(best[2]))]][min(said, 1)]
