"""tau2 retail as a foreign environment: its policy, database and tasks imported from its files; the tools are ours.

A task's check is the database that its gold actions leave, replayed through our tools (any other change fails), and the facts
that must be told to the user. The user is played by a ChatPolicy from the task's instructions, and reached by a tool, so that an
episode is like any other.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from rorqual.policy import ChatPolicy, Message, SamplingParams
from rorqual.tasks.episode import WorldEpisode
from rorqual.tasks.session import ToolCall, WorldSession
from rorqual.tasks.task import Provenance, Task, TaskError, World, canonical

TABLES = ("products", "users", "orders")
TALK = "talk_to_user"
STOP = "###STOP###"
"""With this in its message the user ends the conversation."""
TALK_TOOL = {
    "type": "function",
    "function": {
        "name": TALK,
        "description": "Say something to the user; gives back what the user answers.",
        "parameters": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]},
    },
}
USER_SYSTEM = """You are a customer. Play the part below; say only what it lets you know, and bit by bit. Answer {stop} once all
that you want is done or refused.

{instructions}"""
VERIFIER = """
EXPECTED = {expected}
FACTS = {facts}


def verify(initial, final, answer):
    reasons = []
    for table, rows in initial.items():
        before, after = ({{row["id"]: row["record"] for row in r}} for r in (rows, final[table]))
        for key in {{**before, **after}}:
            expected = EXPECTED.get(table, {{}}).get(key, before.get(key))
            if after.get(key) != expected:
                reasons.append(f"{{table}} {{key}} is not as expected")
    told = (answer or "").replace(",", "").lower()
    return reasons + [f"the user was not told {{fact}}" for fact in FACTS if fact.replace(",", "").lower() not in told]
"""


def load_retail(directory: Path) -> tuple[World, list[Task]]:
    """The world and its tasks. Raises TaskError where a file is missing.

    Each gold action is replayed; what the tools refused is kept, with the reason, as `gold_refused`: look-ups by an address or id
    that the user has wrong, and two deeds that the policy forbids (an exchange of an order that is not delivered, and one that
    the gift card does not cover).
    """
    files = {name: directory / name for name in ("db.json", "policy.md", "tasks.json")}
    for path in files.values():
        if not path.is_file():
            raise TaskError(f"{path}: not there; tau2 retail is db.json, policy.md and tasks.json")
    data = json.loads(files["db.json"].read_text(encoding="utf-8"))
    world = World(
        "tau2-retail", "retail",
        {
            "schema": [f"CREATE TABLE {table} (id TEXT PRIMARY KEY, record TEXT)" for table in TABLES],
            "rows": {table: [[key, json.dumps(record)] for key, record in data[table].items()] for table in TABLES},
            "keys": dict.fromkeys(TABLES, "id"),
            "source": (Path(__file__).parent / "retail_tools.py").read_text(encoding="utf-8"),
        },
        "tau2-retail", ("retail",), (Provenance("tau2 retail", "db.json", licence="MIT"),),
    )  # fmt: skip
    policy = files["policy.md"].read_text(encoding="utf-8")
    with WorldSession(world, "inline") as session:
        made = [_task(value, policy, session) for value in json.loads(files["tasks.json"].read_text(encoding="utf-8"))]
    return world, made


def _task(value: dict[str, Any], policy: str, session: WorldSession) -> Task:
    criteria = value["evaluation_criteria"]
    gold = [[action["name"], action["arguments"]] for action in criteria["actions"] or []]
    replay = session.replay(gold)
    refused = [[*call.pair, json.loads(call.observation)["error"]] for call in replay.calls if call.is_error]
    expected: dict[str, dict[str, str]] = {}
    for table, key, row in replay.delta:
        expected.setdefault(table, {})[key] = row["record"]
    facts = [str(fact) for fact in criteria["communicate_info"] or []]
    payload = {
        "gold_calls": gold,
        "gold_refused": refused,
        "facts": facts,
        "instructions": user_instructions(value["user_scenario"]["instructions"]),
        "verifier": VERIFIER.format(expected=canonical(expected), facts=canonical(facts)),
    }
    messages = ({"role": "system", "content": policy}, {"role": "user", "content": f"A user is waiting. Greet them with {TALK}."})
    tags = {"kind": "dialogue", "source": "tau2-retail"}
    return Task(
        f"tau2-retail-{value['id']}", "retail", messages, (*session.tools, TALK_TOOL), "tau2-retail", payload, 0, 60, tags
    )


def user_instructions(value: Any) -> str:
    """What the user's part says, as one text."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{name.replace('_', ' ')}: {text}" for name, text in value.items() if text)


class RetailEpisode(WorldEpisode):
    """An episode with a user, who answers to the tool talk_to_user. What was said to the user is the answer that is checked."""

    def __init__(self, task: Task, world: World, user: ChatPolicy, isolation: str = "bwrap", session: WorldSession | None = None):
        super().__init__(task, world, isolation, session)
        self.user = user
        self._said: list[str] = []
        self._heard: list[Message] = []
        self._has_left = False

    @property
    def is_over(self) -> bool:
        return self._has_left or super().is_over

    def reset(self) -> Any:
        self._said, self._has_left = [], False
        system = USER_SYSTEM.format(stop=STOP, instructions=self.task.payload["instructions"])
        self._heard = [{"role": "system", "content": system}]
        return super().reset()

    def _call(self, name: str, arguments: dict[str, Any] | None) -> ToolCall:
        if name != TALK or arguments is None:
            return super()._call(name, arguments)
        text = str(arguments.get("message", ""))
        self._said.append(text)
        self._heard.append({"role": "user", "content": text})
        reply = asyncio.run(self.user.reply(self._heard, (), SamplingParams(max_tokens=512))).message
        self._heard.append(reply)
        answer = str(reply.get("content") or "")
        self._has_left = STOP in answer
        return ToolCall(name, arguments, json.dumps({"user": answer}, ensure_ascii=False))

    def finish(self, text: str | None = None) -> Any:
        return super().finish("\n".join([*self._said, text or ""]))
