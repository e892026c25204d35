"""The general agent: worlds of tables with tools, compiled from mechanisms, or written by a model through the same loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.config import build, parse_override
from rorqual.synthesis import Maker, Request
from rorqual.tasks import GateResult, Task, TaskError, World


def synthesize(request: Request) -> Mapping[str, Any]:
    """Programs play every role, unless an endpoint is given."""
    from rorqual.synthesis.general.compiler import CompilerConfig
    from rorqual.synthesis.general.pipeline import synthesize as run

    values: dict[str, Any] = {"seed": request.seed}
    for override in request.overrides:
        keys, value = parse_override(override)
        values[".".join(keys)] = value
    return run(request, build(CompilerConfig, values, "--set"))


def regate(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Every gate again, from what is stored alone, confined."""
    from rorqual.synthesis.general.compiler import regate as run
    from rorqual.tasks import WorldSession

    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    with WorldSession(world, isolation) as session:
        return run(task, world, session)


MAKER = Maker("general", synthesize, regate)
