"""Gold plans: how a task is done, from the solution that it keeps hidden, as moves that an agent could have made.

A plan is data for each family: the calls in order, and the last message. It is played through the task's own episode like any
attempt, so that observations are true and the verdict is the verifier's (`rorqual.rollout.gold`). Where a family keeps no path
to its answer (a text, an answer found by a hidden index), the plan is the shortest honest one: the evidence and the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorqual.tasks.episode import SUBMIT
from rorqual.tasks.session import WorldSession
from rorqual.tasks.task import Task, TaskError, World

DONE = "Done."


@dataclass(frozen=True)
class Move:
    """One tool call. `note`: what it is for, in a few words, where the task knows."""

    name: str
    arguments: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Moves, then the last message; an answer of None is the last line that the last call gave. `work`: reasoning of a task
    that keeps some (`payload["work"]`)."""

    moves: tuple[Move, ...]
    answer: str | None
    work: str = ""

    @property
    def ends_by_call(self) -> bool:
        """The answer is handed in through a tool; no message follows."""
        return bool(self.moves) and self.moves[-1].name == SUBMIT


def gold_plan(task: Task, world: World | None, isolation: str = "bwrap") -> Plan:
    """The task's plan. Raises TaskError where its family has none, or its solution does not run."""
    if task.family not in PLANS:
        raise TaskError(f"task {task.id}: no gold plan is known for the family {task.family}; there are {', '.join(PLANS)}")
    try:
        return PLANS[task.family](task, world, isolation)
    except KeyError as error:
        raise TaskError(f"task {task.id}: its payload has no {error}, which a gold plan needs") from None


def _general(task: Task, world: World | None, isolation: str) -> Plan:
    """The calls of the solution function, as it makes them from the initial state."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    with WorldSession(world, isolation) as session:
        session.prepare(task)
        solved = session.solve(task.payload["solution"])
    if solved.failure:
        raise TaskError(f"task {task.id}: its solution fails: {solved.failure}")
    moves = tuple(Move(call.name, call.arguments) for call in solved.calls)
    can_submit = any(tool["function"]["name"] == SUBMIT for tool in task.tools)
    if solved.answer is not None and can_submit:
        return Plan((*moves, Move(SUBMIT, {"answer": solved.answer}, "hand in the answer")), solved.answer)
    return Plan(moves, solved.answer if solved.answer is not None else DONE)


def _text(task: Task, world: World | None, isolation: str) -> Plan:
    return Plan((), task.payload["gold"], task.payload.get("work", ""))


def _interpreter(task: Task, world: World | None, isolation: str) -> Plan:
    return Plan((Move("python", {"code": task.payload["program"]}, "compute it"),), None)


def _search(task: Task, world: World | None, isolation: str) -> Plan:
    """The moves that the task keeps; else one search with the facts' words, then each document of the evidence at its line."""
    answer = f"Answer: {task.payload['check']['value']}"
    if "moves" in task.payload:
        return Plan(tuple(Move(name, arguments) for name, arguments in task.payload["moves"]), answer)
    words = " ".join(_clause_words(task.payload["clauses"]))
    moves = [Move("search", {"query": words}, "find where these facts stand")]
    for piece in {(piece["url"], piece["line"]): piece for piece in task.payload["evidence"]}.values():
        where = {"id": piece["url"], "view_source": True, "loc": piece["line"], "num_lines": 3}
        moves.append(Move("open", where, "read one of the facts"))
    return Plan(tuple(moves), answer)


def _clause_words(clauses: Any) -> list[str]:
    """The values that the clauses name, those inside chains too."""
    found: list[str] = []
    for clause in clauses:
        found += _clause_words(clause["of"]) if "of" in clause else [str(clause["value"])]
    return found


def _code(task: Task, world: World | None, isolation: str) -> Plan:
    """Show the faulty lines, write the right ones, show them again."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    moves: list[Move] = []
    for path, faulty in task.payload["changes"].items():
        first, last, right = changed_lines(faulty, world.payload["files"][path])
        look = f"sed -n '{max(1, first - 3)},{last + 3}p' {path}"
        mend = f"python3 - <<'END'\nlines = open({path!r}).read().split('\\n')\nlines[{first - 1}:{last}] = {right!r}\n"
        mend += f"open({path!r}, 'w').write('\\n'.join(lines))\nEND"
        moves += [Move("bash", {"command": look}, "look at the suspected lines")]
        moves += [Move("bash", {"command": mend}, "mend them"), Move("bash", {"command": look}, "see that it is right")]
    return Plan(tuple(moves), DONE)


def changed_lines(before: str, after: str) -> tuple[int, int, list[str]]:
    """The lines of `before`, counted from 1, first to last, that differ as one block, and what stands there in `after`."""
    old, new = before.split("\n"), after.split("\n")
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    return head + 1, len(old) - tail, new[head : len(new) - tail]


PLANS: dict[str, Callable[[Task, World | None, str], Plan]] = {
    "general": _general,
    "search": _search,
    "code": _code,
    "interpreter": _interpreter,
    "maths": _text,
    "logic": _text,
    "programming": _text,
    "writing": _text,
}
