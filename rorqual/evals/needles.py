"""Long-context sets made from a seed: a needle in a haystack, and a RULER-like set of four kinds.

The haystack is made of plain sentences with numbers in them, so that no needle stands out by its look. Lengths are in
characters, since a benchmark knows no tokenizer; the depth of a needle is a share of the haystack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from rorqual.evals.answers import boxed
from rorqual.evals.benchmark import Benchmark, Options, Protocol, Suite, given_suite
from rorqual.evals.text import text_opener
from rorqual.tasks import Task
from rorqual.tasks.verdict import Verdict, failed, passed

TEMPLATE = "{question}\nAnswer with what is asked alone, within \\boxed{{}}."
PLACES = (
    "harbour", "mill", "quarry", "orchard", "library", "bakery", "station", "garden", "lighthouse", "foundry", "chapel", "market",
    "bridge", "school",
)  # fmt: skip
THINGS = (
    "ledger", "lantern", "barrel", "ticket", "blanket", "kettle", "compass", "basket", "ladder", "mirror", "saddle", "anchor",
    "drum", "ribbon",
)  # fmt: skip
VERBS = ("moved", "counted", "painted", "weighed", "sold", "repaired", "stored", "measured")


def score(task: Task, text: str) -> Verdict:
    """All wanted words, and no other: partial credit is a measure and changes nothing."""
    answer = answer_of(text)
    if answer is None:
        return failed("no_answer")
    wanted, found = set(task.payload["gold"]), set(answer.split())
    recall = len(wanted & found) / len(wanted)
    return passed({"recall": recall}) if wanted == found else failed("wrong", measures={"recall": recall})


def answer_of(text: str) -> str | None:
    """The words of the answer, sorted: what is boxed, or else the whole message."""
    inner = boxed(text)
    words = (text if inner is None else inner).replace(",", " ").replace(".", " ").replace("\\text", " ").strip("{} ").split()
    return " ".join(sorted(set(words))) or None


def haystack(draw: random.Random, length: int) -> list[str]:
    """Sentences of about `length` characters in all."""
    found, used = [], 0
    while used < length:
        found.append(
            f"At the {draw.choice(PLACES)} they {draw.choice(VERBS)} {draw.randrange(10, 1000)} of the {draw.choice(THINGS)}s "
            f"on day {draw.randrange(1, 400)}."
        )
        used += len(found[-1]) + 1
    return found


def hidden(draw: random.Random, sentences: list[str], needles: Sequence[str], depth: float | None = None) -> str:
    """The text with the needles in it, in their order: at one depth, or at random places."""
    places = sorted(draw.randrange(len(sentences) + 1) for _ in needles)
    if depth is not None:
        places = [round(depth * len(sentences))] * len(needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return " ".join(sentences)


Made = tuple[str, str, list[str]]
"""Text, question, the words of the answer."""


def needle(draw: random.Random, length: int, depth: float | None = None) -> Made:
    key, value = f"{draw.choice(PLACES)}-{draw.randrange(100, 1000)}", str(draw.randrange(10**6, 10**7))
    text = hidden(draw, haystack(draw, length), [f"The code of {key} is {value}."], depth)
    return text, f"What is the code of {key}?", [value]


def among_needles(draw: random.Random, length: int) -> Made:
    """One needle asked for among eight of the same form."""
    keys = draw.sample([f"{place}-{number}" for place in PLACES for number in range(100, 110)], 8)
    values = [str(draw.randrange(10**6, 10**7)) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    text = hidden(draw, haystack(draw, length), [f"The code of {key} is {value}." for key, value in pairs])
    key, value = draw.choice(pairs)
    return text, f"What is the code of {key}?", [value]


def several_values(draw: random.Random, length: int) -> Made:
    key = f"{draw.choice(PLACES)}-{draw.randrange(100, 1000)}"
    values = [str(value) for value in draw.sample(range(10**6, 10**7), 4)]
    text = hidden(draw, haystack(draw, length), [f"A code of {key} is {value}." for value in values])
    return text, f"What are all the codes of {key}?", values


def traced_variable(draw: random.Random, length: int) -> Made:
    """A value handed on from name to name; which names hold it, and which hold another's."""
    names = draw.sample([a + b for a in "ABCDEFGH" for b in "KLMNPQRS"], 10)
    value, other = (str(number) for number in draw.sample(range(10000, 100000), 2))
    chains = [names[:5], names[5:]]
    needles = [[f"Let {chain[0]} be {number}."] + [f"Let {b} be {a}." for a, b in pairwise(chain)]
               for chain, number in zip(chains, (value, other), strict=True)]  # fmt: skip
    mixed = [line for pair in zip(*needles, strict=True) for line in pair]
    return hidden(draw, haystack(draw, length), mixed), f"Which names hold the value {value}?", chains[0]


def commonest_words(draw: random.Random, length: int) -> Made:
    """The three words that come most often, each half as often again as the next; the rest come twice at most."""
    vocabulary = draw.sample(
        [a + b + c for a in ("ba", "ke", "li", "mo", "su") for b in ("na", "ro", "ti", "du") for c in "klmnprst"], 150
    )
    common, rest = vocabulary[:3], vocabulary[3:]
    size = max(length // 8, 60)
    counts = [max(12, size // 8), max(8, size // 12), max(5, size // 18)]
    words = [word for word, count in zip(common, counts, strict=True) for _ in range(count)]
    cap = max(2, counts[2] // 2)
    for number in range(max(size - len(words), 0)):
        words.append(rest[number % len(rest)]) if number < cap * len(rest) else None
    draw.shuffle(words)
    return " ".join(words), "Which three words come most often in the text?", common


RULER: dict[str, Callable[[random.Random, int], Made]] = {
    "among_needles": among_needles,
    "several_values": several_values,
    "traced_variable": traced_variable,
    "commonest_words": commonest_words,
}


def _task(identity: str, made: Made, protocol: Protocol, **tags: str) -> Task:
    text, question, gold = made
    payload = {"gold": gold, "reference": f"\\boxed{{{', '.join(gold)}}}", "corrupted": f"\\boxed{{{gold[0]}0}}"}
    return Task(identity, "text", protocol.messages(f"{text}\n\n{question}"), payload=payload, tags=tags)


def load_needles(benchmark: Benchmark, options: Options) -> Suite:
    """Depths spread evenly over the haystack, the first at its start and the last at its end."""
    count = min(options.count, options.limit or options.count)
    tasks = []
    for number in range(count):
        depth = number / (count - 1) if count > 1 else 0.5
        made = needle(random.Random(f"{options.seed}/needle/{options.length}/{number}"), options.length, depth)
        name = f"needles/{options.length}/{options.seed}/{number}"
        tasks.append(_task(name, made, benchmark.protocol, depth=f"{depth:.3f}"))
    return given_suite(benchmark.name, tasks, text_opener(score))


def load_ruler(benchmark: Benchmark, options: Options) -> Suite:
    """The four kinds in turn."""
    count = min(options.count, options.limit or options.count)
    tasks = []
    for number in range(count):
        kind = list(RULER)[number % len(RULER)]
        made = RULER[kind](random.Random(f"{options.seed}/{kind}/{options.length}/{number}"), options.length)
        tasks.append(_task(f"ruler/{kind}/{options.length}/{options.seed}/{number}", made, benchmark.protocol, kind=kind))
    return given_suite(benchmark.name, tasks, text_opener(score))
