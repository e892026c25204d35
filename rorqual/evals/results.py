"""The table of an evaluation, and its accounts: pure functions of the attempts on disk.

Every attempt is counted as what it is. An answer that was judged scores; an attempt that ended unfinished (budget, context,
a message cut short) scores 0 and is named; an attempt whose policy, world or verifier failed has no score: it is left out of
the rates, named and counted, and `score_if_unscored_fail` says what the rate would be with each of them a failure.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rorqual.errors import UserError
from rorqual.evals.benchmark import Benchmark, Suite
from rorqual.evals.runner import PARALLEL, Config
from rorqual.evals.statistics import Interval, bootstrap, compare, majority, pass_at_k, wilson
from rorqual.rollout.context import fewest_steps
from rorqual.rollout.trajectory import End, Trajectory

Attempts = Mapping[str, Sequence[Trajectory]]
UNSCORED_ENDS = (End.POLICY_FAILED, End.WORLD_FAILED)
_TRIES = re.compile(r" \(\d+ tries in \d+ s\)$")
"""What an endpoint's failure ends with: how often and how long it was asked, which would set equal failures apart."""


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0


def score_of(trajectory: Trajectory) -> float | None:
    """In [0, 1]; None where the attempt has no score: its policy or world failed, or its verifier could not decide."""
    verdict = trajectory.verdict
    if trajectory.end in UNSCORED_ENDS or verdict is None or not verdict.is_valid:
        return None
    return verdict.score


def chosen(attempts: Attempts, config: Config) -> dict[str, list[Trajectory]]:
    """The attempts that count: all, or under parallel-fewest-step one of each N, by the rule of the paper."""
    if config.context != PARALLEL:
        return {name: list(each) for name, each in attempts.items()}
    return {name: [group[fewest_steps(group)] for group in _groups(each, config.runs)] for name, each in attempts.items()}


def _groups(attempts: Sequence[Trajectory], size: int) -> list[Sequence[Trajectory]]:
    return [attempts[i : i + size] for i in range(0, len(attempts), size)]


def table(
    benchmark: Benchmark, suite: Suite, attempts: Attempts, config: Config, ks: Sequence[int] = (1,), prices: Prices | None = None
) -> dict[str, Any]:
    """Everything that is reported of one evaluation, as JSON. Raises UserError for a k above n."""
    if max(ks, default=1) > config.samples:
        raise UserError(f"pass@{max(ks)} needs at least {max(ks)} samples of each task, found {config.samples}; raise --n")
    counted = chosen(attempts, config)
    scores = {name: [score_of(each) for each in group] for name, group in counted.items()}
    missing = sum(config.attempts - len(attempts.get(name, ())) for name in suite.tasks)
    return {
        "benchmark": benchmark.name,
        "context": config.context,
        "tasks": len(suite.tasks),
        "samples": config.samples,
        "runs": config.runs if config.context == PARALLEL else 1,
        **_rates(scores, ks),
        "majority": _majority(benchmark, counted),
        "mean_steps": _mean([sum(each.steps for each in group) / config.samples for group in attempts.values() if group]),
        "outcomes": _outcomes(counted),
        "not_played": missing,
        "defective_rows": [dataclasses.asdict(defect) for defect in suite.defects],
        "accounts": accounts(attempts, prices or Prices()),
        "by_task": scores,
    }


def _rates(scores: Mapping[str, Sequence[float | None]], ks: Sequence[int]) -> dict[str, Any]:
    valid = {name: [value for value in values if value is not None] for name, values in scores.items()}
    means = [sum(values) / len(values) for values in valid.values() if values]
    flat = [value for values in valid.values() for value in values]
    total = sum(map(len, scores.values()))
    strict = [sum(value or 0.0 for value in values) / len(values) for values in scores.values() if values]
    passes = sum(value >= 1.0 for value in flat)
    return {
        "score": _interval(bootstrap(means)),
        "passed_attempts": {"passed": passes, "of": len(flat), **_interval(wilson(passes, len(flat)))},
        "pass_at_k": {str(k): _pass_at(valid, k) for k in ks},
        "unscored_attempts": total - len(flat),
        "score_if_unscored_fail": _mean(strict),
    }


def _pass_at(valid: Mapping[str, Sequence[float]], k: int) -> dict[str, Any]:
    """Over the tasks with at least k scored attempts; those with fewer are counted apart."""
    enough = [values for values in valid.values() if len(values) >= k]
    found = [pass_at_k(len(values), sum(value >= 1.0 for value in values), k) for values in enough]
    return {**_interval(bootstrap(found)), "tasks": len(enough), "tasks_with_too_few": len(valid) - len(enough)}


def _majority(benchmark: Benchmark, counted: Attempts) -> dict[str, Any]:
    """The score of each task's commonest answer, as its first holder was judged. A task with no answer at all scores 0."""
    found = []
    for group in counted.values():
        answers = [benchmark.answer_of(text) if (text := final_text(each)) is not None else None for each in group]
        common = majority(answers)
        if common is not None:
            value = next((score_of(each) for each, answer in zip(group, answers, strict=True) if answer == common), None)
        else:
            value = None if all(score_of(each) is None for each in group) else 0.0
        found += [] if value is None else [value]
    return _interval(bootstrap(found)) | {"tasks": len(found)}


def final_text(trajectory: Trajectory) -> str | None:
    """The last message's text where the attempt ended with one."""
    if trajectory.end is not End.ANSWERED or not trajectory.turns:
        return None
    return trajectory.turns[-1].message.get("content") or ""


def _outcomes(counted: Attempts) -> dict[str, Any]:
    """How the attempts that count ended, and what their verdicts said: each is in exactly one line of each."""
    flat = [each for group in counted.values() for each in group]
    verdicts = Counter(_verdict_name(each) for each in flat)
    judged = [each.verdict for each in flat if each.verdict and each.end not in UNSCORED_ENDS]
    reasons = Counter(reason for verdict in judged if not verdict.passed for reason in verdict.reasons[:1])
    details = Counter(_TRIES.sub("", each.detail)[:200] for each in flat if each.end in UNSCORED_ENDS and each.detail)
    return {
        "ends": dict(sorted(Counter(str(each.end) for each in flat).items())),
        "verdicts": dict(sorted(verdicts.items())),
        "reasons": dict(reasons.most_common(20)),
        "failures": dict(details.most_common(20)),
    }


def _verdict_name(trajectory: Trajectory) -> str:
    if trajectory.end in UNSCORED_ENDS:
        return str(trajectory.end)
    if trajectory.verdict is None or not trajectory.verdict.is_valid:
        return "verifier_failed"
    if trajectory.verdict.passed:
        return "passed"
    return "wrong" if trajectory.answered else "unfinished"


def accounts(attempts: Attempts, prices: Prices) -> dict[str, float]:
    """What all attempts cost, those included that a strategy did not choose. Prompt tokens are counted without any cache."""
    flat = [each for group in attempts.values() for each in group]
    turns = [turn for each in flat for turn in each.turns]
    prompt = sum(turn.context_tokens for turn in turns) + sum(each.measures.get("summary_prompt_tokens", 0) for each in flat)
    summaries = sum(each.measures.get("summary_tokens", 0) for each in flat)
    sampled = sum(each.sampled_tokens for each in flat) + summaries
    calls = [observation for turn in turns for observation in turn.observations]
    return {
        "attempts": len(flat),
        "steps": len(turns),
        "prompt_tokens": prompt,
        "sampled_tokens": sampled,
        "summary_tokens": summaries,
        "judge_tokens": sum(each.verdict.measures.get("judge_tokens", 0.0) for each in flat if each.verdict),
        "resets": sum(turn.is_reset for turn in turns),
        "tool_calls": len(calls),
        "tool_failures": sum(bool(call.failure) for call in calls),
        "refused_calls": sum(call.content.startswith('{"error"') for call in calls if not call.failure),
        "cost": (prompt * prices.prompt + sampled * prices.completion) / 1e6,
    }


def curve(attempts: Attempts, config: Config) -> list[dict[str, float]]:
    """Score against mean real steps, as the paper's figure 6, from one evaluation.

    A budget of m steps does not change what happens before it ends, so the attempt under a smaller budget is the stored one
    cut after m turns. Under parallel-fewest-step the points are N = 1, 2, ... of the runs there are, and all steps count.
    """
    if config.context == PARALLEL:
        return [_point(_first(attempts, config.runs, count), f"N={count}") for count in range(1, config.runs + 1)]
    longest = max((each.steps for group in attempts.values() for each in group), default=0)
    budgets = sorted({max(1, round(longest * share / 12)) for share in range(1, 13)}) if longest else []
    return [_point(_within(attempts, budget), f"at most {budget}") for budget in budgets]


def _first(attempts: Attempts, runs: int, count: int) -> list[tuple[float | None, int]]:
    found = []
    for group in attempts.values():
        for several in _groups(group, runs):
            played = several[:count]
            found.append((score_of(played[fewest_steps(played)]), sum(each.steps for each in played)))
    return found


def _within(attempts: Attempts, budget: int) -> list[tuple[float | None, int]]:
    flat = [each for group in attempts.values() for each in group]
    return [(score_of(each), each.steps) if each.steps <= budget else (0.0, budget) for each in flat]


def _point(found: Sequence[tuple[float | None, int]], label: str) -> dict[str, Any]:
    scored = [score for score, _ in found if score is not None]
    interval = wilson(sum(score >= 1.0 for score in scored), len(scored))
    steps = _mean([steps for _, steps in found])
    return {"label": label, "steps": steps, "score": _mean(scored), "low": interval.low, "high": interval.high}


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables of the same tasks, task by task: the second less the first. Raises UserError where they share none."""
    pairs = []
    for name, values in first["by_task"].items():
        means = [[v for v in each if v is not None] for each in (values, second["by_task"].get(name, ()))]
        if all(means):
            pairs.append([sum(each) / len(each) for each in means])
    if not pairs:
        raise UserError("the two evaluations share no scored task; a paired comparison needs the same tasks")
    found = compare([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    left_out = len(set(first["by_task"]) | set(second["by_task"])) - len(pairs)
    return {
        "tasks": len(pairs), "tasks_left_out": left_out, "difference": _interval(found.difference), "wins": found.wins,
        "losses": found.losses, "p_value": found.p_value,
    }  # fmt: skip


def _interval(interval: Interval) -> dict[str, Any]:
    return {name: None if math.isnan(value) else value for name, value in dataclasses.asdict(interval).items()}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
