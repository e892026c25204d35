"""Primers: the smallest tasks of some families, for models of a few million parameters.

    maths     sums of three digits                    logic         truth values combined from the left
    general   a table behind two tools: look a value up, or change it
    search    one number of a made-up collection      programming   a function of a few steps, called to judge it

The first three are the default; the sandbox in which programs are judged makes the last one slow.

Prompts are a line, tool surfaces under 300 tokens, and words come from one list, so that a tokenizer of two thousand pieces
has each as one. They are tasks like any other: the same store, gates, splits, episodes and verifiers. Worlds are held out by
structure (which tools in which order, types of fields, order of parameters); sums and truth values by their own key.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rorqual.chat import with_tools
from rorqual.errors import require
from rorqual.rollout.gold import GoldPolicy, final_text
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, Made, run
from rorqual.tasks import GateResult, Task, TaskRow, World, digest, open_episode, validate
from rorqual.tasks.plans import gold_plan
from rorqual.tasks.retrieval import facts, read_corpus
from rorqual.tasks.retrieval.document import corpus_digest
from rorqual.tasks.retrieval.facts import NAMES, NOUNS
from rorqual.tasks.session import WorldSession

DOMAINS = ("maths", "logic", "general")
MORE = ("search", "programming")
SEARCH_TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the collection.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "topn": {"type": "integer"}},
            "required": ["query"],
        },
    },
}
"""The browser's, in fewer words."""
STEPS = {"plus": "+", "minus": "-", "times": "*"}
FIELDS = ("size", "price", "age", "weight", "owner", "place", "color", "shape")
ROWS = 6


@dataclass(frozen=True)
class PrimerConfig:
    seed: int = 0
    domains: str = ",".join(DOMAINS)
    """Which, in equal shares."""

    def __post_init__(self) -> None:
        chosen = set(self.domains.split(","))
        require(
            self,
            domains=(
                bool(chosen) and chosen <= {*DOMAINS, *MORE},
                f"some of {', '.join((*DOMAINS, *MORE))}, with commas between",
            ),
        )


def primer(config: PrimerConfig, number: int) -> Made:
    """Candidate `number`."""
    domains = config.domains.split(",")
    rng = random.Random(f"{config.seed}/primer/{number}")
    return _MAKERS[domains[number % len(domains)]](rng)


def _maths(rng: random.Random) -> Made:
    a, b, c = (rng.randrange(10) for _ in range(3))
    work = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return _text("maths", f"{a} + {b} + {c}?", {"kind": "number", "value": str(a + b + c)}, work)


def _logic(rng: random.Random) -> Made:
    words = [rng.random() < 0.5 for _ in range(6)]
    joins = [rng.choice(("and", "or")) for _ in range(5)]
    text, value, work = _word(words[0]), words[0], []
    for join, word in zip(joins, words[1:], strict=True):
        text += f" {join} {_word(word)}"
        after = (value and word) if join == "and" else (value or word)
        work.append(f"{_word(value)} {join} {_word(word)} = {_word(after)}.")
        value = after
    return _text("logic", f"{text}?", {"kind": "exact", "value": _word(value), "aliases": []}, " ".join(work))


def _word(value: bool) -> str:
    return "true" if value else "false"


def _text(family: str, prompt: str, check: dict[str, Any], work: str) -> Made:
    payload = {"check": check, "gold": check["value"], "work": work}
    name, tags = f"primer-{family}-{digest(prompt, 10)}", {"source": "primer", "language": "en"}
    task = Task(name, family, ({"role": "user", "content": prompt},), payload=payload, max_calls=0, tags=tags)
    return Made(TaskRow(task, tuple(gates(task, None, "inline"))))


@dataclass(frozen=True)
class Shape:
    """The structure of a world: everything but its words."""

    numeric: tuple[bool, bool]
    """Whether each of the two fields holds numbers."""
    tools: tuple[tuple[str, int], tuple[str, int]]
    """Two of (get or set, field), in the order in which they are shown."""
    value_first: bool
    """The order of a setter's parameters."""


def draw_shape(rng: random.Random) -> Shape:
    tools = rng.sample([(kind, field) for kind in ("get", "set") for field in (0, 1)], 2)
    return Shape((rng.random() < 0.5, rng.random() < 0.5), (tools[0], tools[1]), rng.random() < 0.5)


def _general(rng: random.Random) -> Made:
    shape, noun, fields = draw_shape(rng), rng.choice(NOUNS), rng.sample(FIELDS, 2)
    names = rng.sample(NAMES, ROWS)
    rows = [[name, *(_value(rng, numeric) for numeric in shape.numeric)] for name in names]
    world = _world(shape, noun, fields, rows)
    kind, at = rng.choice(shape.tools)
    row, field = rng.choice(rows), fields[at]
    if kind == "get":
        ask, verifier = f"{field} of {row[0]}?", READ.format(value=str(row[1 + at]))
        solution = f"def solution(tools):\n    return str(tools.get_{field}(name={row[0]!r}))\n"
    else:
        value = next(v for v in iter(lambda: _value(rng, shape.numeric[at]), None) if v != row[1 + at])
        ask, verifier = f"set {field} of {row[0]} to {value}", WRITE.format(name=row[0], field=field, value=value)
        solution = f"def solution(tools):\n    tools.set_{field}(name={row[0]!r}, {field}={value!r})\n"
    payload = {"solution": solution, "verifier": verifier}
    with WorldSession(world, "inline") as session:
        tools = session.tools
    name = f"primer-general-{digest([world.id, ask], 10)}"
    tags = {"source": "primer", "kind": kind, "language": "en"}
    task = Task(name, "general", ({"role": "user", "content": ask},), tools, world.id, payload, max_calls=3, tags=tags)
    return Made(TaskRow(task, tuple(gates(task, world, "inline"))), world)


READ = """def verify(initial, final, answer):
    reasons = [] if final == initial else ["the table was changed"]
    if (answer or "").strip().rstrip(".") != {value!r}:
        reasons.append("another value was answered")
    return reasons
"""
WRITE = """def verify(initial, final, answer):
    wanted = [dict(row, {field}={value!r}) if row["name"] == {name!r} else row for row in initial["things"]]
    return [] if final["things"] == wanted else ["the table is not as it was asked for"]
"""


def _value(rng: random.Random, numeric: bool) -> int | str:
    return rng.randrange(10, 100) if numeric else rng.choice(NAMES)


def _world(shape: Shape, noun: str, fields: Sequence[str], rows: list[list[Any]]) -> World:
    kinds = ["INTEGER" if numeric else "TEXT" for numeric in shape.numeric]
    columns = ", ".join(f"{field} {kind}" for field, kind in zip(fields, kinds, strict=True))
    payload = {
        "schema": [f"CREATE TABLE things (name TEXT PRIMARY KEY, {columns})"],
        "rows": {"things": rows},
        "keys": {"things": "name"},
        "hidden": [],
        "source": "".join(_tool(shape, tool, noun, fields) for tool in shape.tools),
    }
    structure = digest([list(shape.numeric), [list(tool) for tool in shape.tools], shape.value_first])
    return World(f"primer-{digest(payload, 12)}", "general", payload, structure, ("primer",))


def _tool(shape: Shape, tool: tuple[str, int], noun: str, fields: Sequence[str]) -> str:
    """Python source of one tool."""
    kind, at = tool
    field, annotation = fields[at], "int" if shape.numeric[at] else "str"
    if kind == "get":
        return f'''
def get_{field}(name: str) -> {annotation}:
    """{field} of a {noun}."""
    row = db.execute("SELECT {field} FROM things WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise ToolError("not_found", "no such {noun}")
    return row["{field}"]
'''
    own, other = "name: str", f"{field}: {annotation}"
    parameters = f"{other}, {own}" if shape.value_first else f"{own}, {other}"
    return f'''
def set_{field}({parameters}) -> str:
    """set {field} of a {noun}."""
    done = db.execute("UPDATE things SET {field} = ? WHERE name = ?", ({field}, name))
    if done.rowcount == 0:
        raise ToolError("not_found", "no such {noun}")
    return "done"
'''


def _search(rng: random.Random) -> Made:
    """A number that only the collection tells: one search finds it, and its page is one line."""
    fact = facts.fact(rng.choice(NAMES), rng.choice(NOUNS), rng.choice(facts.FIELDS))
    world = _facts_world()
    payload = {
        "check": {"kind": "number", "value": fact.text},
        "moves": [["search", {"query": fact.title, "topn": 1}]],
        "evidence": [{"url": fact.url, "line": 0, "text": fact.text}],
        "clauses": [{"value": fact.title}],
    }
    name, tags = f"primer-search-{digest(fact.title, 10)}", {"source": "primer", "language": "en"}
    ask = ({"role": "user", "content": f"{fact.title}?"},)
    task = Task(name, "search", ask, (SEARCH_TOOL,), world.id, payload, max_calls=2, tags=tags)
    return Made(TaskRow(task, tuple(gates(task, world, "inline"))), world)


@cache
def _facts_world() -> World:
    payload = {"corpus": facts.NAME, "backend": "fts5", "digest": corpus_digest(read_corpus(facts.NAME))}
    return World(f"primer-{digest(payload, 12)}", "search", payload, digest(payload), ("primer",))


def _programming(rng: random.Random) -> Made:
    steps = [(rng.choice(tuple(STEPS)), rng.randrange(2, 10)) for _ in range(3)]
    text = "x"
    for step, number in steps:
        text = f"({text} {STEPS[step]} {number})"
    tests = [[[x], eval(text, {"x": x})] for x in rng.sample(range(-20, 20), 3)]
    told = ", ".join(f"{step} {number}" for step, number in steps)
    payload = {
        "check": {"kind": "calls", "entry": "f", "tests": tests},
        "gold": f"```python\ndef f(x):\n    return {text}\n```",
        "work": f"{text}.",
    }
    name, tags = f"primer-programming-{digest(told, 10)}", {"source": "primer", "language": "en"}
    task = Task(name, "programming", ({"role": "user", "content": f"f(x): x {told}"},), payload=payload, max_calls=0, tags=tags)
    return Made(TaskRow(task, tuple(gates(task, None, "inline"))))


_MAKERS = {"maths": _maths, "logic": _logic, "general": _general, "search": _search, "programming": _programming}


def gates(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """What the family itself proves: doing nothing fails, the gold solution passes, a reset gives the first state back."""
    return validate(task, world, isolation)


def gold_messages(task: Task, world: World | None) -> list[dict[str, Any]]:
    """The task solved, as one conversation with thoughts: prompt with its tools, calls, observations, answer."""
    plan = gold_plan(task, world, "inline")
    messages = with_tools([dict(message) for message in task.messages], list(task.tools)) if task.tools else list(task.messages)
    seen: list[str] = []
    with contextlib.closing(open_episode(task, world, "inline")) as episode:
        episode.reset()
        policy = GoldPolicy(plan, seed=task.id)
        for step, move in enumerate(plan.moves):
            function = {"name": move.name, "arguments": json.dumps(move.arguments)}
            call = {"id": f"call_{step}", "type": "function", "function": function}
            messages.append({"role": "assistant", "reasoning_content": policy.thought(step, seen), "tool_calls": [call]})
            seen.append(episode.call(move.name, move.arguments))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": seen[-1]})
        thought = policy.thought(len(plan.moves), seen)
    return [*messages, {"role": "assistant", "reasoning_content": thought, "content": final_text(plan, seen)}]


def synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("primer", PrimerConfig, "rorqual.synthesis.primers:primer"), request)


MAKER = Maker("primer", synthesize, gates)
