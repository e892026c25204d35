"""Benchmarks of choices and short answers: GPQA, MMLU-Pro, and Humanity's Last Exam in text."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping
from typing import Any

from rorqual.evals import mathematics
from rorqual.evals.answers import boxed, choice
from rorqual.evals.benchmark import Benchmark, Options, Protocol, Suite, row_suite
from rorqual.evals.source import RowError, need
from rorqual.evals.text import text_opener
from rorqual.tasks import Task
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, failed, passed

LETTERS = string.ascii_uppercase
INSTRUCTION = "{question}\nPlease reason step by step, and put the letter of the right choice within \\boxed{{}}."
"""The paper's template, with a letter for an answer."""


def score(task: Task, text: str) -> Verdict:
    if "letters" not in task.payload:
        return mathematics.score(task, text)
    chosen = choice(text, task.payload["letters"])
    if chosen is None:
        return failed("no_answer")
    return passed() if chosen == task.payload["gold"] else failed("wrong")


def answer_of(text: str) -> str | None:
    inner = boxed(text)
    return choice(text, LETTERS) or (None if inner is None else inner.strip() or None)


def choice_task(identity: str, question: str, options: list[str], right: int, protocol: Protocol, **tags: str) -> Task:
    """A question with lettered options."""
    if not 0 <= right < len(options) <= len(LETTERS):
        raise RowError(f"the right choice is number {right} of {len(options)}")
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)]
    gold, letters = LETTERS[right], LETTERS[: len(options)]
    payload = {
        "gold": gold,
        "letters": letters,
        "reference": f"The answer is \\boxed{{{gold}}}.",
        "corrupted": f"The answer is \\boxed{{{LETTERS[(right + 1) % len(options)]}}}.",
    }
    return Task(identity, "text", protocol.messages("\n".join([question, "", *lines])), payload=payload, tags=tags)


def read_gpqa(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    """The right answer's place is drawn from the question and the seed, so that it is the same in every run."""
    question = str(need(row, "Question", "question"))
    texts = [str(need(row, name)).strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    order = list(range(4))
    random.Random(f"{options.seed}/{digest(question)}").shuffle(order)
    identity = str(row.get("Record ID") or row["_where"])
    return choice_task(identity, question.strip(), [texts[i] for i in order], order.index(0), protocol)


def read_mmlu_pro(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    texts = need(row, "options")
    if not isinstance(texts, list):
        raise RowError("its options are no list")
    index = row.get("answer_index")
    right = int(index) if index is not None else LETTERS.find(str(need(row, "answer")))
    tags = {"category": str(row["category"])} if row.get("category") else {}
    identity = f"mmlu_pro/{row.get('question_id', row['_where'])}"
    return choice_task(identity, str(need(row, "question")), [str(text) for text in texts], right, protocol, **tags)


def read_hle(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task | None:
    """Text questions only, as in the paper's table: a row with an image is left out."""
    if row.get("image"):
        return None
    question, gold = str(need(row, "question")), str(need(row, "answer"))
    identity = str(row.get("id") or row["_where"])
    if need(row, "answer_type") != "multipleChoice":
        return mathematics.question_task(identity, question, gold, f"\\boxed{{{mathematics.bare(gold)}}}", protocol)
    letters = "".join(sorted(set(re.findall(r"(?m)^\s*\(?([A-Z])[.):]", question)))) or LETTERS
    if gold not in letters:
        raise RowError(f"its answer {gold!r} is no letter of its choices {letters}")
    wrong = letters[(letters.index(gold) + 1) % len(letters)]
    payload = {
        "question": question,
        "gold": gold,
        "letters": letters,
        "reference": f"\\boxed{{{gold}}}",
        "corrupted": f"\\boxed{{{wrong}}}",
    }
    return Task(identity, "text", protocol.messages(question), payload=payload)


def loader(read: Any) -> Any:
    def load(benchmark: Benchmark, options: Options) -> Suite:
        return row_suite(benchmark, options, read, text_opener(options.judge.score if options.judge else score))

    return load
