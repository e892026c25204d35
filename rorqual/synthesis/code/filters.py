"""Filters of issue-and-patch pairs: heuristics first, then, where there is an endpoint, a model's judgement (paper 3.2.3)."""

from __future__ import annotations

import json
import re
from typing import Any

from rorqual.synthesis.code.pairs import Pair
from rorqual.tasks.language import language, language_of_files
from rorqual.tasks.task import TaskError

LEAST_WORDS, MOST_CHARS, LONG_LINE = 8, 20_000, 25
MOST_FILES, MOST_LINES = 10, 600
QUESTIONS = {
    "issue_is_clear": "the issue says what is wrong, or what is wished for, so that an engineer could begin",
    "patch_is_related": "the patch does what the issue asks for, and little else",
    "tests_are_fair": "the tests check what the issue says, not names or texts that only the patch's author could know",
}
INSTRUCTION = (
    "You filter pairs of an issue and a patch for a benchmark. Reply with one JSON object with the keys "
    + ", ".join(f"{name} (true where {text})" for name, text in QUESTIONS.items())
    + ", and reason (one sentence). Reply with the object alone."
)


def heuristic(pair: Pair) -> str:
    """Why an issue-and-patch pair is refused without being run; empty where it is not."""
    words = re.sub(r"https?://\S+", "", pair.issue).split()
    if len(words) < LEAST_WORDS:
        return f"the issue has {len(words)} words"
    if len(pair.issue) > MOST_CHARS:
        return f"the issue has {len(pair.issue)} characters"
    try:
        speaks = language(language_of_files(pair.new))
        layout = speaks.layout(pair.new)
    except TaskError as error:
        return str(error)
    changed = [path for path in {*pair.old, *pair.new} if pair.old.get(path) != pair.new.get(path)]
    sources = [path for path in changed if speaks.is_source(path, layout)]
    if not sources:
        return "the patch changes no source"
    if not set(changed) & set(layout["tests"]):
        return "no test changes"
    added = [line for path in sources for line in _added(pair.old.get(path, ""), pair.new.get(path, ""))]
    if len(sources) > MOST_FILES or len(added) > MOST_LINES:
        return f"the patch adds {len(added)} lines in {len(sources)} files"
    if any(line in pair.issue for line in added if len(line) >= LONG_LINE):
        return "the issue holds a line of the patch"
    return ""


def _added(before: str, after: str) -> list[str]:
    known = set(before.splitlines())
    return [line.strip() for line in after.splitlines() if line not in known and line.strip()]


def judged(pair: Pair, diff: str, endpoint: str, model: str) -> str:
    """Why a model refuses the pair; empty where it does not. An answer that can't be read is a refusal that says so."""
    import asyncio

    from rorqual.policy import SamplingParams
    from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

    async def ask() -> Any:
        async with EndpointPolicy(EndpointConfig(endpoint, model)) as policy:
            asked = [{"role": "system", "content": INSTRUCTION},
                     {"role": "user", "content": f"Issue:\n{pair.issue}\n\nPatch:\n{diff[:20_000]}"}]  # fmt: skip
            return await policy.reply(asked, (), SamplingParams(max_tokens=1024, temperature=0.0))

    return read_judgement(str(asyncio.run(ask()).message.get("content") or ""))


def read_judgement(text: str) -> str:
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        said = json.loads(found.group()) if found else None
    except ValueError:
        said = None
    if not isinstance(said, dict) or any(not isinstance(said.get(name), bool) for name in QUESTIONS):
        return "the endpoint gave no judgement"
    wrong = [name for name in QUESTIONS if not said[name]]
    return f"{', '.join(wrong)}: {said.get('reason', '')}"[:300] if wrong else ""
