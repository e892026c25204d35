"""`rorqual synthesize --endpoint`: authors fill a store with as many tasks as asked for, or the endpoint is given up."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from rorqual.errors import UserError
from rorqual.policy import ChatPolicy
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.synthesis import Request
from rorqual.synthesis.general.author import AuthorConfig, run_authors
from rorqual.tasks import Record

BARREN_ROUNDS = 3
"""Rounds without any accepted task after which the endpoint is given up."""


def synthesize(request: Request, config: AuthorConfig, endpoint: EndpointConfig) -> dict[str, Any]:
    """Fill and seal the store. Raises UserError where the endpoint brings nothing, with the reasons that were recorded."""
    return asyncio.run(_synthesize(request, config, endpoint))


async def _synthesize(request: Request, config: AuthorConfig, endpoint: EndpointConfig) -> dict[str, Any]:
    async with EndpointPolicy(endpoint) as policy:
        await fill(request, config, policy)
    done = _cut(sorted((r for r in request.store.records() if r.kind != "done"), key=lambda r: (r.order, r.kind)), request.count)
    figures = {
        "tasks": sum(r.kind == "task" for r in done),
        "rejected": dict(Counter(r.value["gate"] for r in done if r.kind == "rejected")),
    }
    settings = {"family": "general", "made_by": "endpoint", "model": endpoint.model, **asdict(config)}
    request.store.seal({"settings": settings, **figures}, lambda _: done)
    return figures


def _cut(ordered: list[Record], count: int) -> list[Record]:
    """The records up to the last task that was asked for: the last author may have made one level more."""
    tasks = [i for i, record in enumerate(ordered) if record.kind == "task"]
    return ordered[: tasks[count - 1] + 1] if len(tasks) > count else ordered


async def fill(request: Request, config: AuthorConfig, policy: ChatPolicy) -> None:
    """Rounds of authors, each as many as still missing, until there are enough tasks."""
    store = request.store
    finished = {r.order[0] for r in store.records() if r.kind == "done"}
    tasks = sum(r.kind == "task" for r in store.records())
    barren, index = 0, 0

    def keep(at: int, records: list[Record]) -> None:
        nonlocal tasks
        for record in records:
            store.append(record)
        store.append(Record("done", (at,), {"tasks": sum(r.kind == "task" for r in records)}))
        tasks += sum(r.kind == "task" for r in records)
        request.on_progress(tasks, f"{at + 1} authors")

    while tasks < request.count:
        before, wanted = tasks, []
        while len(wanted) < math.ceil((request.count - tasks) / (config.levels + 1)):
            if index not in finished:
                wanted.append(index)
            index += 1
        await run_authors(policy, config, wanted, request.workers, keep)
        barren = barren + 1 if tasks == before else 0
        if barren == BARREN_ROUNDS:
            reasons = Counter(r.value["gate"] for r in store.records() if r.kind == "rejected")
            raise UserError(
                f"{BARREN_ROUNDS} rounds of authors brought no task ({dict(reasons)}); {store.directory} holds the reasons"
            )
