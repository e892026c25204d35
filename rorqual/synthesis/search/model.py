"""A model behind an endpoint as an answerer: with the search tools, or without any."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from rorqual.policy import SamplingParams
from rorqual.tasks.answer import ANSWER_LINE, final_answer
from rorqual.tasks.retrieval import BROWSER_TOOLS, Browser

MAX_TURNS, MAX_PAGE = 16, 8000


def answer_by_model(browser: Browser, question: str, endpoint: str, model: str) -> str:
    """The short name that a model gives after browsing; empty where it gives none."""
    text = reply(f"{question}\n\n{ANSWER_LINE}", endpoint, model, browser)
    return (final_answer(text) or "").rpartition("/")[2] if text else ""


def reply(prompt: str, endpoint: str, model: str, browser: Browser | None) -> str:
    """The model's last message; with a browser it may call its tools on the way. Empty where it says nothing at last."""
    return asyncio.run(_reply(prompt, endpoint, model, browser))


async def _reply(prompt: str, endpoint: str, model: str, browser: Browser | None) -> str:
    from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

    messages: list[Any] = [{"role": "user", "content": prompt}]
    params = SamplingParams(max_tokens=4096, temperature=0.0)
    async with EndpointPolicy(EndpointConfig(endpoint, model)) as policy:
        for _ in range(MAX_TURNS):
            said = (await policy.reply(messages, BROWSER_TOOLS if browser else (), params)).message
            messages.append(said)
            if browser is None or not (calls := said.get("tool_calls") or []):
                return str(said.get("content") or "")
            for call in calls:
                text = _called(browser, call)
                messages.append({"role": "tool", "tool_call_id": call.get("id", ""), "content": text[:MAX_PAGE]})
    return ""


def _called(browser: Browser, call: dict[str, Any]) -> str:
    function = call.get("function") or {}
    try:
        given = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError):
        given = None
    if not isinstance(given, dict):
        return '{"error": "invalid_arguments", "message": "arguments must be a JSON object"}'
    return browser.observe(str(function.get("name")), given)
