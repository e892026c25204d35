"""Policies that must fail on every good task: what passes for one of them is no task."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from rorqual.synthesis.general.ladder import Attempt, Policy
from rorqual.tasks import SUBMIT, Task

READS = ("list_", "search_", "get_", "count_")


def panel(rng: random.Random) -> dict[str, Policy]:
    """name -> policy: random, first-result, copy-example, single-call, answer-prior, prompt-only."""
    return {
        "random": lambda attempt: _random(attempt, rng, 6),
        "first_result": _first_result,
        "copy_example": _copy_example,
        "single_call": lambda attempt: _random(attempt, rng, 1),
        "answer_prior": _answer_prior,
        "prompt_only": _prompt_only,
    }


def functions(task: Task) -> list[dict[str, Any]]:
    return [tool["function"] for tool in task.tools if tool["function"]["name"] != SUBMIT]


def writes(task: Task) -> list[dict[str, Any]]:
    return [f for f in functions(task) if not f["name"].startswith(READS) and "_of_" not in f["name"]]


def _rows(attempt: Attempt) -> dict[str, list[dict[str, Any]]]:
    """The first page of whatever can be read without arguments: word of the tool's name -> rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for function in functions(attempt.task):
        if not function["parameters"]["required"] and function["name"].startswith(READS):
            reply = attempt.call(function["name"], {})
            listed = reply.get("rows", []) if isinstance(reply, dict) else reply
            rows = [{"id": row} if isinstance(row, str) else row for row in listed]
            found[function["name"]] = [row for row in rows if isinstance(row, dict) and "id" in row]
    return found


def _keys(rows: dict[str, list[dict[str, Any]]], parameter: str) -> list[str]:
    """The ids that a parameter of this name may take: those of a reader whose name holds it, else all."""
    stem = parameter[:-1] if parameter.endswith("y") else parameter
    matching = [row["id"] for name, found in rows.items() if stem in name for row in found]
    return matching or [row["id"] for found in rows.values() for row in found] or ["x"]


def _random(attempt: Attempt, rng: random.Random, count: int) -> str | None:
    rows = _rows(attempt)
    tools = writes(attempt.task)
    for _ in range(count if tools else 0):
        function = rng.choice(tools)
        attempt.call(
            function["name"], {name: _drawn(name, s, rows, rng) for name, s in function["parameters"]["properties"].items()}
        )
    values = [str(value) for found in rows.values() for row in found for value in row.values()]
    return rng.choice(values) if values else None


def _drawn(name: str, schema: dict[str, Any], rows: dict[str, list[dict[str, Any]]], rng: random.Random) -> Any:
    if "enum" in schema:
        return rng.choice(schema["enum"])
    return rng.randint(1, 5) if schema["type"] == "integer" else rng.choice(_keys(rows, name))


def _first_result(attempt: Attempt) -> str | None:
    """The likeliest write tool on the first row of everything, with the prompt's numbers."""
    rows = _rows(attempt)
    function = _likeliest(attempt.task)
    numbers = _numbers(attempt.task.prompt)
    if function:
        _call_with(attempt, function, lambda name: _keys(rows, name)[0], numbers)
    first = next((found[0] for found in rows.values() if found), {})
    return str(list(first.values())[-1]) if first else None


def _copy_example(attempt: Attempt) -> str | None:
    """Each write tool once, with whatever its schema shows: first choices, words of its description."""
    for function in writes(attempt.task):
        _call_with(attempt, function, lambda name: name, [1])
    return "example"


def _answer_prior(attempt: Attempt) -> str | None:
    """No call; the answer that tasks of this kind have most often."""
    return "1" if re.search(r"number of|sum|how many|count", attempt.task.prompt) else "2025-01-01"


def _prompt_only(attempt: Attempt) -> str | None:
    """Reads nothing: what the prompt holds is all that it uses."""
    prompt = attempt.task.prompt
    named = re.findall(r"\b[A-Z][A-Z]+-[0-9A-F]+\b|\b[A-Z][\w-]+\b", prompt)
    function = _likeliest(attempt.task)
    if function:
        _call_with(attempt, function, lambda name: named[0] if named else name, _numbers(prompt))
    return str(_numbers(prompt)[0]) if _numbers(prompt) else (named[0] if named else None)


def _likeliest(task: Task) -> dict[str, Any] | None:
    said = set(re.findall(r"\w+", task.prompt.lower()))
    return max(writes(task), key=lambda f: len(said & set(re.findall(r"\w+", f["description"].lower()))), default=None)


def _numbers(prompt: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?<![\w-])-?\d+(?![\w-])", prompt)]


def _call_with(attempt: Attempt, function: dict[str, Any], key: Any, numbers: Sequence[int]) -> None:
    arguments: dict[str, Any] = {}
    left = list(numbers)
    for name, schema in function["parameters"]["properties"].items():
        if "enum" in schema:
            arguments[name] = schema["enum"][0]
        elif schema["type"] == "integer":
            arguments[name] = left.pop(0) if left else 1
        else:
            arguments[name] = key(name)
    attempt.call(function["name"], arguments)
