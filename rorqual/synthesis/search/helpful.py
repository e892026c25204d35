"""Prompts of a file that search measurably helps: answered with and without it, judged by their own rubrics (paper 3.2.3).

The paper adds such prompts of its earlier data to the search family, and scores them with a generative reward model.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.policy import SamplingParams
from rorqual.rewards.rubric import Criterion, Judgement, judge
from rorqual.synthesis.line import Made, refused
from rorqual.synthesis.search import SearchConfig
from rorqual.synthesis.search.model import reply
from rorqual.tasks import GateResult, Provenance, Task, TaskError, TaskRow, World, digest
from rorqual.tasks.answer import check_answer
from rorqual.tasks.retrieval import Browser, library
from rorqual.tasks.search import SEARCH_TOOLS

MAX_CALLS = 64


@cache
def rows(path: str) -> tuple[dict[str, Any], ...]:
    """Prompts with their rubrics. Raises TaskError that names the row."""
    try:
        found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise TaskError(f"prompts={path}: {type(error).__name__}: {error}") from None
    for number, row in enumerate(found, 1):
        try:
            assert isinstance(row["prompt"], str) and row["prompt"].strip() and row["rubric"]
            criteria(row["rubric"])
        except (AssertionError, KeyError, TypeError, AttributeError) as error:
            raise TaskError(f"prompts={path}: row {number}: expected prompt and rubric: {error!r}") from None
    return tuple(found)


def criteria(rubric: list[dict[str, Any]]) -> tuple[Criterion, ...]:
    return tuple(Criterion(c["name"], c["text"], float(c.get("weight", 1.0))) for c in rubric)


def make(config: SearchConfig, number: int, world: World) -> Made:
    """The number-th prompt, kept where the judged score rises with search by at least `least_help`."""
    row = rows(config.prompts)[number]
    browser = Browser(library(config.corpus, config.backend))
    texts = [reply(row["prompt"], config.endpoint, config.model, place) for place in (None, browser)]
    scores = []
    for text in texts:
        found = _judged(config, row, text)
        if found.score is None:
            return refused("judged", found.reason)
        scores.append(found.score)
    check = {
        "kind": "rubric",
        "criteria": row["rubric"],
        "without": scores[0],
        "with": scores[1],
        "least_help": config.least_help,
    }
    tags = {"source": Path(config.prompts).stem, "kind": "rubric", "language": row.get("language", "und"), "split": "rubric"}
    task = Task(
        f"search-{number}-{digest(row, 8)}", "search", ({"role": "user", "content": row["prompt"]},), SEARCH_TOOLS, world.id,
        {"check": check, "evidence": [], "question": row["prompt"], "pages": len(browser.pages)}, 0, MAX_CALLS, tags,
        (*world.provenance, Provenance(config.prompts, digest(row))),
    )  # fmt: skip
    return Made(TaskRow(task, tuple(gates(task)), {"help": scores[1] - scores[0]}), world)


def _judged(config: SearchConfig, row: dict[str, Any], text: str) -> Judgement:
    from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy

    async def ask() -> Judgement:
        async with EndpointPolicy(EndpointConfig(config.endpoint, config.model)) as policy:
            return await judge(
                policy, row["prompt"], text, criteria(row["rubric"]), SamplingParams(max_tokens=1024, temperature=0.0)
            )

    return asyncio.run(ask()) if text else Judgement(0.0, {})


def gates(task: Task) -> list[GateResult]:
    """What was judged can't be judged again without the endpoint: the stored scores are compared, and silence fails."""
    check = task.payload["check"]
    gain = check["with"] - check["without"]
    idle = check_answer(check, None)
    return [
        GateResult("silence_fails", idle.is_valid and not idle.passed),
        GateResult("search_used", task.payload["pages"] > 0, "the model did not search"),
        GateResult("search_helps", gain >= check["least_help"] - 1e-9, f"{check['without']:.3f} -> {check['with']:.3f}"),
    ]
