"""The cold start's device: system prompts that join reasoning and tool use [V3.2, 3.2.2 and appendix B, tables 6 to 8].

There is reasoning data without tools and agent data without reasoning. Under the first prompt a model reasons inside <think>
tags (table 6); under the second it calls tools and does not reason (table 7); the third asks for both at once, calls inside
the reasoning (table 8). The wording here is ours, in the paper's structure. Its slots {TOOL-DESCRIPTIONS} and
{TOOLCALL-FORMAT} are what the chat format itself writes after a system message that has tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal["reasoning", "answering", "agent", "merged"]
"""reasoning: thinks, no tools. answering: neither. agent: tools, does not think. merged: tools while thinking."""
THINKS: dict[Kind, bool] = {"reasoning": True, "answering": False, "agent": False, "merged": True}
USES_TOOLS: dict[Kind, bool] = {"reasoning": False, "answering": False, "agent": True, "merged": True}

ROLES = {
    "programming": "You are an expert Python programmer.",
    "code": "You are an expert software engineer who mends faults in repositories.",
    "maths": "You are an expert mathematician.",
    "logic": "You are an expert at puzzles and logical reasoning.",
    "search": "You are an expert researcher who finds facts in a collection of documents.",
    "interpreter": "You are an expert analyst with a Python notebook.",
    "general": "You are a careful assistant who works with tools.",
    "writing": "You are an experienced writer.",
}
REASONING = "{role} Reason first, inside <think> and </think>, and then give the final answer."
ANSWERING = "{role} Give the final answer at once."
AGENT = "{role} You have the tools below. Call them in as many turns as the task needs, then answer."
MERGED = (
    "{role} You have the tools below and may call them several times while you reason, that is before </think>; at most "
    "{max_calls} calls. Call early, and go on until the task is solved. Prefer a call to long deliberation in words, and be "
    "succinct. The final answer follows the reasoning and calls no tools."
)
TEMPLATES: dict[Kind, str] = {"reasoning": REASONING, "answering": ANSWERING, "agent": AGENT, "merged": MERGED}


def system_prompt(kind: Kind, domain: str, max_calls: int = 20) -> str:
    """The prompt of a kind for a domain. max_calls: the paper's 20 executions."""
    role = ROLES.get(domain, "You are a careful assistant.")
    return TEMPLATES[kind].format(role=role, max_calls=max_calls)


def with_system_prompt(messages: Sequence[Mapping[str, Any]], prompt: str) -> tuple[dict[str, Any], ...]:
    """The messages with the prompt before their own system message, or as a new one."""
    if messages and messages[0].get("role") == "system":
        own = str(messages[0].get("content") or "")
        return ({**messages[0], "content": f"{prompt}\n\n{own}"}, *(dict(message) for message in messages[1:]))
    return ({"role": "system", "content": prompt}, *(dict(message) for message in messages))
