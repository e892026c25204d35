"""The general agent: worlds of tables with tools, compiled from mechanisms, or written by a model through the same loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.config import build, parse_override
from rorqual.synthesis import Maker, Request
from rorqual.tasks import GateResult, Task, TaskError, World


def synthesize(request: Request) -> Mapping[str, Any]:
    """Programs play every role, unless an endpoint is given."""
    values: dict[str, Any] = {"seed": request.seed}
    for override in request.overrides:
        keys, value = parse_override(override)
        values[".".join(keys)] = value
    if request.endpoint:
        return _by_endpoint(request, values)
    from rorqual.synthesis.general.compiler import CompilerConfig
    from rorqual.synthesis.general.pipeline import synthesize as run

    return run(request, build(CompilerConfig, values, "--set"))


def _by_endpoint(request: Request, values: dict[str, Any]) -> Mapping[str, Any]:
    """Settings that start with endpoint_ are the endpoint's (endpoint_timeout_s); the others the author's."""
    from rorqual.rollout.endpoint import EndpointConfig
    from rorqual.synthesis.general.author import AuthorConfig
    from rorqual.synthesis.general.endpoint_run import synthesize as run

    mark = "endpoint_"
    asked = {name.removeprefix(mark): value for name, value in values.items() if name.startswith(mark)}
    endpoint = build(EndpointConfig, {"url": request.endpoint, "model": request.model, **asked}, "--set")
    rest = {name: value for name, value in values.items() if not name.startswith(mark)}
    return run(request, build(AuthorConfig, rest, "--set"), endpoint)


def regate(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Every gate again, from what is stored alone, confined."""
    from rorqual.synthesis.general.compiler import regate as run
    from rorqual.tasks import WorldSession

    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    with WorldSession(world, isolation) as session:
        return run(task, world, session)


MAKER = Maker("general", synthesize, regate)
