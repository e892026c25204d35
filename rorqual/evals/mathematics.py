"""Benchmarks of mathematics: a question, an answer in \\boxed{}, symbolic equality."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rorqual.evals.answers import final_answer
from rorqual.evals.benchmark import Benchmark, Options, Protocol, ReadRow, Suite, row_suite
from rorqual.evals.equality import EqualityError, equal, tidy
from rorqual.evals.source import RowError, need
from rorqual.evals.text import text_opener
from rorqual.tasks import Task
from rorqual.tasks.verdict import Verdict, failed, invalid, passed


def score(task: Task, text: str) -> Verdict:
    """Passed where the final answer equals the gold one; an equality that can't be decided is invalid, not wrong."""
    answer = final_answer(text)
    if answer is None:
        return failed("no_answer")
    try:
        return passed() if equal(task.payload["gold"], answer) else failed("wrong")
    except EqualityError as error:
        return invalid(f"equality undecided: {error}")


def answer_of(text: str) -> str | None:
    answer = final_answer(text)
    return None if answer is None else tidy(answer)


def question_task(identity: str, question: str, gold: str, reference: str, protocol: Protocol, **tags: str) -> Task:
    payload = {"question": question, "gold": gold, "reference": reference, "corrupted": f"\\boxed{{{corrupt(gold)}}}"}
    return Task(identity, "text", protocol.messages(question), payload=payload, tags=tags)


def corrupt(gold: str) -> str:
    """Another answer of the same look: the first whole number raised by one, or the words with a `not` before them."""
    changed = re.sub(r"\d+", lambda found: str(int(found.group()) + 1), tidy(gold), count=1)
    return changed if changed != tidy(gold) else f"\\text{{not }} {gold} + 1"


def read_gsm8k(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    solution = str(need(row, "answer"))
    gold = final_answer(solution) if "####" in solution else None
    if gold is None:
        raise RowError("its answer has no #### line")
    return question_task(f"gsm8k/{row['_where']}", str(need(row, "question")), gold, solution, protocol)


def read_problem(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    """Rows of MATH, AIME, HMMT and IMO-AnswerBench, in the spellings that their files use."""
    question = str(need(row, "problem", "Problem", "question"))
    if row.get("answer") in (None, "") and row.get("solution"):
        gold = final_answer(str(row["solution"])) or ""
        if not gold:
            raise RowError("its solution has no boxed answer")
    else:
        gold = str(need(row, "answer", "Short Answer", "final_answer"))
    if is_prose(gold) and options.judge is None:
        raise RowError("its answer mixes sentences and formulas, which needs --judge: symbolic equality can't decide it")
    identity = str(row.get("unique_id") or row.get("Problem ID") or row.get("problem_idx") or row.get("id") or row["_where"])
    tags = {name.lower(): str(row[name]) for name in ("Category", "subject", "level") if row.get(name)}
    reference = str(row.get("solution") or "") if final_answer(str(row.get("solution") or "")) else f"\\boxed{{{bare(gold)}}}"
    return question_task(identity, question, gold, reference, protocol, **tags)


def is_prose(gold: str) -> bool:
    """Words outside the formulas of an answer. Of such answers symbolic equality sees one formula and believes it is all."""
    outside = re.sub(r"\$[^$]*\$", " ", gold)
    return "$" in gold and bool(set(re.findall(r"[a-zA-Z]{2,}", outside)) - {"and", "or"})


def bare(gold: str) -> str:
    return gold.strip().strip("$").strip()


def loader(read: ReadRow) -> Any:
    def load(benchmark: Benchmark, options: Options) -> Suite:
        return row_suite(benchmark, options, read, text_opener(options.judge.score if options.judge else score))

    return load
