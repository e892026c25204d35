"""Attempts at tasks to read turn by turn: thinking, calls, results, the answer, the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rorqual.report.markup import Section, absent, prose
from rorqual.report.reading import Attempt, Run

SHOWN = 9
LONGEST = 6000
"""Characters of one message; the rest is counted."""


def section(run: Run) -> Section:
    paper = "Section 3.2, thinking in tool-use"
    body = prose(
        "What the model did, word for word. The paper lets the model think between tool calls and keeps that thinking until the "
        "next user message (section 3.2.1), so that it does not start over after every result. Failed attempts stand beside "
        "successes; of each kind the ones with most calls were picked, by rule and not by taste."
    )
    chosen = choose(run.attempts)
    if not chosen:
        return Section("trajectories", "Attempts to read", paper, body + absent("This run keeps no attempts at tasks."))
    body += prose(f"{len(chosen)} of {len(run.attempts):,} stored attempts.")
    return Section("trajectories", "Attempts to read", paper, body + "".join(_attempt(a, i) for i, a in enumerate(chosen)))


def choose(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Of the newest sources, in turn, the solved and the failed attempt with most calls, until SHOWN; no task twice."""
    by_source: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_source.setdefault(attempt.source, []).append(attempt)
    ranked = []
    for number, source in enumerate(reversed(by_source)):
        for passed in (True, False):
            kind = [attempt for attempt in by_source[source] if attempt.passed is passed]
            kind.sort(key=lambda a: (a.num_resets, a.num_calls), reverse=True)
            ranked += [(place, number, not passed, attempt) for place, attempt in enumerate(kind[:SHOWN])]
    ranked.sort(key=lambda each: each[:3])
    chosen: list[Attempt] = []
    seen = set()
    for *_, attempt in ranked:
        if attempt.record["task_id"] not in seen and len(chosen) < SHOWN:
            seen.add(attempt.record["task_id"])
            chosen.append(attempt)
    return chosen


def _attempt(attempt: Attempt, number: int) -> str:
    record = attempt.record
    verdict = record.get("verdict") or {}
    outcome = verdict.get("outcome", "no verdict")
    turns = len(record["turns"])
    counts = f"{turns} turn{'s' if turns != 1 else ''}, {attempt.num_calls} call{'s' if attempt.num_calls != 1 else ''}"
    counts += f", {attempt.num_resets} resets" if attempt.num_resets else ""
    head = (
        f"<summary><span class='verdict {escape(outcome)}'>{escape(outcome)}</span> <b>{escape(_task_of(record))}</b> "
        f"<small>{escape(attempt.source)} · {counts} · ended: {escape(str(record['end']).replace('_', ' '))}</small></summary>"
    )
    messages = "".join(_message(message) for message in record["messages"])
    reasons = ", ".join(verdict.get("reasons", ()))
    detail = record.get("detail", "")
    foot = f"<p class='judged'>Verdict: <b>{escape(outcome)}</b>{f' ({escape(reasons)})' if reasons else ''}"
    foot += f"{f'. {escape(detail)}' if detail else ''}</p>"
    return f"<details class='attempt'{' open' if number == 0 else ''}>{head}<div class='turns'>{messages}{foot}</div></details>"


def _task_of(record: Mapping[str, Any]) -> str:
    """What was asked, in one line; the task's id where no user spoke."""
    asked = next((str(m.get("content") or "") for m in record["messages"] if m.get("role") == "user"), "")
    line = " ".join(asked.split()) or record["task_id"]
    return line if len(line) <= 110 else line[:107] + "…"


def _message(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    content = message.get("content") or ""
    if role == "assistant":
        parts = [_part("thinking", "thinks", message.get("reasoning_content") or "")]
        parts += [_part("says", "says", content)]
        parts += [_call(call) for call in message.get("tool_calls") or ()]
        return "".join(parts)
    if role in ("system", "developer"):
        tools = [tool.get("function", {}) for tool in message.get("tools") or ()]
        return _instructions(str(content), tools)
    names = {"user": "asked", "tool": "result"}
    return _part(role, names.get(role, role), str(content))


def _part(kind: str, label: str, text: str) -> str:
    if not text:
        return ""
    cut = f"<em>… {len(text) - LONGEST:,} more characters</em>" if len(text) > LONGEST else ""
    return f"<div class='turn {escape(kind)}'><h4>{escape(label)}</h4><pre>{escape(text[:LONGEST])}{cut}</pre></div>"


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", {})
    arguments = function.get("arguments", "")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    except (ValueError, AttributeError):
        text = str(arguments)
    name = escape(str(function.get("name", "")))
    return f"<div class='turn call'><h4>calls <code>{name}</code></h4><pre>{escape(text)}</pre></div>"


def _instructions(text: str, tools: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{tool.get('name', '')}: {tool.get('description', '')}" for tool in tools]
    whole = "\n".join(filter(None, [text, *lines]))
    return (
        f"<details class='turn system'><summary>instructions{f', {len(tools)} tools' if tools else ''}</summary>"
        f"<pre>{escape(whole[:LONGEST])}</pre></details>"
    )
