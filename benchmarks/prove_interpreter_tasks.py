"""Code-interpreter tasks: the hidden program's answer is the question's, and without the tool it is out of reach.

Each table question is read again from its words alone and answered in SQL; each puzzle's answer is its library's own. The hidden
program, played in an episode, must find both. Held out from the gates is a panel of policies without the tool: numbers of the
prompt combined otherwise, the commonest answer, the answer of another question. How many candidates the gates keep is reported.
"""

from __future__ import annotations

import ast
import csv
import io
import re
import sqlite3
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rorqual.synthesis import Request, maker
from rorqual.tasks import Store, Task, World, open_episode
from rorqual.tasks.answer import check_answer

SECONDS, QUICK_SECONDS = 300, 60
COUNT, QUICK_COUNT, BLIND = 100, 30, 20
MOST_WITHOUT_TOOL, QUICK_MOST = 0.05, 0.15  # of 30 tasks a few share an answer by chance
_NOT = re.compile(r"(\w+) is not ('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")")
_LETTER = re.compile(r"label contains the letter '(\w)' in lower case")
_BOUND = re.compile(r"(\w+) is at (least|most) (\d+)")
RANKED = "SELECT {0} v, ROW_NUMBER() OVER (ORDER BY {0}) n FROM chosen"
ASKED = {
    r"What is the sum of their (\w+)\?": "SELECT SUM({0}) FROM chosen",
    r"Sort their (\w+) ascending and number them": f"SELECT SUM(v * n) FROM ({RANKED})",
    r"What is the lower median of their (\w+) \(": f"SELECT v FROM ({RANKED}) WHERE n = (SELECT (COUNT(*) + 1) / 2 FROM chosen)",
    r"What is the mean of their (\w+), rounded down": "SELECT SUM({0}) / COUNT(*) FROM chosen",
    r"Which label has the largest product of (\w+) and (\w+)":
        "SELECT label FROM chosen ORDER BY {0} * {1} DESC, label LIMIT 1",
    r"Add up (\w+) for each (\w+)\.": "SELECT MAX(total) FROM (SELECT SUM({0}) total FROM chosen GROUP BY {1})",
}  # fmt: skip


def condition(text: str) -> tuple[str, list[Any], str]:
    """(SQL, its values, what follows) of the condition that a text begins with. Raises ValueError."""
    if found := _NOT.match(text):
        return f"{found[1]} != ?", [ast.literal_eval(found[2])], text[found.end() :]
    if found := _LETTER.match(text):
        return "INSTR(label, ?) > 0", [found[1]], text[found.end() :]
    if found := _BOUND.match(text):
        return f"{found[1]} {'>=' if found[2] == 'least' else '<='} ?", [int(found[3])], text[found.end() :]
    raise ValueError(f"no condition: {text[:80]}")


def by_words(question: str, table: str) -> str:
    """The answer of a question over a CSV table, from its words. Raises ValueError where it says what is not known."""
    rest, tests, values = question.partition(" whose ")[2], [], []
    while not tests or rest.startswith(" and "):
        test, more, rest = condition(rest.removeprefix(" and "))
        tests, values = [*tests, test], [*values, *more]
    rows = list(csv.DictReader(io.StringIO(table)))
    names = list(rows[0])
    is_number = {name: all(row[name].isdigit() for row in rows) for name in names}
    columns = ", ".join(f"{name} {'INTEGER' if is_number[name] else 'TEXT'}" for name in names)
    with sqlite3.connect(":memory:") as db:
        db.execute(f"CREATE TABLE records ({columns})")
        db.executemany(f"INSERT INTO records VALUES ({', '.join('?' * len(names))})", [list(row.values()) for row in rows])
        db.execute(f"CREATE TEMP TABLE chosen AS SELECT * FROM records WHERE {' AND '.join(tests)}", values)
        for said, query in ASKED.items():
            if found := re.search(said, rest):
                return str(db.execute(query.format(*found.groups())).fetchone()[0])
    raise ValueError(f"nothing known is asked: {rest[:80]}")


def played(task: Task, world: World | None, with_files: bool = True) -> bool:
    """Whether the hidden program's output is a right answer, in an episode."""
    if world is not None and not with_files:
        world = World(
            world.id, world.family, {**world.payload, "files": {}}, world.fingerprint, world.mechanisms, world.provenance
        )
    episode = open_episode(task, world)
    try:
        episode.reset()
        return episode.finish(episode.call("python", {"code": task.payload["program"]})).passed
    finally:
        episode.close()


def without_tool(task: Task, others: Sequence[Task]) -> dict[str, str]:
    """policy -> its answer; none of these is among the gates' own."""
    numbers = [Fraction(n) for n in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)", task.payload["question"])] or [Fraction(0)]
    common = Counter(str(other.payload["check"]["value"]) for other in others)
    other = next(o for o in others if o.tags["skeleton"] == task.tags["skeleton"] or o is others[-1])
    return {
        "second_number": str(numbers[min(1, len(numbers) - 1)]), "median_number": str(statistics.median_low(numbers)),
        "largest_doubled": str(2 * max(numbers)), "largest_squared": str(max(numbers) ** 2),
        "first_times_last": str(numbers[0] * numbers[-1]), "rows_halved": "150", "rows": "300",
        "commonest_answer": common.most_common(1)[0][0], "another_questions_answer": str(other.payload["check"]["value"]),
        "length": str(len(task.payload["question"])), "words": str(len(task.payload["question"].split())),
    }  # fmt: skip


def main(quick: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "tasks")
        report = dict(maker("interpreter").synthesize(Request(QUICK_COUNT if quick else COUNT, store, 31, 1)))
        tasks, worlds = store.tasks(), store.worlds()
        tables = [task for task in tasks if task.tags["kind"] == "table"]
        for task in tables:
            table = worlds[task.world].payload["files"]["records.csv"]
            assert by_words(task.payload["question"], table) == task.payload["check"]["value"], task.id
        solved = sum(played(task, worlds.get(task.world)) for task in tasks)
        blind = sum(played(task, worlds[task.world], with_files=False) for task in tables[:BLIND])
    right: Counter[str] = Counter(dict.fromkeys(without_tool(tasks[0], tasks[1:]), 0))
    for i, task in enumerate(tasks):
        for policy, answer in without_tool(task, [*tasks[i + 1 :], *tasks[:i]]).items():
            right[policy] += check_answer(task.payload["check"], f"Answer: {answer}").passed
    shares = {policy: round(n / len(tasks), 4) for policy, n in right.items()}
    assert solved == len(tasks), f"the hidden program finds {solved} of {len(tasks)} answers"
    assert blind == 0, f"{blind} table questions are answered without their table"
    assert max(shares.values()) <= (QUICK_MOST if quick else MOST_WITHOUT_TOOL), f"policies without the tool: {shares}"
    kept = round(report["tasks"] / report["candidates"], 4)
    checked = {
        "questions_read_again_in_sql": len(tables),
        "hidden_program_in_an_episode": solved,
        "of_tables_taken_away": len(tables[:BLIND]),
    }
    return {"tasks": len(tasks), "kept": kept, **checked, "held_out_without_tool": shares, "synthesis": report}
