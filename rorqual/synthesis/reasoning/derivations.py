"""Proof tasks: derivations of the formal system with planted flaws, or problems and annotated proofs from a file."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.errors import require
from rorqual.rewards.proof_programs import exact_meta_verifier
from rorqual.synthesis import Maker, Request
from rorqual.synthesis.line import Line, Made, refused, run
from rorqual.tasks import GateResult, Provenance, Task, TaskError, TaskRow
from rorqual.tasks.derivations import Derivation, Finding, Flaw, check, derive, plant, score_of, write_findings
from rorqual.tasks.proof_tasks import DERIVATION, Role, exact_verdict, proof_task, validate_proof
from rorqual.tasks.proofs import (
    SCORES,
    Evaluation,
    Words,
    read_meta_evaluation,
    write_evaluation,
    write_meta_evaluation,
    write_proof,
)


@dataclass(frozen=True)
class ProofConfig:
    """What proof tasks are made from."""

    seed: int = 0
    roles: str = "prove,verify,meta_verify"
    """Which, in equal shares."""
    words: Words = "full"
    """brief: prompts that name the role alone, for tiny models."""
    least_steps: int = 1
    most_steps: int = 4
    least_size: int = 2
    """Letters and numbers of the problem's left side."""
    most_size: int = 4
    problems: str = ""
    """A JSONL file instead: rows with `problem`; with `solution` and `score`, to verify; with `evaluation` and `quality` too, to
    judge an evaluation. Such tasks have no exact judge."""

    def __post_init__(self) -> None:
        roles = set(self.roles.split(","))
        require(
            self,
            roles=(roles <= set(Role), f"some of {', '.join(Role)}, with commas between"),
            most_steps=(1 <= self.least_steps <= self.most_steps, "at least least_steps, which is at least 1"),
            most_size=(1 <= self.least_size <= self.most_size <= 12, "from least_size to 12"),
        )


def proof(config: ProofConfig, number: int) -> Made:
    """Candidate `number`."""
    rng = random.Random(f"{config.seed}/proof/{number}")
    if config.problems:
        task = _from_file(config, number)
        return Made(TaskRow(task, tuple(validate_proof(task, None, "inline"))))
    role = Role(rng.choice(sorted(config.roles.split(","))))
    steps = rng.randint(config.least_steps, config.most_steps)
    derivation = derive(rng, rng.randint(config.least_size, config.most_size), steps)
    if derivation is None:
        return refused("derivable", "the random walk got stuck")
    payload: dict[str, Any] = {"system": DERIVATION, "problem": derivation.problem}
    if role is Role.PROVE:
        payload["gold"] = write_proof(derivation.solution, write_findings(()), 1)
    else:
        solution = _solution(derivation, rng)
        if solution is None:
            return refused("plantable", "the derivation has no room for the flaw")
        payload |= _to_verify(derivation.problem, solution) if role is Role.VERIFY else _to_judge(derivation, solution, rng)
    task = proof_task(role, payload, config.words, steps)
    return Made(TaskRow(task, tuple(gates(task))))


_BY_SCORE: tuple[tuple[Flaw | None, ...], ...] = ((None,), (Flaw.RULE, Flaw.GAP), (Flaw.FALSE, Flaw.END, Flaw.LEAP))


def _solution(derivation: Derivation, rng: random.Random) -> str | None:
    """A proof, or one with a planted flaw: each score a third of the time."""
    flaw = rng.choice(rng.choice(_BY_SCORE))
    return derivation.solution if flaw is None else plant(derivation, flaw, rng)


def _to_verify(problem: str, solution: str) -> dict[str, Any]:
    findings = check(problem, solution)
    score = score_of(findings)
    return {"solution": solution, "score": score, "gold": write_evaluation(write_findings(findings), score)}


def _to_judge(derivation: Derivation, solution: str, rng: random.Random) -> dict[str, Any]:
    """An evaluation that is honest, invents a flaw, joins a real and an invented one, or draws the wrong score."""
    true = check(derivation.problem, solution)
    lines = len(solution.splitlines())
    invented = [each for n in range(1, lines + 1) for flaw in Flaw if (each := Finding(n, flaw)) not in true]
    named = rng.choice([true, true, (rng.choice(invented),), (*true[:1], rng.choice(invented))])
    score = score_of(named) if rng.random() < 0.75 else rng.choice(SCORES)
    evaluation = write_evaluation(write_findings(sorted(named)), score)
    parts = {"problem": derivation.problem, "solution": solution, "evaluation": evaluation}
    gold = exact_meta_verifier(parts, rng)
    found = read_meta_evaluation(gold)
    assert isinstance(found, Evaluation)
    return {"solution": solution, "evaluation": evaluation, "quality": found.score, "gold": gold}


def gates(task: Task) -> list[GateResult]:
    """Silence and wrong replies fail, the gold reply passes; of a proof in words, that its parts are there."""
    found = validate_proof(task, None, "inline")
    if task.payload.get("system") != DERIVATION:
        return found
    passing = [text for text in _wrong_replies(task) if exact_verdict(task, text).passed]
    return [*found, GateResult("wrong_replies_fail", not passing, "; ".join(passing)[:200])]


def _wrong_replies(task: Task) -> list[str]:
    payload = task.payload
    match Role(payload["role"]):
        case Role.PROVE:
            left = payload["problem"].partition(" = ")[0]
            return [write_proof(left, "No flaw.", 1), write_proof(payload["problem"], "No flaw.", 1), payload["problem"]]
        case Role.VERIFY:
            true = write_findings(check(payload["problem"], payload["solution"]))
            wrong = [write_evaluation(true, score) for score in SCORES if score != payload["score"]]
            return [*wrong, write_evaluation(f"{true}\nLine 99: false", payload["score"])]
        case Role.META_VERIFY:
            return [write_meta_evaluation("So it is.", score) for score in SCORES if score != payload["quality"]]


@cache
def _rows(path: str) -> tuple[dict[str, Any], ...]:
    import json

    try:
        rows = tuple(json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise TaskError(f"problems={path}: {type(error).__name__}: {error}") from None
    if not rows:
        raise TaskError(f"problems={path}: holds no row")
    return rows


def _from_file(config: ProofConfig, number: int) -> Task:
    rows = _rows(config.problems)
    row = rows[number % len(rows)]
    role = Role.META_VERIFY if "quality" in row else Role.VERIFY if "score" in row else Role.PROVE
    names = {Role.PROVE: ("problem",), Role.VERIFY: ("problem", "solution", "score")}
    names[Role.META_VERIFY] = ("problem", "solution", "evaluation", "quality")
    if missing := [name for name in names[role] if name not in row]:
        raise TaskError(f"problems={config.problems}: row {number % len(rows) + 1} lacks {', '.join(missing)}")
    for name in ("score", "quality"):
        if name in row and row[name] not in SCORES:
            raise TaskError(f"problems={config.problems}: row {number % len(rows) + 1}: {name} must be 0, 0.5 or 1")
    payload = {name: row[name] for name in names[role]}
    return proof_task(role, payload, config.words, 0, Provenance(config.problems, f"row {number % len(rows) + 1}"))


def _synthesize(request: Request) -> Mapping[str, Any]:
    return run(Line("proof", ProofConfig, "rorqual.synthesis.reasoning.derivations:proof"), request)


MAKER = Maker("proof", _synthesize, lambda task, world, isolation: gates(task))
