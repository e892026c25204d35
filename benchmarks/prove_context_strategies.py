"""BrowseComp-style questions in a small window: accuracy against real steps for each context strategy, on 200 questions.

The searcher is a program, not a model: its figures say what the strategies do to a policy with these habits, nothing of a model.
It follows a chain of facts through search and open, and sometimes misreads a document; what it noted, right or wrong, it believes
as long as it sees the note (its reasoning), for it seldom reads again what it has noted. It knows a wrong answer when it sees one
(the question tells how the name begins and ends), and then wanders. So an error can be undone by forgetting it, which is what
the discards do and a summary does not.

Asserted: every strategy answers more than `none`; real steps are counted across resets. Reported: whether the order of the
paper's figure 6 (discard-all above summary above discard-75, parallel near discard-all with more steps) appears.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.evals import browse, runner
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import benchmark
from rorqual.evals.policies import Player, calls, says
from rorqual.evals.results import curve, table
from rorqual.policy import ChatReply, Message, SamplingParams, StopReason
from rorqual.rollout.agent import speaker_of

SECONDS = 420
QUICK_SECONDS = 60
WINDOW, MAX_TURNS, RUNS = 4000, 240, 8
CONTEXTS = ("none", "summary", "discard-75", "discard-all", "parallel-fewest-step")
NOTE = re.compile(r"hop (\d+) is ([A-Z]\w+ [A-Z]\w+)")
QUESTION = re.compile(r"Who was (.*) of (\w+ \w+)\? \(The name begins with (\w+) and ends with (\w+)\.\)")


@dataclass
class Searcher:
    """A ChatPolicy that knows only what it is shown: every belief is in its notes, every draw from the turn's seed."""

    misreads: float = 0.25
    wanders: float = 0.15
    rereads: float = 0.1
    """How often it doubts a note when its answer is wrong."""
    seen: set[str] = field(default_factory=set)

    async def reply(self, messages: Sequence[Message], tools: Sequence, params: SamplingParams) -> ChatReply:
        draw = random.Random(params.seed)
        if not tools:
            return self._measured(messages, says(self._summary(messages)))
        reply = self._act(messages, draw)
        return self._measured(messages, reply)

    def _act(self, messages: Sequence[Message], draw: random.Random) -> ChatReply:
        relations, start, head, tail = self._question(messages)
        notes = {0: start} | self._notes(messages)
        thought = self._read(messages, relations, notes, draw)
        if thought is not None:
            notes[thought[0]] = thought[1]
        hop = max(notes)
        if hop >= len(relations):
            name = notes[len(relations)]
            if name.startswith(head) and name.endswith(tail):
                return says(f"\\boxed{{{name}}}")
            # Something is wrong, and its notes do not say what: it looks around, and seldom reads a document again.
            hop = draw.randrange(len(relations)) if draw.random() < self.rereads else None
        if hop is None or draw.random() < self.wanders:
            return self._say(thought, calls("search", {"query": draw.choice(list(notes.values())).split()[0]}), "looking around")
        found = self._document(messages, notes[hop]) if hop in notes else None
        if hop not in notes:
            return self._say(thought, calls("search", {"query": start}), "looking around")
        if found is None:
            return self._say(thought, calls("search", {"query": notes[hop]}), f"seeking {notes[hop]}")
        return self._say(thought, calls("open", {"id": found}), f"reading for hop {hop + 1}")

    def _say(self, thought: tuple[int, str] | None, reply: ChatReply, plan: str) -> ChatReply:
        text = f"hop {thought[0]} is {thought[1]}; {plan}" if thought else plan
        return ChatReply({**reply.message, "reasoning_content": text}, reply.stop_reason)

    def _question(self, messages: Sequence[Message]) -> tuple[list[str], str, str, str]:
        text = next(m["content"] for m in messages if m["role"] == "user")
        found = QUESTION.search(text)
        assert found is not None
        relations = [part.removeprefix("the ") for part in found.group(1).split(" of ")]
        return relations[::-1], found.group(2), found.group(3), found.group(4)

    def _notes(self, messages: Sequence[Message]) -> dict[int, str]:
        """What it believes: the latest note of each hop that it still sees, in its reasoning or in a summary."""
        texts = [str(m.get("reasoning_content") or "") if m["role"] == "assistant" else str(m["content"]) for m in messages]
        speakers = [m["role"] for m in messages]
        return {
            int(hop): name
            for text, role in zip(texts, speakers, strict=True) if role in ("assistant", "user")
            for hop, name in NOTE.findall(text)
        }  # fmt: skip

    def _read(
        self, messages: Sequence[Message], relations: Sequence[str], notes: dict[int, str], draw: random.Random
    ) -> tuple[int, str] | None:
        """The note it takes of the document just opened for a hop; a misreading takes another fact of the same document."""
        if len(messages) < 2 or messages[-1]["role"] != "tool":
            return None
        plan = re.search(r"reading for hop (\d+)", str(messages[-2].get("reasoning_content") or ""))
        if plan is None:
            return None
        hop, facts = int(plan.group(1)), re.findall(r"The (\w+) of \w+ \w+ was (\w+ \w+)\.", messages[-1]["content"])
        right = dict(facts).get(relations[hop - 1])
        if right is None:
            return None
        return hop, draw.choice([name for _, name in facts]) if draw.random() < self.misreads else right

    def _document(self, messages: Sequence[Message], name: str) -> str | None:
        """The id of a person's document, where a search that it still sees has shown it."""
        for message in reversed(messages):
            if message["role"] == "tool":
                found = re.search(rf"【(\w+)†{name}】", message["content"])
                if found:
                    return found.group(1)
        return None

    def _summary(self, messages: Sequence[Message]) -> str:
        return "; ".join(f"hop {hop} is {name}" for hop, name in sorted(self._notes(messages).items())) or "nothing yet"

    def _measured(self, messages: Sequence[Message], reply: ChatReply) -> ChatReply:
        """Lengths as a quarter of the characters, so that the window is the same in every run."""
        usage = {"prompt_tokens": sum(map(_length, messages)) // 4, "completion_tokens": max(_length(reply.message) // 4, 1)}
        return ChatReply(reply.message, StopReason.STOP, usage=usage)


def _length(message: Message) -> int:
    made = [str(call["function"]) for call in message.get("tool_calls") or ()]
    parts = [message.get("content"), message.get("reasoning_content"), *made]
    return sum(len(str(part)) for part in parts if part)


async def measure(data: Path, out: Path, context: str, limit: int) -> dict:
    chosen = benchmark("browse")
    suite = chosen.load(chosen, Options(data=str(data), limit=limit))
    searcher = Searcher()
    player = Player("searcher", speaker_of(searcher), searcher)
    config = runner.Config(context=context, runs=RUNS, window=WINDOW, max_turns=MAX_TURNS, concurrency=8)  # type: ignore[arg-type]
    store = runner.cache(out, chosen, suite, config, player.identity)
    attempts = await runner.run(chosen, suite, player, config, store)
    assert all(each.steps <= MAX_TURNS for group in attempts.values() for each in group)
    found = table(chosen, suite, attempts, config)
    return {
        "score": found["score"], "mean_steps": found["mean_steps"], "ends": found["outcomes"]["ends"],
        "resets": found["accounts"]["resets"], "sampled_tokens": found["accounts"]["sampled_tokens"],
        "curve": curve(attempts, config),
    }  # fmt: skip


def order(figures: dict) -> dict:
    """What the paper's figure shows, said of these figures."""
    score = {context: figures[context]["score"]["value"] for context in CONTEXTS}
    steps = {context: figures[context]["mean_steps"] for context in CONTEXTS}
    return {
        "discard-all above summary": score["discard-all"] > score["summary"],
        "summary above discard-75": score["summary"] > score["discard-75"],
        "parallel within 3 points of discard-all or above": score["parallel-fewest-step"] > score["discard-all"] - 0.03,
        "parallel takes more steps than discard-all": steps["parallel-fewest-step"] > steps["discard-all"],
    }


def main(quick: bool) -> dict:
    count = 40 if quick else 200
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        browse.made(data, people=400, questions=count, seed=11, hops=(3, 6))
        figures = {context: asyncio.run(measure(data, out, context, count)) for context in CONTEXTS}
    for context in CONTEXTS[1:]:
        assert figures[context]["score"]["value"] > figures["none"]["score"]["value"], (context, json.dumps(figures))
    return {"questions": count, "window": WINDOW, "max_turns": MAX_TURNS, "runs": RUNS, "paper_order": order(figures), **figures}
