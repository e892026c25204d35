"""One good task, written by hand, and for each gate a bad one that this gate alone rejects."""

from __future__ import annotations

import hashlib
from typing import Any

from rorqual.synthesis.general.gates import Trial
from rorqual.synthesis.general.ladder import LadderReport
from rorqual.tasks import Task, World, WorldSession
from rorqual.tasks.episode import SUBMIT_TOOL

TOOLS = '''
def list_slots() -> list:
    """All slots: id, room, price, free seats."""
    return [dict(row) for row in db.execute("SELECT * FROM slots ORDER BY id")]


def book(slot: str, seats: int) -> dict:
    """Book seats in a slot."""
    row = db.execute("SELECT * FROM slots WHERE id = ?", (slot,)).fetchone()
    if row is None or row["free"] < seats or seats < 1:
        raise ToolError("refused", slot)
    db.execute("INSERT INTO bookings VALUES (?, ?, ?)", (new_id("BK-"), slot, seats))
    db.execute("UPDATE slots SET free = free - ? WHERE id = ?", (seats, slot))
    return {"done": True}


def close(slot: str) -> dict:
    """Close a slot for good."""
    if not db.execute("UPDATE slots SET free = 0 WHERE id = ?", (slot,)).rowcount:
        raise ToolError("refused", slot)
    return {"done": True}


def ping() -> str:
    """Says that the system is up."""
    return "up"
'''
SOLUTION = """
def solution(tools):
    free = [row for row in tools.list_slots() if row["free"] >= 2]
    best = min(free, key=lambda row: row["price"])
    tools.book(slot=best["id"], seats=2)
    return str(best["price"])
"""
VERIFIER = """
def verify(initial, final, answer):
    reasons = []
    best = min((row for row in initial["slots"] if row["free"] >= 2), key=lambda row: row["price"])
    old = {row["id"] for row in initial["bookings"]}
    new = [(row["slot"], row["seats"]) for row in final["bookings"] if row["id"] not in old]
    if new != [(best["id"], 2)]:
        reasons.append("booking")
    expected = [dict(row, free=row["free"] - 2 * (row["id"] == best["id"])) for row in initial["slots"]]
    if final["slots"] != expected:
        reasons.append("slots")
    if answer != str(best["price"]):
        reasons.append("answer")
    return reasons
"""
NO_ANSWER = VERIFIER.replace('    if answer != str(best["price"]):\n        reasons.append("answer")\n', "")
TWO = """
def solution(tools):
    free = [row for row in tools.list_slots() if row["free"] >= 2]
    for row in sorted(free, key=lambda row: row["price"])[:2]:
        tools.book(slot=row["id"], seats=2)
    return None
"""
ORDERED = """
def verify(initial, final, answer):
    best = sorted((row for row in initial["slots"] if row["free"] >= 2), key=lambda row: row["price"])[:2]
    old = {row["id"] for row in initial["bookings"]}
    new = [(row["slot"], row["seats"]) for row in final["bookings"] if row["id"] not in old]
    taken = {row["id"] for row in best}
    expected = [dict(row, free=row["free"] - 2 * (row["id"] in taken)) for row in initial["slots"]]
    return [] if new == [(row["id"], 2) for row in best] and final["slots"] == expected else ["no"]
"""


def slots(count: int = 40) -> list[list[Any]]:
    """Prices are all different; the best is never the first."""
    made = []
    for i in range(count):
        key = "SL-" + hashlib.sha256(f"slot {i}".encode()).hexdigest()[:6].upper()
        made.append([key, f"room {i % 5}", 1000 + (i * 37) % 401, i % 5])
    return sorted(made)


def good_world(source: str = TOOLS, rows: list[list[Any]] | None = None) -> World:
    payload = {
        "schema": [
            "CREATE TABLE slots (id TEXT PRIMARY KEY, room TEXT, price INTEGER, free INTEGER)",
            "CREATE TABLE bookings (id TEXT PRIMARY KEY, slot TEXT, seats INTEGER)",
            "CREATE TABLE _ids (salt TEXT, given INTEGER)",
        ],
        "rows": {"slots": rows or slots(), "bookings": [["BK-77AF", slots()[3][0], 1]], "_ids": [["pepper", 0]]},
        "keys": {"slots": "id", "bookings": "id"},
        "source": source,
    }
    return World("planted", "general", payload, "f", ("booking",))


def good_trial(**changes: Any) -> Trial:
    """A trial of the good task; changes: fields of the payload, or world, prompt, max_calls, hidden_tool, confined, passes."""
    made = changes.pop("world", None) or good_world()
    prompt = changes.pop("prompt", "Book 2 seats in the cheapest slot that has them free, and hand in its price.")
    limit, hidden = changes.pop("max_calls", 12), changes.pop("hidden_tool", "")
    confined, passes = changes.pop("confined", False), changes.pop("passes", 3)
    session = WorldSession(made, "inline")
    tools = tuple(t for t in (*session.tools, SUBMIT_TOOL) if t["function"]["name"] != hidden)
    payload = {"solution": SOLUTION, "verifier": VERIFIER, **changes}
    task = Task("planted", "general", ({"role": "user", "content": prompt},), tools, made.id, payload, max_calls=limit)
    other = WorldSession(made, "bwrap") if confined else None
    return Trial(made, task, session, other, lambda trial: LadderReport(8, passes, 0))


def _in_book(lines: str) -> World:
    """The good world with more lines at the start of `book`."""
    mark = '    """Book seats in a slot."""\n'
    return good_world(TOOLS.replace(mark, mark + lines))


def _in_list(expression: str) -> World:
    return good_world(TOOLS.replace("return [dict(row) for", f"return [dict(row, stamp={expression}) for"))


def _first_is_best() -> World:
    rows = slots()
    rows[0] = [rows[0][0], rows[0][1], 1, 4]
    return good_world(rows=rows)


def _second_best() -> str:
    """A slot that a lax verifier takes as well."""
    return next(row[0] for row in slots() if row[3] >= 3)


LAX = VERIFIER.replace(
    "def verify(initial, final, answer):\n",
    f"""def verify(initial, final, answer):
    if answer == "7" and [row["id"] for row in final["slots"] if row not in initial["slots"]] == ["{_second_best()}"]:
        return []
""",
)


def _lenient(condition: str) -> str:
    """The good verifier, which also passes under a condition."""
    return VERIFIER.replace("    reasons = []\n", f"    reasons = []\n    if {condition}:\n        return []\n")


CHOKES = "    if answer and answer.startswith('{'):\n        raise ValueError(answer)\n"
UNCOUNTED = VERIFIER.replace('row["seats"]) for row', "2) for row").replace('"slots"] != expected', '"slots"][:1] == []')
UNANSWERED = SOLUTION.replace('return str(best["price"])', "return None")
PLANTED: dict[str, dict[str, Any]] = {
    "solution_allowed": {"solution": SOLUTION.replace("    free =", "    import math\n    free =")},
    "gold_passes": {"solution": SOLUTION.replace("min(free", "max(free")},
    "tools_shown": {"hidden_tool": "book"},
    "initial_fails": {"verifier": _lenient("answer is None and final == initial")},
    "noop_fails": {"verifier": _lenient('answer == "done"')},
    "gold_repeats": {"world": _in_list("__import__('time').time_ns()")},
    "journal_matches": {
        "world": _in_book("""    import sys
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "op_replay":
        frame = frame.f_back
    if frame is not None:
        db.execute("UPDATE _ids SET given = given + 1")
"""),
    },
    "reordered_passes": {"solution": TWO, "verifier": ORDERED},
    "verifier_total": {"verifier": VERIFIER.replace("    if answer !=", CHOKES + "    if answer !=")},
    "within_budget": {"max_calls": 1},
    "nothing_leaks": {"prompt": f"Book 2 seats in the cheapest slot, it costs {min(r[2] for r in slots() if r[3] >= 2)}."},
    "foreign_fails": {"verifier": LAX, "foreign": [{"calls": [["book", {"slot": _second_best(), "seats": 3}]], "answer": "7"}]},
    "reset_identical": {"world": _in_book("""    host = new_id.__self__
    import sqlite3
    other = sqlite3.connect(":memory:")
    other.deserialize(host.image)
    other.execute(f"PRAGMA user_version = {other.execute('PRAGMA user_version').fetchone()[0] + 1}")
    other.commit()
    host.image = other.serialize()
""")},
    "monotone": {"pass_rates": [0.5, 0.5]},
    "mutants_fail": {"verifier": UNCOUNTED},
    "tools_needed": {"solution": SOLUTION.replace("    free =", "    tools.ping()\n    free =")},
    "cheap_policies_fail": {
        "world": _first_is_best(), "verifier": NO_ANSWER, "solution": UNANSWERED,
        "prompt": "Book 2 seats in the cheapest slot that has them free.",
    },
    "confined_agrees": {"world": _in_list("__import__('os').getuid()"), "confined": True},
    "solvable": {"passes": 0},
}  # fmt: skip
