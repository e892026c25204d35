"""A tiny world of one table, written by hand, that the tests of this room share."""

from __future__ import annotations

from rorqual.tasks import SUBMIT, Task, World
from rorqual.tasks.episode import SUBMIT_TOOL

TOOLS = '''
from typing import Literal


def list_slots() -> list:
    """All slots with their seats."""
    return [dict(row) for row in db.execute("SELECT * FROM slots ORDER BY id")]


def book(slot: str, seats: int, note: str = "", kind: Literal["day", "night"] = "day") -> dict:
    """Book seats in a slot.

    slot: the slot's id
    """
    row = db.execute("SELECT * FROM slots WHERE id = ?", (slot,)).fetchone()
    if row is None:
        raise ToolError("not_found", slot)
    key = new_id("B-")
    db.execute("INSERT INTO bookings VALUES (?, ?, ?)", (key, slot, seats))
    db.execute("UPDATE slots SET taken = taken + ? WHERE id = ?", (seats, slot))
    if row["taken"] + seats > row["capacity"]:
        raise ToolError("full", slot)
    return {"booking": key}


def flood() -> str:
    """Gives back 100 MB."""
    return "x" * 100_000_000


def hang() -> str:
    """Never comes back."""
    while True:
        pass


def crash() -> str:
    """Raises."""
    return 1 // 0


def die() -> str:
    """Kills its process."""
    import os
    os._exit(3)
'''
VERIFIER = """
def verify(initial, final, answer):
    reasons = []
    new = [row for row in final["bookings"] if row["id"] not in {r["id"] for r in initial["bookings"]}]
    target = min((r for r in initial["slots"] if r["capacity"] - r["taken"] >= 2), key=lambda r: r["price"])
    if [(r["slot"], r["seats"]) for r in new] != [(target["id"], 2)]:
        reasons.append("booking")
    for row in final["slots"]:
        if row["taken"] != sum(b["seats"] for b in final["bookings"] if b["slot"] == row["id"]):
            reasons.append("taken")
    if answer != str(target["price"]):
        reasons.append("answer")
    return reasons
"""
SOLUTION = """
def solution(tools):
    free = [row for row in tools.list_slots() if row["capacity"] - row["taken"] >= 2]
    best = min(free, key=lambda row: row["price"])
    tools.book(slot=best["id"], seats=2)
    return str(best["price"])
"""


def world(**changes: object) -> World:
    payload = {
        "schema": [
            "CREATE TABLE slots (id TEXT PRIMARY KEY, capacity INTEGER, taken INTEGER, price INTEGER)",
            "CREATE TABLE bookings (id TEXT PRIMARY KEY, slot TEXT, seats INTEGER)",
            "CREATE TABLE _ids (salt TEXT, given INTEGER)",
        ],
        "rows": {
            "slots": [["S-1", 3, 2, 10], ["S-2", 4, 0, 30], ["S-3", 4, 1, 20]],
            "bookings": [["B-1", "S-1", 2], ["B-2", "S-3", 1]],
            "_ids": [["salt", 0]],
        },
        "keys": {"slots": "id", "bookings": "id"},
        "source": TOOLS,
    }
    return World("w1", "general", payload | changes, fingerprint="f1", mechanisms=("booking",))


def task(solution: str = SOLUTION, verifier: str = VERIFIER, **changes: object) -> Task:
    from rorqual.tasks.host import Host

    load = {name: world().payload[name] for name in ("schema", "rows", "keys")}
    tools = Host().op_load(**load, source=[TOOLS])["tools"]
    return Task(
        **{
            "id": "t1",
            "family": "general",
            "messages": ({"role": "user", "content": "Book two seats in the cheapest slot that has them; tell me its price."},),
            "tools": (*tools, SUBMIT_TOOL),
            "world": "w1",
            "payload": {"solution": solution, "verifier": verifier},
            "max_calls": 6,
            **changes,
        }
    )


assert SUBMIT == "submit"
