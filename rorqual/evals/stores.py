"""The held-out split of a store of synthesised tasks: worlds whose structure training never saw."""

from __future__ import annotations

from rorqual.errors import UserError
from rorqual.evals.benchmark import Benchmark, Options, Suite, given_suite
from rorqual.tasks import Store, Task, open_episode, splits
from rorqual.tasks.episode import Episode


def load(benchmark: Benchmark, options: Options) -> Suite:
    """--data: the store; --split: test, test_combination, test_mechanism, train or all."""
    if options.data is None:
        raise UserError(f"{benchmark.name}: --data names a directory of tasks; rorqual synthesize --out DIR makes one")
    store = Store(options.data)
    tasks, worlds = {task.id: task for task in store.tasks()}, store.worlds()
    by_split = splits(tasks.values(), worlds) | {"all": list(tasks)}
    if not by_split.get(options.split):
        sizes = ", ".join(f"{name} {len(ids)}" for name, ids in sorted(by_split.items()))
        raise UserError(f"{options.data}: its split {options.split} holds no task; there are {sizes}")
    chosen = [tasks[name] for name in by_split[options.split]][: options.limit]

    def opened(task: Task) -> Episode:
        return open_episode(task, worlds.get(task.world), options.isolation)

    return given_suite(benchmark.name, chosen, opened)
