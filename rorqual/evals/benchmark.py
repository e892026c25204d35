"""A benchmark is tasks and a protocol: what is asked and how it is checked, and under which settings it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import UserError, require
from rorqual.evals.judging import Judge
from rorqual.evals.source import Defect, Hub, RowError, find, rows
from rorqual.rollout.trajectory import Trajectory
from rorqual.tasks import Task
from rorqual.tasks.episode import Episode

LAST_RESULT = "<the last result>"

BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""The paper's template for mathematics and HLE: the question, a newline, and this instruction [V3.2, 4.1]."""


@dataclass(frozen=True)
class Protocol:
    """How the paper asks (section 4.1): temperature 1.0, a context of 128K tokens, thinking unless said otherwise."""

    template: str = "{question}"
    system: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    thinking: bool = True
    max_tokens: int = 131072
    """Sampled tokens of one attempt."""
    max_turns: int = 1
    window: int = 131072

    def __post_init__(self) -> None:
        require(
            self,
            template=("{question}" in self.template, "a text with {question} in it"),
            temperature=(self.temperature >= 0, "at least 0"),
            max_tokens=(self.max_tokens >= 1, "at least 1"),
            max_turns=(self.max_turns >= 1, "at least 1"),
        )

    def messages(self, question: str) -> tuple[dict[str, Any], ...]:
        user = {"role": "user", "content": self.template.format(question=question)}
        return ({"role": "system", "content": self.system}, user) if self.system else (user,)


GoldCalls = Sequence[Sequence[Any]]
"""The calls [name, arguments] of a reference solution, in order."""


def stored_calls(task: Task) -> GoldCalls:
    return task.payload.get("gold_calls", ())


@dataclass(frozen=True)
class Suite:
    """The tasks of one benchmark, ready to be played, and what of its file is no task."""

    tasks: Mapping[str, Task]
    open_episode: Callable[[Task], Episode]
    defects: tuple[Defect, ...] = ()
    gold_calls: Callable[[Task], GoldCalls] = stored_calls
    """For the gold program, which asks once for each attempt."""


@dataclass(frozen=True)
class Options:
    """What the user may say about the tasks, beside where they are."""

    data: str | None = None
    limit: int | None = None
    seed: int = 0
    """Of generated sets."""
    count: int = 100
    """Of generated sets."""
    length: int = 4096
    """Of generated sets: characters of the haystack."""
    isolation: str = "bwrap"
    """How untrusted programs are confined: a back end of rorqual.sandbox."""
    split: str = "test"
    """Of a store of synthesised tasks."""
    families: tuple[str, ...] = ()
    """Of a store of synthesised tasks: only those; empty: all."""
    user: str = ""
    """Address of the endpoint that plays the user, where a benchmark has one."""
    user_model: str = ""
    """Its name there; empty takes the first that the endpoint lists."""
    timeout_s: float = 10.0
    """Wall-clock seconds of one run of a submitted program."""
    judge: Judge | None = None
    """Decides answers in place of equality, where the benchmark allows it."""
    rule: Literal["ioi", "icpc"] = "ioi"
    """How a contest's submissions count."""
    submissions: int = 50
    """Of a contest, at most so many for each problem."""

    def __post_init__(self) -> None:
        require(
            self,
            limit=(self.limit is None or self.limit >= 1, "at least 1"),
            count=(self.count >= 1, "at least 1"),
            length=(self.length >= 1, "at least 1"),
            isolation=(self.isolation in ("bwrap", "process", "oci", "inline"), "bwrap, process or oci"),
            timeout_s=(self.timeout_s > 0, "above 0"),
            submissions=(self.submissions >= 1, "at least 1"),
        )


@dataclass(frozen=True)
class Benchmark:
    """One entry of the catalogue."""

    name: str
    title: str
    source: str
    """Where it comes from, for a person."""
    licence: str
    protocol: Protocol
    load: Callable[[Benchmark, Options], Suite]
    hub: Hub | None = None
    answer_of: Callable[[str], str | None] = lambda text: text.strip() or None
    """The answer in a final message, as a text that equal answers share: what a majority counts."""
    reference: Callable[[Task], str] = lambda task: task.payload["reference"]
    """The reference solution as a policy would write it: it must score 1. LAST_RESULT stands for what the last call gave."""
    corrupted: Callable[[Task], str] = lambda task: task.payload["corrupted"]
    """A reference solution made wrong: it must score 0."""
    published: str = ""
    """Its row in the published tables (rorqual.evals.published); empty where the paper has none."""
    notes: str = ""
    """What differs from the original."""
    is_judged: bool = False
    """A judge may decide its answers (--judge)."""
    extra: Callable[[Suite, Mapping[str, Sequence[Trajectory]], Options], dict[str, Any]] | None = None
    """What is reported beside the table, under its name: from the attempts that count."""


ReadRow = Callable[[Mapping[str, Any], Protocol, Options], Task | None]
"""From a row to a task; None for a row that the benchmark leaves out knowingly. Raises RowError."""


def row_suite(
    benchmark: Benchmark, options: Options, read: ReadRow, open_episode: Callable[[Task], Episode], files: Iterable[Path] = ()
) -> Suite:
    """The suite of a benchmark whose file has a row for each task. Rows that are no tasks become defects, by name."""
    tasks: dict[str, Task] = {}
    defects: list[Defect] = []
    for where, row in rows(list(files) or find(options.data, benchmark.hub, benchmark.name)):
        if options.limit is not None and len(tasks) >= options.limit:
            break
        if isinstance(row, Defect):
            defects.append(row)
            continue
        try:
            task = read({**row, "_where": where}, benchmark.protocol, options)
        except RowError as error:
            defects.append(Defect(where, str(error)))
            continue
        if task is not None and task.id in tasks:
            defects.append(Defect(where, f"its id {task.id} was given before"))
        elif task is not None:
            tasks[task.id] = task
    return _checked(benchmark.name, Suite(tasks, open_episode, tuple(defects)))


def _checked(name: str, suite: Suite) -> Suite:
    if not suite.tasks:
        first = suite.defects[0] if suite.defects else None
        reason = f"; the first of {len(suite.defects)} defective rows: {first.where}: {first.what}" if first else ""
        raise UserError(f"{name}: the file holds no question{reason}")
    return suite


def given_suite(name: str, tasks: Sequence[Task], open_episode: Callable[[Task], Episode]) -> Suite:
    """A suite of tasks that were made or stored, not read from rows."""
    return _checked(name, Suite({task.id: task for task in tasks}, open_episode))
