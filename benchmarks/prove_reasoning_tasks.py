"""The verifiers of maths, logic, programming and writing accept every gold answer and refuse corrupted ones.

Corrupted are: an answer by one digit or letter, or by the gold answer of another task of its kind; a program by one fault (as the
code family plants them), where it differs from the gold program on random lists; a text by one broken rule at a time. An answer
that is accepted all the same is an error, but for two data sets that rightly leave some of a text unread; these are counted.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rorqual.synthesis import Request, maker
from rorqual.synthesis.code.mutations import mutations
from rorqual.tasks import Store, Task
from rorqual.tasks.answer import check_answer, program_of

SECONDS, QUICK_SECONDS = 600, 120
COUNTS = {"maths": 150, "logic": 150, "programming": 40, "writing": 150}
QUICK_COUNTS = {"maths": 12, "logic": 12, "programming": 4, "writing": 20}
LEAST_NOTICED, LISTS = 0.95, 200
READ_LOOSELY = {
    "power_function": "asks for three figures, and the changed digit may be a later one",
    "knights_knaves": "reads who is what, and the changed letter may stand in another word",
}


def main(quick: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family, count in (QUICK_COUNTS if quick else COUNTS).items():
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "tasks")
            report = dict(maker(family).synthesize(Request(count, store, 32, 1)))
            tasks = store.tasks()
        gold = sum(check_answer(task.payload["check"], task.payload["gold"]).passed for task in tasks)
        assert gold == len(tasks), f"{family}: {gold} of {len(tasks)} gold answers pass"
        kept = {"tasks": len(tasks), "kept": round(len(tasks) / report["candidates"], 4), "rejected": report["rejected"]}
        found[family] = {**kept, "gold_passes": gold, **PROOFS[family](tasks)}
    return found


def answers(tasks: Sequence[Task]) -> dict[str, Any]:
    """Corrupted short answers."""
    rng, by_kind, tried, accepted = random.Random(0), defaultdict(list), Counter[str](), Counter[str]()
    for task in tasks:
        by_kind[task.tags["kind"]].append(str(task.payload["check"]["value"]))
    by_set: Counter[str] = Counter()
    for task in tasks:
        value, kind = str(task.payload["check"]["value"]), task.tags["kind"]
        others = [other for other in by_kind[kind] if other.strip().lower() != value.strip().lower()]
        for way, text in {"changed": changed(value, rng), "foreign": rng.choice(others) if others else None}.items():
            if text is None:
                continue
            tried[way] += 1
            if check_answer(task.payload["check"], f"Answer: {text}").passed:
                accepted[way] += 1
                by_set[kind] += 1
    assert set(by_set) <= set(READ_LOOSELY), f"corrupted answers are accepted: {dict(by_set)}"
    return {"corrupted": dict(tried), "accepted": dict(accepted), "accepted_by_data_set": dict(by_set)}


def changed(value: str, rng: random.Random) -> str | None:
    """One digit, or one letter, is another one; nothing where there is none."""
    places = [m.start() for m in re.finditer(r"[0-9]", value)] or [m.start() for m in re.finditer(r"[A-Za-z]", value)]
    if not places:
        return None
    place = rng.choice(places)
    pool = "123456789" if value[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    other = rng.choice([c for c in pool if c != value[place].lower()])
    return value[:place] + other + value[place + 1 :]


def programs(tasks: Sequence[Task]) -> dict[str, Any]:
    """Gold programs with one fault, where random lists tell it from the gold one."""
    rng, refused, differing, same = random.Random(0), 0, 0, 0
    lists = [[rng.randrange(-60, 90) for _ in range(rng.randrange(18))] for _ in range(LISTS)]
    for task in tasks:
        gold = program_of(task.payload["gold"])
        for fault in mutations("gold.py", gold):
            if (text := fault.apply(gold)) is None:
                continue
            if results(text, lists) == results(gold, lists):
                same += 1
                continue
            differing += 1
            refused += not check_answer(task.payload["check"], f"```python\n{text}\n```").passed
    assert differing and refused >= LEAST_NOTICED * differing, f"tests notice {refused} of {differing} faults"
    return {"faults_that_lists_tell": differing, "refused": refused, "faults_that_no_list_tells": same}


def results(source: str, lists: Sequence[list[int]]) -> list[Any]:
    """What this package's own program gives for each list; an error by its name."""
    space: dict[str, Any] = {}
    exec(compile(source, "gold.py", "exec"), space)
    found: list[Any] = []
    for values in lists:
        try:
            found.append(space["transform"](list(values)))
        except Exception as error:
            found.append(type(error).__name__)
    return found


def texts(tasks: Sequence[Task]) -> dict[str, Any]:
    """Texts that break one rule."""
    tried: Counter[str] = Counter()
    for task in tasks:
        for rule, text in broken(task.payload["check"]["rules"], task.payload["gold"]):
            tried[rule] += 1
            verdict = check_answer(task.payload["check"], text)
            assert not verdict.passed and rule in verdict.reasons, (task.id, rule, verdict)
    return {"refused_by_broken_rule": dict(sorted(tried.items()))}


def broken(rules: Sequence[dict[str, Any]], gold: str) -> Iterator[tuple[str, str]]:
    """(rule, the gold text with that rule broken)."""
    parts = gold.split("\n\n")
    for rule in rules:
        if rule["rule"] == "includes":
            yield "includes", re.sub(rf"(?<!\w){rule['word']}(?!\w)", "bakemu", gold)
        elif rule["rule"] == "excludes":
            yield "excludes", gold[:-1] + f" {rule['word']}."
        elif rule["rule"] == "paragraphs":
            yield "paragraphs", "\n\n".join([*parts, parts[-1]])
            yield "paragraphs", " ".join(parts)
        elif rule["rule"] == "words":
            yield "words", gold + " bakemu" * rule["most"]
            yield "words", "\n\n".join(" ".join(part.split()[:3]) for part in parts)
        elif rule["rule"] == "varied":
            yield "varied", "\n\n".join(part[0] + " same" * 20 for part in parts)
        elif rule["rule"] == "initials":
            yield "initials", "\n\n".join("9" + part[1:] for part in parts)


PROOFS = {"maths": answers, "logic": answers, "programming": programs, "writing": texts}
