"""The general-agent family: worlds of tables with tools over them, verified by predicates on the final state and the answer."""

from __future__ import annotations

from rorqual.tasks.episode import Episode, WorldEpisode
from rorqual.tasks.families import Family
from rorqual.tasks.session import WorldSession
from rorqual.tasks.task import GateResult, Task, TaskError, World


def open_general(task: Task, world: World | None, isolation: str) -> Episode:
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    return WorldEpisode(task, world, isolation)


def validate_general(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Doing nothing fails, the solution passes, and a reset gives the initial bytes back."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    with WorldSession(world, isolation) as session:
        session.prepare(task)
        session.reset()
        before = session.digest()
        idle = session.verify(task, [], None)
        solved = session.solve(task.payload["solution"])
        gold = session.verify(task, solved.delta, solved.answer)
        session.reset()
        return [
            GateResult("initial_fails", idle.is_valid and not idle.passed, "; ".join(idle.reasons)),
            GateResult("gold_passes", gold.passed and not solved.failure, solved.failure or "; ".join(gold.reasons)),
            GateResult("reset_identical", session.digest() == before),
        ]


FAMILY = Family("general", open_general, validate_general)
