"""Questions over real tables: a sample of this machine's records as a CSV file, a question out of a grammar, a hidden program.

Grammar: an aggregate over the rows that fulfil one or two conditions. It is a sum, a mean, a median, the largest group, the label
of the extreme row, or a sum weighted by ranks.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from rorqual.tasks import Provenance, TaskError, World, digest
from rorqual.tasks.retrieval.corpora import CORPORA, ISO_FOLDER, package_records, read_corpus

FILE = "records.csv"


@dataclass(frozen=True)
class Table:
    """Columns: label, texts (few values each), numbers."""

    name: str
    licence: str
    source: str
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def _packages() -> Table:
    rows = []
    for record in package_records():
        size, weight = record.get("Installed-Size", ""), record.get("Size", "")
        if size.isdigit() and weight.isdigit():
            rows.append({
                "label": record["Package"], "section": record.get("Section", ""), "architecture": record.get("Architecture", ""),
                "priority": record.get("Priority", ""), "installed_kib": int(size), "download_bytes": int(weight),
                "dependencies": len([d for d in record.get("Depends", "").split(",") if d.strip()]),
            })  # fmt: skip
    numbers = ("installed_kib", "download_bytes", "dependencies")
    return Table("packages", "each package's own terms", "apt-cache dumpavail", ("section", "architecture"), numbers, tuple(rows))


def _languages() -> Table:
    found = json.loads((ISO_FOLDER / "iso_639-3.json").read_text(encoding="utf-8"))["639-3"]
    rows = [
        {"label": e["name"], "scope": e["scope"], "type": e["type"], "initial": e["alpha_3"][0], "name_length": len(e["name"]),
         "words": len(e["name"].split())} for e in found
    ]  # fmt: skip
    return Table(
        "languages", "LGPL-2.1-or-later", "iso_639-3.json", ("scope", "type", "initial"), ("name_length", "words"), tuple(rows)
    )


def _routines() -> Table:
    rows = [
        {"label": d.title, "module": d.title.split(".")[0], "characters": len(d.text), "lines": d.text.count("\n") + 1,
         "words": len(d.text.split())} for d in read_corpus("python") if "." in d.title
    ]  # fmt: skip
    return Table("routines", CORPORA["python"].licence, "docstrings", ("module",), ("characters", "lines", "words"), tuple(rows))


SOURCES: dict[str, Callable[[], Table]] = {"packages": _packages, "languages": _languages, "routines": _routines}


@cache
def tables() -> tuple[Table, ...]:
    """Those that this machine has."""
    found = []
    for read in SOURCES.values():
        try:
            table = read()
        except (OSError, TaskError):
            continue
        if len(table.rows) >= 1000:
            found.append(table)
    return tuple(found)


def sample(config_seed: int, number: int, rows: int) -> tuple[World, Table, list[dict[str, Any]]]:
    """The world of the number-th table: a pure function of its arguments and of the machine's records."""
    rng = random.Random(f"{config_seed}/table/{number}")
    if not tables():
        raise TaskError("interpreter: this machine has no table to sample (apt-cache, iso-codes); set tables=0")
    table = rng.choice(tables())
    chosen = rng.sample(table.rows, min(rows, len(table.rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(chosen[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(chosen)
    payload = {"files": {FILE: text.getvalue()}, "table": table.name}
    source = Provenance(table.source, f"{len(chosen)} of {len(table.rows)} records", digest(table.rows, 64), table.licence)
    name = f"table-{digest(payload)}"
    return World(name, "interpreter", payload, digest([table.name, sorted(chosen[0])]), (table.name,), (source,)), table, chosen


PRELUDE = f"import csv, statistics\nfrom collections import Counter\nrows = list(csv.DictReader(open({FILE!r})))\n"


def question(rng: random.Random, table: Table, rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    """(the question, the hidden program's body that sets `answer`, the goal's skeleton)."""
    conditions = [_condition(rng, table, rows) for _ in range(rng.choice((1, 2, 2)))]
    said = " and ".join(said for said, _ in conditions)
    chosen = f"chosen = [r for r in rows if {' and '.join(code for _, code in conditions)}]\n"
    name = rng.choice(list(AGGREGATES))
    ask, body = AGGREGATES[name](rng, table)
    skeleton = f"{name}/{len(conditions)}/{table.name}"
    return f"Take the rows of {FILE} whose {said}. {ask}", PRELUDE + chosen + body, skeleton


def _condition(rng: random.Random, table: Table, rows: list[dict[str, Any]]) -> tuple[str, str]:
    kind = rng.choice(("text", "number", "number", "label"))
    if kind == "text":
        column = rng.choice(table.texts)
        value = rng.choice(rows)[column]
        return f"{column} is not {value!r}", f"r[{column!r}] != {value!r}"
    if kind == "label":
        letter = rng.choice("aeiorstn")
        return f"label contains the letter {letter!r} in lower case", f"{letter!r} in r['label']"
    column = rng.choice(table.numbers)
    value = sorted(row[column] for row in rows)[rng.randrange(len(rows) // 4, 3 * len(rows) // 4)]
    word, sign = rng.choice((("at least", ">="), ("at most", "<=")))
    return f"{column} is {word} {value}", f"int(r[{column!r}]) {sign} {value}"


def _total(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    return f"What is the sum of their {column}?", f"answer = sum(int(r[{column!r}]) for r in chosen)"


def _spread(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    code = f"values = sorted(int(r[{column!r}]) for r in chosen)\nanswer = sum(v * i for i, v in enumerate(values, 1))"
    return f"Sort their {column} ascending and number them from 1. What is the sum of each value times its number?", code


def _median(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    ask = f"What is the lower median of their {column} (of an even number of values, the smaller middle one)?"
    return ask, f"answer = statistics.median_low(int(r[{column!r}]) for r in chosen)"


def _mean(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    ask = f"What is the mean of their {column}, rounded down to a whole number?"
    return ask, f"answer = sum(int(r[{column!r}]) for r in chosen) // len(chosen)"


def _extreme(rng: random.Random, table: Table) -> tuple[str, str]:
    a, b = rng.sample(table.numbers, 2)
    ask = f"Which label has the largest product of {a} and {b}? Among equals take the first in alphabetical order."
    return ask, f"answer = min(chosen, key=lambda r: (-int(r[{a!r}]) * int(r[{b!r}]), r['label']))['label']"


def _group(rng: random.Random, table: Table) -> tuple[str, str]:
    text, column = rng.choice(table.texts), rng.choice(table.numbers)
    ask = f"Add up {column} for each {text}. What is the largest total?"
    code = f"totals = Counter()\nfor r in chosen:\n    totals[r[{text!r}]] += int(r[{column!r}])\nanswer = max(totals.values())"
    return ask, code


AGGREGATES: dict[str, Callable[[random.Random, Table], tuple[str, str]]] = {
    "sum": _total,
    "weighted_ranks": _spread,
    "median": _median,
    "mean": _mean,
    "extreme": _extreme,
    "group": _group,
}
