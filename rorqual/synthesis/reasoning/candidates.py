"""Candidates of the reasoning families and their gates."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.synthesis.guesses import guess_gate, wrong_gate
from rorqual.synthesis.interpreter.puzzles import LIBRARY, LICENCE, entry
from rorqual.synthesis.line import Made, refused
from rorqual.synthesis.reasoning import ReasoningConfig
from rorqual.synthesis.reasoning.pipelines import problem
from rorqual.tasks import GateResult, Provenance, Task, TaskError, TaskRow, digest
from rorqual.tasks.answer import ANSWER_LINE, check_answer
from rorqual.tasks.writing import words

MATHS_SETS = (
    "basic_arithmetic", "calendar_arithmetic", "chain_sum", "count_primes", "decimal_arithmetic", "dice",
    "fraction_simplification", "gcd", "lcm", "leg_counting", "number_sequence", "prime_factorization", "products",
    "simple_equations", "simple_geometry", "time_intervals", "base_conversion", "power_function",
)  # fmt: skip
LOGIC_SETS = (
    "aiw", "binary_alternation", "caesar_cipher", "color_cube_rotation", "family_relationships", "futoshiki",
    "game_of_life", "group_anagrams", "isomorphic_strings", "kakurasu", "knights_knaves", "largest_island",
    "letter_jumble", "maze", "mini_sudoku", "needle_haystack", "number_filtering", "number_sorting",
    "palindrome_partitioning", "path_star", "rectangle_count", "rotate_matrix", "rotten_oranges", "sentence_reordering",
    "shortest_path", "spell_backward", "string_manipulation", "sudoku", "tower_of_hanoi", "word_ladder",
    "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip
ASK_PROGRAM = "Reply with the whole program in one fenced block of Python."


def maths(config: ReasoningConfig, number: int) -> Made:
    rng = random.Random(f"{config.seed}/maths/{number}")
    return _judged(
        _word_problem(config, number, rng) if config.has_file and rng.random() < 0.5 else _library("maths", number, rng)
    )


def logic(config: ReasoningConfig, number: int) -> Made:
    return _judged(_library("logic", number, random.Random(f"{config.seed}/logic/{number}")))


def programming(config: ReasoningConfig, number: int) -> Made:
    rng = random.Random(f"{config.seed}/programming/{number}")
    from_file = config.has_file and rng.random() < 0.5
    return _judged(_human(config, number, rng) if from_file else _pipeline(number, rng))


def writing(config: ReasoningConfig, number: int) -> Made:
    return _judged(_text(number, random.Random(f"{config.seed}/writing/{number}")))


def _judged(task: Task | Made) -> Made:
    return task if isinstance(task, Made) else Made(TaskRow(task, tuple(gates(task, "bwrap"))))


def _task(
    family: str, number: int, prompt: str, check: dict[str, Any], gold: str, tags: dict[str, str], *source: Provenance
) -> Task:
    payload = {"check": check, "gold": gold}
    name = f"{family}-{number}-{digest([prompt, check], 8)}"
    return Task(name, family, ({"role": "user", "content": prompt},), payload=payload, max_calls=0, tags=tags, provenance=source)


def _library(family: str, number: int, rng: random.Random) -> Task | Made:
    name = rng.choice(MATHS_SETS if family == "maths" else LOGIC_SETS)
    try:
        item = entry(name, rng.randrange(2**31))
    except (ValueError, AttributeError) as error:
        return refused("plain_data", str(error))
    if not isinstance(item["answer"], str) or not item["answer"].strip():
        return refused("plain_data", f"{name}: the answer is no text")
    check = {"kind": "reasoning_gym", "dataset": name, "entry": item, "value": item["answer"]}
    tags = {"source": LIBRARY, "kind": name, "language": "en"}
    source = Provenance(LIBRARY, name, licence=LICENCE)
    return _task(family, number, f"{item['question']}\n\n{ANSWER_LINE}", check, f"Answer: {item['answer']}", tags, source)


@cache
def _rows(path: str) -> tuple[dict[str, Any], ...]:
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8")
        rows = tuple(json.loads(line) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, EOFError) as error:
        raise TaskError(f"problems={path}: {type(error).__name__}: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"problems={path}: expected one object a line")
    return rows


def _fields(config: ReasoningConfig, rng: random.Random, *names: str) -> dict[str, Any]:
    row = rng.choice(_rows(config.problems))
    if missing := [name for name in names if not isinstance(row.get(name), str)]:
        raise TaskError(f"problems={config.problems}: a row without {', '.join(missing)}")
    return row


def _word_problem(config: ReasoningConfig, number: int, rng: random.Random) -> Task | Made:
    row = _fields(config, rng, "question", "answer")
    value = row["answer"].rpartition("####")[2].strip().replace(",", "").lstrip("$")
    if not re.fullmatch(r"-?\d+(\.\d+)?", value):
        return refused("number_answer", value)
    check = {"kind": "number", "value": value}
    tags = {"source": Path(config.problems).stem, "kind": "word_problem", "language": "en"}
    source = Provenance(config.problems, digest(row))
    return _task("maths", number, f"{row['question']}\n\n{ANSWER_LINE}", check, f"Answer: {value}", tags, source)


def _human(config: ReasoningConfig, number: int, rng: random.Random) -> Task:
    row = _fields(config, rng, "prompt", "canonical_solution", "test", "entry_point")
    check = {"kind": "asserts", "entry": row["entry_point"], "source": row["test"]}
    gold = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    prompt = f"Complete this Python function.\n\n```python\n{row['prompt']}```\n\n{ASK_PROGRAM}"
    tags = {"source": Path(config.problems).name.partition(".")[0], "kind": "function", "language": "en"}
    return _task("programming", number, prompt, check, gold, tags, Provenance(config.problems, str(row.get("task_id", ""))))


def _pipeline(number: int, rng: random.Random) -> Task:
    length = rng.randrange(2, 6)
    ask, gold, tests, skeleton = problem(rng, length)
    check = {"kind": "calls", "entry": "transform", "tests": tests}
    tags = {"source": "grammar", "kind": f"pipeline{length}", "skeleton": skeleton, "language": "en"}
    return _task("programming", number, f"{ask}\n\n{ASK_PROGRAM}", check, f"```python\n{gold}```", tags)


TOPICS = (
    "a lighthouse in winter", "the first day at a new school", "why bridges hum in the wind", "a market before dawn",
    "the sound of an old radio", "how bread rises", "a letter that was never sent", "the last train home", "a garden on a roof",
    "the colour of deep water", "a map with a mistake", "learning to swim late", "the smell of rain", "a clock without hands",
    "the neighbour's piano", "an island of birds", "a lost key", "the language of bees", "a night in a library", "moving a house",
)  # fmt: skip
CONTENT = (
    "amber",
    "anchor",
    "basket",
    "candle",
    "copper",
    "feather",
    "harbour",
    "ladder",
    "lantern",
    "marble",
    "mirror",
    "orchard",
    "paper",
    "ribbon",
    "saddle",
    "silver",
    "thread",
    "timber",
    "velvet",
    "whistle",
)
FORMS = ("a short story", "a letter to a friend", "a diary entry", "an encyclopaedia entry", "a speech")


def _text(number: int, rng: random.Random) -> Task:
    """A text with rules of form; the gold text only proves that the rules can be fulfilled together."""
    include, exclude = rng.sample(CONTENT, 3), rng.choice(("very", "suddenly", "really", "thing", "nice"))
    parts, least = rng.randrange(2, 5), rng.randrange(60, 160)
    rules: list[dict[str, Any]] = [{"rule": "includes", "word": word} for word in include]
    rules += [{"rule": "excludes", "word": exclude}, {"rule": "paragraphs", "count": parts}]
    rules += [{"rule": "words", "least": least, "most": least + 80}, {"rule": "varied", "share": 0.4}]
    topic, form = rng.choice(TOPICS), rng.choice(FORMS)
    asked = [
        f"use the words {', '.join(include)}",
        f"avoid the word {exclude!r}",
        f"write {parts} paragraphs, empty lines between",
    ]
    asked.append(f"use {least} to {least + 80} words")
    if rng.random() < 0.5:
        letters = "".join(rng.sample("ABCDEFGHILMNOPRSTW", parts))
        rules.append({"rule": "initials", "letters": letters})
        asked.append(f"begin the paragraphs with the letters {', '.join(letters)} in this order")
    prompt = f"Write {form} about {topic}. Rules: {'; '.join(asked)}. Reply with the text alone."
    gold = _witness(rules, include, parts, least + 20, rng)
    tags = {"source": "grammar", "kind": "programmatic_rubric", "skeleton": f"{form}/{len(rules)}", "language": "en"}
    return _task("writing", number, prompt, {"kind": "constraints", "rules": rules}, gold, tags)


def _witness(rules: list[dict[str, Any]], include: Sequence[str], parts: int, count: int, rng: random.Random) -> str:
    """Invented words in place of prose: a proof that the rules hold together, no example of good writing."""
    letters = next((rule["letters"] for rule in rules if rule["rule"] == "initials"), "X" * parts)
    made = ["".join(rng.choice("bdfklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(count - len(include))]
    made[1:1] = include
    size = -(-len(made) // parts)
    groups = [made[i * size : (i + 1) * size] for i in range(parts)]
    return "\n\n".join(f"{letter}{' '.join(group)}." for letter, group in zip(letters, groups, strict=True))


def gates(task: Task, isolation: str) -> list[GateResult]:
    """Silence, guesses and near answers fail; the gold reply passes, twice."""
    check, gold = task.payload["check"], task.payload["gold"]
    idle = check_answer(check, None, isolation)
    passing = [check_answer(check, gold, isolation) for _ in range(2)]
    results = [
        GateResult("silence_fails", idle.is_valid and not idle.passed),
        GateResult("gold_passes", all(v.passed for v in passing), "; ".join(passing[0].reasons)),
    ]
    if task.family in ("maths", "logic"):
        results.append(guess_gate("guesses_fail", task.prompt, check, isolation, arithmetic=False))
        results.append(wrong_gate(str(check["value"]), check, isolation))
    elif task.family == "programming":
        results.append(_broken_programs_fail(task, isolation))
    else:
        results.append(_poor_texts_fail(task, isolation))
    return results


def _broken_programs_fail(task: Task, isolation: str) -> GateResult:
    entry_name = task.payload["check"]["entry"]
    poor = {
        "returns its argument": f"def {entry_name}(*a): return a[0]",
        "returns nothing": f"def {entry_name}(*a): return None",
        "returns an empty list": f"def {entry_name}(*a): return []",
        "equal to everything": f"class E:\n    def __eq__(s, o): return True\ndef {entry_name}(*a): return E()",
        "ends the process": f"import os\ndef {entry_name}(*a): os._exit(0)",
        "ends at import": "import sys\nsys.exit(0)",
        "no program": "pass",
    }
    passing = [
        name for name, text in poor.items() if check_answer(task.payload["check"], f"```python\n{text}\n```", isolation).passed
    ]
    return GateResult("cheats_fail", not passing, ", ".join(passing), {"programs": float(len(poor))})


def _poor_texts_fail(task: Task, isolation: str) -> GateResult:
    """The prompt, its words over and over, the gold text without its last paragraph, and with a rule's word taken out."""
    check, gold = task.payload["check"], task.payload["gold"]
    first = check["rules"][0]["word"]
    poor = [task.prompt, " ".join(words(task.prompt)[:3] * 40), gold.rpartition("\n\n")[0], re.sub(rf"\b{first}\b", "", gold)]
    passing = [str(i) for i, text in enumerate(poor) if check_answer(check, text, isolation).passed]
    return GateResult("poor_texts_fail", not passing, ", ".join(passing), {"texts": float(len(poor))})
