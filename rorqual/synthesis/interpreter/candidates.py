"""Candidates of the interpreter family and their gates."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.synthesis.guesses import guess_gate, wrong_gate
from rorqual.synthesis.interpreter import InterpreterConfig
from rorqual.synthesis.interpreter.puzzles import LIBRARY, LICENCE, PUZZLES, entry, program
from rorqual.synthesis.interpreter.tables import FILE, question, sample
from rorqual.synthesis.line import Made, refused
from rorqual.tasks import GateResult, Provenance, Task, TaskError, TaskRow, World, digest
from rorqual.tasks.answer import ANSWER_LINE, as_number, check_answer
from rorqual.tasks.interpreter import PYTHON_TOOL, Notebook

MAX_CALLS = 20
_CALCULATION = re.compile(r"<<([^=<>]+)=([^<>]+)>>")
CLOSE = "\nprint('Answer:', answer)"


def make(config: InterpreterConfig, number: int) -> Made:
    """The number-th candidate with its gates run, confined."""
    rng = random.Random(f"{config.seed}/interpreter/{number}")
    kinds = {"puzzles": config.puzzles, "tables": config.tables, "words": config.words if config.problems else 0.0}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    made = {"puzzles": _puzzle, "tables": _table, "words": _words}[kind](config, number, rng)
    if isinstance(made, Made):
        return made
    task, world = made
    results = gates(task, world, "bwrap", config)
    return Made(TaskRow(task, tuple(results), {"calls": 1.0}), world)


def _task(number: int, ask: str, program_text: str, check: dict[str, Any], tags: dict[str, str], **more: Any) -> Task:
    messages = ({"role": "user", "content": f"{ask}\n\n{ANSWER_LINE}"},)
    payload = {"check": check, "program": program_text, "question": ask}
    name = f"interpreter-{number}-{digest([ask, check], 8)}"
    return Task(name, "interpreter", messages, (PYTHON_TOOL,), payload=payload, max_calls=MAX_CALLS, tags=tags, **more)


def _puzzle(config: InterpreterConfig, number: int, rng: random.Random) -> tuple[Task, None]:
    name = rng.choice(sorted(PUZZLES))
    item = entry(name, rng.randrange(2**31), PUZZLES[name].settings)
    check = {"kind": "reasoning_gym", "dataset": name, "entry": item, "value": item["answer"]}
    tags = {"source": LIBRARY, "kind": "puzzle", "skeleton": name, "language": "en"}
    provenance = (Provenance(LIBRARY, name, licence=LICENCE),)
    return _task(number, item["question"], program(name, item["question"]), check, tags, provenance=provenance), None


def _table(config: InterpreterConfig, number: int, rng: random.Random) -> tuple[Task, World] | Made:
    world, table, rows = sample(config.seed, number // config.questions_per_table, config.rows)
    ask, code, skeleton = question(rng, table, rows)
    printed = _notebook(world).run(code + CLOSE)
    if not printed.startswith("Answer: "):
        return refused("program_runs", printed[-200:])
    value = printed.removeprefix("Answer: ").strip()
    check = {"kind": "number" if as_number(value) is not None and value.lstrip("-").isdigit() else "exact", "value": value}
    tags = {"source": table.name, "kind": "table", "skeleton": skeleton, "language": "en"}
    intro = f"The file {FILE} holds records with the columns {', '.join(rows[0])}.\n\n"
    return _task(number, intro + ask, code + CLOSE, check, tags, world=world.id, provenance=world.provenance), world


@cache
def _problems(path: str) -> tuple[dict[str, str], ...]:
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return tuple({"question": row["question"], "answer": row["answer"]} for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"problems={path}: expected JSONL with question and answer: {type(error).__name__}: {error}") from None


def _words(config: InterpreterConfig, number: int, rng: random.Random) -> tuple[Task, None] | Made:
    row = rng.choice(_problems(config.problems))
    value = row["answer"].rpartition("####")[2].strip().replace(",", "")
    steps = [expression.strip() for expression, _ in _CALCULATION.findall(row["answer"])]
    plain = [step for step in steps if re.fullmatch(r"[\d\s.+\-*/()]+", step)]
    if len(plain) != len(steps) or len(steps) < 2:
        return refused("program_known", "fewer than two calculations, or one that is not plain arithmetic")
    code = "\n".join(f"answer = {step}" for step in plain) + "\nanswer = round(answer, 6)" + CLOSE
    check = {"kind": "number", "value": value, "tolerance": "0.000001"}
    tags = {"source": Path(config.problems).stem, "kind": "word_problem", "skeleton": f"steps{len(steps)}", "language": "en"}
    return _task(number, row["question"], code, check, tags, provenance=(Provenance(config.problems, digest(row)),)), None


_open: dict[str, Notebook] = {}


def _notebook(world: World | None) -> Notebook:
    """One kernel per process for the hidden programs, which are this package's own or plain arithmetic."""
    if "it" not in _open:
        _open["it"] = Notebook(None)
    _open["it"].lay_out(world)
    return _open["it"]


def gates(task: Task, world: World | None, isolation: str, config: InterpreterConfig | None = None) -> list[GateResult]:
    """Silence and guesses fail, the hidden program passes in the notebook, answers near its own fail."""
    check = task.payload["check"]
    idle = check_answer(check, None, isolation)
    printed = _notebook(world).run(task.payload["program"])
    gold = check_answer(check, printed, isolation)
    again = check_answer(check, _notebook(world).run(task.payload["program"]), isolation)
    results = [
        GateResult("silence_fails", idle.is_valid and not idle.passed),
        GateResult("program_passes", gold.passed and again.passed, "; ".join(gold.reasons) or printed[-200:] * (not gold.passed)),
        guess_gate("no_tool_fails", task.payload["question"], check, isolation),
        wrong_gate(str(check["value"]), check, isolation),
        GateResult("answer_unsaid", not _says(task.prompt, str(check["value"])), "the prompt holds the answer"),
    ]
    if config and config.endpoint:
        results.append(_model_gate(task, config, isolation))
    return results


def _says(prompt: str, value: str) -> bool:
    """Whether a long answer stands in the prompt; short ones stand there by chance."""
    return len(value) >= 4 and value in prompt


def _model_gate(task: Task, config: InterpreterConfig, isolation: str) -> GateResult:
    """A model without the tool fails too."""
    import asyncio

    from rorqual.policy import SamplingParams
    from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

    policy = EndpointPolicy(EndpointConfig(config.endpoint, config.model))
    reply = asyncio.run(policy.reply(task.messages, (), SamplingParams(max_tokens=4096, temperature=0.0)))
    text = reply.message.get("content")
    if not text:
        return GateResult("model_without_tool_fails", False, f"the endpoint gave no answer: {reply.stop_reason}")
    return GateResult("model_without_tool_fails", not check_answer(task.payload["check"], text, isolation).passed)
