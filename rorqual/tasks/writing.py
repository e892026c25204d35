"""Programmatic rubrics for texts: each rule is data, `{"rule": NAME, ...}`, and a pure function of the text.

They check form and content words only. Quality is for a judge: `rorqual.rewards.rubric` scores a text by an endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = Mapping[str, Any]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def _is_varied(rule: Rule, text: str) -> bool:
    """A text that says one word over and over is no text."""
    found = [word.lower() for word in words(text)]
    return bool(found) and len(set(found)) >= rule["share"] * len(found)


RULES: dict[str, Callable[[Rule, str], bool]] = {
    "words": lambda rule, text: rule["least"] <= len(words(text)) <= rule["most"],
    "paragraphs": lambda rule, text: len(paragraphs(text)) == rule["count"],
    "sentences": lambda rule, text: len(sentences(text)) >= rule["least"],
    "includes": lambda rule, text: bool(re.search(rf"(?<!\w){re.escape(rule['word'])}(?!\w)", text, re.IGNORECASE)),
    "excludes": lambda rule, text: not re.search(rf"(?<!\w){re.escape(rule['word'])}(?!\w)", text, re.IGNORECASE),
    "without_letter": lambda rule, text: rule["letter"].lower() not in text.lower(),
    "begins": lambda rule, text: [w.lower() for w in words(text)[:1]] == [rule["word"].lower()],
    "ends": lambda rule, text: text.strip().endswith(rule["text"]),
    "initials": lambda rule, text: [p.strip()[:1].upper() for p in paragraphs(text)] == list(rule["letters"]),
    "varied": _is_varied,
}


def broken_rules(rules: Sequence[Rule], text: str) -> list[str]:
    """The names of the rules that the text breaks."""
    return [str(rule["rule"]) for rule in rules if not RULES[rule["rule"]](rule, text)]
