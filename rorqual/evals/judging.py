"""An answer judged by a policy against the right one, where equality can't decide: the way of BrowseComp and of HLE.

The published judges' prompts are their authors'; the one here says the same in our words, and `--judge-template` takes another.
A judge that gives nothing, or no verdict that can be read, has decided nothing: the attempt then has no score, by name.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import UserError
from rorqual.policy import ChatPolicy, ChatReply, SamplingParams, StopReason
from rorqual.tasks import Task
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

TEMPLATE = """Judge whether a response answers a question rightly. The right answer is given; do not solve the question yourself.

Question:
{question}

Right answer:
{gold}

Response:
{response}

Take the response's final answer. It is right only if it means the same as the right answer; numbers may differ by rounding alone.
A response that gives no final answer, or several that differ, is not right. Say in a sentence what the final answer is and
where it differs, then end with one line of its own: "Verdict: right" or "Verdict: wrong".
"""
FIELDS = ("question", "gold", "response")
_VERDICT = re.compile(r"verdict\W+(right|wrong|correct|incorrect)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Judge:
    """A policy that judges. `score` is called from worker threads; the policy is asked on `loop`, where it lives."""

    identity: str
    """What a verdict belongs to: the policy and the template."""
    policy: ChatPolicy
    loop: asyncio.AbstractEventLoop
    template: str = TEMPLATE
    max_tokens: int = 4096
    tries: int = 2
    """How often an answer is asked for that holds a verdict: first greedily, then at temperature 1."""

    def score(self, task: Task, text: str) -> Verdict:
        """Of a task whose payload holds `question` and `gold`. Blocks; never to be called on the loop itself."""
        if not text.strip():
            return failed("no_answer")
        return asyncio.run_coroutine_threadsafe(self._judged(task, text), self.loop).result()

    async def _judged(self, task: Task, text: str) -> Verdict:
        asked = filled(self.template, question=task.payload["question"], gold=task.payload["gold"], response=text)
        messages = [{"role": "user", "content": asked}]
        tokens, said = 0, ""
        for attempt in range(self.tries):
            seed = int(digest([asked, attempt], 8), 16)
            params = SamplingParams(max_tokens=self.max_tokens, temperature=float(attempt > 0), seed=seed)
            reply = await self.policy.reply(messages, (), params)
            if reply.stop_reason not in (StopReason.STOP, StopReason.LENGTH):
                return invalid("judge_unavailable", str(reply.message.get("failure") or reply.stop_reason))
            tokens += _tokens(reply)
            said = str(reply.message.get("content") or "")
            found = verdict_of(said)
            if found is not None:
                measures = {"judge_tokens": float(tokens)}
                return passed(measures) if found else failed("wrong", measures=measures)
        return invalid("judge_undecided", f"the judge gave no verdict: {said[-100:]!r}")


def verdict_of(text: str) -> bool | None:
    """The last verdict of a judge's answer; None where there is none."""
    found = _VERDICT.findall(text)
    return found[-1].lower() in ("right", "correct") if found else None


def filled(template: str, **fields: str) -> str:
    """The template with its fields, in one pass: what a response says is never taken for a field."""
    return re.sub(r"\{(question|gold|response)\}", lambda found: fields[found.group(1)], template)


def read_template(path: str) -> str:
    """A template from a file. Raises UserError where it lacks a field."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    missing = [name for name in FIELDS if f"{{{name}}}" not in text]
    if missing:
        raise UserError(
            f"{path}: a judge's template needs {{{missing[0]}}}; its answer ends in a line Verdict: right or Verdict: wrong"
        )
    return text


def _tokens(reply: ChatReply) -> int:
    return reply.usage.get("prompt_tokens", 0) + reply.usage.get("completion_tokens", 0)
