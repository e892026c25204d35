"""Contests: programs scored by subtask, and the paper's rule of many samples and few submissions (appendix D).

Of the attempts at a problem those that ran over their length, hold no program or fail the statement's own samples are dropped; of
the rest the ones with the longest thinking are submitted (IOI: 500 attempts, 50 submissions; ICPC: 32 attempts, the same filter).
IOI adds up, over subtasks, the best of all submissions; ICPC counts problems solved, and submissions until the accepted one. The
paper does not say in which order ICPC's were submitted: here too the longest thinking goes first. What V3.2-Exp removed beside
(refusals) holds no program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rorqual.evals.answers import code_block
from rorqual.evals.benchmark import Options, Protocol, Suite
from rorqual.evals.programs import Case, in_sandbox, passes
from rorqual.evals.published import ICPC_SUBMISSIONS, TABLE_4
from rorqual.evals.source import RowError, need
from rorqual.rollout.trajectory import Trajectory
from rorqual.sandbox import Sandbox
from rorqual.tasks import Task
from rorqual.tasks.verdict import Verdict, failed, passed

Rule = Literal["ioi", "icpc"]
SUBMISSIONS = 50
"""The paper's at the IOI, which is also what its rules allow."""


def contest_score(results: Sequence[Sequence[bool]], points: Sequence[float]) -> float:
    """IOI: of one submission, the points of the subtasks all of whose cases pass."""
    return sum(value for passed_cases, value in zip(results, points, strict=True) if all(passed_cases))


def ioi_score(submissions: Sequence[Sequence[Sequence[bool]]], points: Sequence[float]) -> float:
    """IOI: of several submissions, the sum over subtasks of the best: submissions x subtasks x cases."""
    solved = [any(all(submission[i]) for submission in submissions) for i in range(len(points))]
    return sum(value for value, is_solved in zip(points, solved, strict=True) if is_solved)


def icpc_score(problems: Mapping[str, Sequence[bool]]) -> tuple[int, dict[str, int]]:
    """ICPC: problems solved, and for each solved one the number of its accepted submission (from 1), as the paper's table 4."""
    accepted = {name: list(made).index(True) + 1 for name, made in problems.items() if any(made)}
    return len(accepted), accepted


def score_contest(task: Task, text: str, options: Options) -> Verdict:
    """One attempt: passed with all points; the share of points is the score, and each subtask is a measure."""
    code = code_block(text)
    if code is None or not code.strip():
        return failed("no_program")
    subtasks, samples = task.payload["subtasks"], task.payload["samples"]

    def judge(sandbox: Sandbox) -> Verdict:
        def runs(cases: Sequence[Sequence[str]]) -> list[bool]:
            return [not passes(sandbox, code, Case(*pair), "", options.timeout_s) for pair in cases]

        measures = {"samples_passed": float(all(runs(samples)))}
        results = [runs(subtask["cases"]) for subtask in subtasks]
        points = [float(subtask["points"]) for subtask in subtasks]
        for number, (found, value) in enumerate(zip(results, points, strict=True), 1):
            measures[f"subtask_{number}"] = value if all(found) else 0.0
        measures["points"] = total = contest_score(results, points)
        return passed(measures) if all(map(all, results)) else failed("points_lost", score=total / sum(points), measures=measures)

    return in_sandbox(options, judge)


def read_contest(row: Mapping[str, Any], protocol: Protocol, options: Options) -> Task:
    """A problem as {id, statement, samples?: [[input, output]], subtasks: [{points, cases: [[input, output]]}]}.

    samples: the statement's own, by which attempts are filtered. ICPC: one subtask.
    """
    subtasks, samples = need(row, "subtasks"), row.get("samples") or []
    for number, subtask in enumerate(subtasks, 1):
        if not isinstance(subtask, dict) or not subtask.get("cases") or float(subtask.get("points") or 0) <= 0:
            raise RowError(f"its subtask {number} lacks points or cases")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in [*samples, *(c for s in subtasks for c in s["cases"])]):
        raise RowError("a case or sample is no pair of input and output")
    payload = {"subtasks": subtasks, "samples": samples, "corrupted": "```python\npass\n```"}
    payload |= {"reference": str(row.get("reference") or "")}
    return Task(str(need(row, "id")), "text", protocol.messages(str(need(row, "statement"))), payload=payload)


# --- from attempts to submissions


def thinking(trajectory: Trajectory) -> tuple[int, int]:
    """How long an attempt thought: characters of reasoning, then (for a policy that shows none) sampled tokens."""
    shown = sum(len(turn.message.get("reasoning_content") or "") for turn in trajectory.turns)
    return shown, trajectory.sampled_tokens


def submissions(attempts: Sequence[Trajectory], limit: int) -> list[Trajectory]:
    """The attempts that are submitted, the longest thinking first; ties to the lowest index."""
    fit = [
        each for each in attempts
        if each.answered and each.verdict is not None and each.verdict.measures.get("samples_passed") == 1.0
    ]  # fmt: skip
    return sorted(fit, key=lambda each: (*(-length for length in thinking(each)), each.sample))[:limit]


def contest_table(suite: Suite, attempts: Mapping[str, Sequence[Trajectory]], options: Options) -> dict[str, Any]:
    """Points by problem under the rule, and what the paper's model had at its contests."""
    problems = {name: _problem(suite.tasks[name], group, options) for name, group in attempts.items()}
    table: dict[str, Any] = {
        "rule": options.rule,
        "submissions": options.submissions,
        "problems": problems,
        "solved": sum(problem["accepted_at"] is not None for problem in problems.values()),
    }
    if options.rule == "icpc":
        solved = {"ICPC World Finals 2025": f"{len(ICPC_SUBMISSIONS)} of 12 problems, gold"}
        return table | {"published": solved}
    points, of = (sum(problem[name] for problem in problems.values()) for name in ("points", "of"))
    published = {name: f"{sum(points):g} of {of:g} points, {medal}" for name, (points, of, medal) in TABLE_4.items()}
    return table | {"points": points, "of": of, "published": {"IOI 2025": published["IOI 2025"]}}


def _problem(task: Task, attempts: Sequence[Trajectory], options: Options) -> dict[str, Any]:
    points = [float(subtask["points"]) for subtask in task.payload["subtasks"]]
    made = submissions(attempts, options.submissions)
    measures = [each.verdict.measures for each in made if each.verdict is not None]
    best = [max((found[f"subtask_{i}"] for found in measures), default=0.0) for i in range(1, len(points) + 1)]
    accepted = next((number for number, found in enumerate(measures, 1) if found["points"] == sum(points)), None)
    return {
        "attempts": len(attempts), "submitted": len(made) if options.rule == "ioi" else accepted or len(made),
        "subtasks": best, "points": sum(best), "of": sum(points), "accepted_at": accepted,
    }  # fmt: skip
