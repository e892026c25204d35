"""The held-out split of a store of synthesised tasks, of every family: worlds whose structure training never saw."""

from __future__ import annotations

import base64
from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmark import LAST_RESULT, Benchmark, GoldCalls, Options, Suite, given_suite
from rorqual.tasks import Store, Task, World, open_episode, splits
from rorqual.tasks.episode import SUBMIT, Episode

PIECE = 20_000
"""Characters of a file in one command."""


def load(benchmark: Benchmark, options: Options) -> Suite:
    """--data: the store; --split: test, test_combination, test_mechanism, train or all; --families: only those."""
    if options.data is None:
        raise UserError(f"{benchmark.name}: --data names a directory of tasks; rorqual synthesize --out DIR makes one")
    store = Store(options.data)
    wanted = [task for task in store.tasks() if not options.families or task.family in options.families]
    tasks, worlds = {task.id: task for task in wanted}, store.worlds()
    by_split = splits(tasks.values(), worlds) | {"all": list(tasks)}
    if not by_split.get(options.split):
        sizes = ", ".join(f"{name} {len(ids)}" for name, ids in sorted(by_split.items()))
        raise UserError(f"{options.data}: its split {options.split} holds no task; --split names another; there are {sizes}")
    chosen = [tasks[name] for name in by_split[options.split]][: options.limit]

    def opened(task: Task) -> Episode:
        return open_episode(task, worlds.get(task.world), options.isolation)

    suite = given_suite(benchmark.name, chosen, opened)
    return Suite(suite.tasks, opened, gold_calls=lambda task: gold_calls(task, worlds.get(task.world), options.isolation))


def reference(task: Task) -> str:
    """What the gold program says last, by what the family stores."""
    payload = task.payload
    if "gold" in payload:
        return payload["gold"]
    if "program" in payload:
        return LAST_RESULT
    return f"Answer: {payload['check']['value']}" if "check" in payload else "Done."


def gold_calls(task: Task, world: World | None, isolation: str) -> GoldCalls:
    """The stored solution as calls: a general task's solution function is run, a code task's gold files are written."""
    if "solution" in task.payload and world is not None:
        return _solved(task, world, isolation)
    if "changes" in task.payload and world is not None:
        from rorqual.tasks.grading import gold_of

        return [call for each in gold_of(world.payload, task.payload).items() for call in _written(*each)]
    return [["python", {"code": task.payload["program"]}]] if "program" in task.payload else []


def _solved(task: Task, world: World, isolation: str) -> GoldCalls:
    from rorqual.tasks.session import WorldSession

    with WorldSession(world, isolation) as session:
        session.prepare(task)
        solved = session.solve(task.payload["solution"])
    calls: list[list[Any]] = [[call.name, call.arguments] for call in solved.calls]
    return calls if solved.answer is None else [*calls, [SUBMIT, {"answer": solved.answer}]]


def _written(path: str, text: str | None) -> list[list[Any]]:
    """Shell commands that give a file its gold text; None takes it away. Linux takes no argument above 128 KiB: so in pieces."""
    commands = [f"rm -f '{path}'" if text is None else f": > '{path}'"]
    for at in range(0, len(text or ""), PIECE):
        packed = base64.b64encode((text or "")[at : at + PIECE].encode()).decode()
        commands.append(f"echo {packed} | base64 -d >> '{path}'")
    return [["bash", {"command": command}] for command in commands]
