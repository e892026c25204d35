"""Recall documents: keys and values far apart, so that retrieval is learned, and can be measured.

A fact is `@ VALUE KEY`; a question is `? KEY`, and its answer is the fact's value (the value comes first in a fact because
that is what a small model learns soonest: it finds the same key, and what stood before it). Between the facts stands filler:
real text where there is any. KEY and VALUE are words of one token each where the tokenizer has them (one trained with recall
documents in its text does; tiny models never learn to copy names of several tokens). A repeat is a line of words, and the
same line again. An echo is pairs of words, the first of each said again after it: `a b a c d c`. Only answers are trained on:
what is drawn at random, nothing could predict.

To answer a question a model must find the key and know what stood before it. Finding is learned at once; looking one token
back is not, and neither has a gradient without the other. Echoes ask for nothing but the token before. What decides at the tiny
size is the batch: with 64 rows and more most seeds learned it, with 16 none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from rorqual.data.store import Documents
from rorqual.errors import UserError, require

_WORDS = """
amber anchor apple arrow autumn badge basil beacon berry birch blaze bloom bridge bronze brook butter cabin cactus camel
candle canyon carbon castle cedar cherry cinder citrus clover cobalt comet copper coral cotton cradle crater crystal dagger
daisy delta desert diamond dolphin dragon dune eagle ember emerald falcon feather fennel fern fiddle flint forest fossil
fountain galaxy garden garnet ginger glacier goblet granite grape gravel hammer harbor hazel heron hollow honey indigo iris
island ivory ivy jacket jade jasmine jasper jungle juniper kettle kitten ladder lagoon lantern laurel lemon lilac linen lion
lotus magnet mango maple marble meadow melon mercury meteor mint mirror monsoon moss mountain nectar needle nickel nutmeg oak
oasis ocean olive onyx opal orange orchid otter oyster palace panther paper pearl pebble pepper petal pigeon pillow pine
planet plum poppy prairie prism pumpkin quartz quill rabbit raven reef ribbon ridge river robin rocket rose ruby saddle
saffron sage salmon sapphire satin shadow shell silk silver spark sparrow spice spruce star stone storm sugar summit swan
temple thistle thunder tiger timber topaz torch tower tulip tunnel turtle valley vanilla velvet violet walnut wave willow
winter wolf zebra zephyr zinc
"""
WORDS = tuple(_WORDS.split())
MIN_WORDS = 64


@dataclass(frozen=True)
class RecallConfig:
    """How recall documents are drawn. Lengths are in tokens."""

    share: float = 0.2
    """Of the rows of a batch; stated here, counted by the loader."""
    min_length: int = 48
    max_length: int | None = None
    """None: as long as the context."""
    repeats: float = 0.3
    """The share of documents that are a list of words, twice: nothing teaches copying sooner."""
    echoes: float = 0.0
    """The share of documents that are echoes."""
    early_echoes: float = 0.0
    """The same among the first `early_rows` recall rows of a stage."""
    early_rows: int = 0
    filler: float = 0.5
    """The share of the others whose facts stand apart in real text; in the rest facts follow one another."""
    words: int | None = None
    """How many words there are, half of them keys; None: all. The fewer, the sooner a tiny model learns them."""
    max_facts: int = 24
    """In documents with filler; the others are facts and questions throughout."""
    questions: int = 8
    """At most, in documents with filler; the others are asked until they are full, so that few facts make an easy document."""

    def __post_init__(self) -> None:
        require(
            self,
            share=(0 <= self.share < 1, "in [0, 1)"),
            min_length=(self.min_length >= 16, "at least 16"),
            max_length=(self.max_length is None or self.max_length >= self.min_length, f"at least min_length={self.min_length}"),
            repeats=(0 <= self.repeats <= 1, "in [0, 1]"),
            echoes=(0 <= self.echoes <= 1, "in [0, 1]"),
            early_echoes=(0 <= self.early_echoes <= 1, "in [0, 1]"),
            early_rows=(self.early_rows >= 0, "at least 0"),
            filler=(0 <= self.filler <= 1, "in [0, 1]"),
            words=(self.words is None or self.words >= 16, "at least 16, or none"),
            max_facts=(self.max_facts >= 1, "at least 1"),
            questions=(self.questions >= 1, "at least 1"),
        )

    def echoes_at(self, row: int) -> float:
        """The share of echoes in recall row `row` of a stage."""
        return self.early_echoes if row < self.early_rows else self.echoes


@dataclass(frozen=True)
class RecallDocument:
    """tokens int64 [T]; answers bool [T]: which tokens are answers."""

    tokens: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """The pieces that recall documents are made of: token ids of each."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]
    fact: tuple[int, ...]
    question: tuple[int, ...]
    end: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]
    """No word is both a key and a value."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ends: tuple[int, int], count: int | None = None) -> Vocabulary:
        """Words of one token where at least MIN_WORDS are; otherwise the longest, all of one number of tokens.

        ends: the ids that begin and end a document. count: take so many of the words only.
        """
        words = [tuple(tokenizer.encode(f" {word}", add_special_tokens=False).ids) for word in WORDS]
        single = [word for word in words if len(word) == 1]

        def piece(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        words = single if len(single) >= MIN_WORDS else [word for word in words if len(word) == max(map(len, words))]
        words, marks = words[:count], (piece("@"), piece("?"), piece("\n"))
        return cls((ends[0],), (ends[1],), *marks, tuple(words[0::2]), tuple(words[1::2]))

    @property
    def fact_len(self) -> int:
        """Tokens of one fact with its marker."""
        return len(self.fact) + len(self.keys[0]) + len(self.values[0])

    @property
    def question_len(self) -> int:
        return self.fact_len - len(self.fact) + len(self.question)


def draw_document(
    vocabulary: Vocabulary, rng: np.random.Generator, length: int, filler: Documents | None, config: RecallConfig, row: int = 0
) -> RecallDocument:
    """One recall document of at most `length` tokens (at least 16), for recall row `row` of a stage: facts, with or without
    filler between, then questions; or an echo; or a list of words twice."""
    if (echoes := config.echoes_at(row)) and rng.random() < echoes:
        return draw_echo(vocabulary, rng, length)
    if rng.random() < config.repeats:
        return draw_repeat(vocabulary, rng, length)
    apart = filler is not None and rng.random() < config.filler
    room = length - 2  # bos and eos
    if apart:
        n_facts = int(rng.integers(1, max(min(config.max_facts, room // (3 * vocabulary.fact_len)), 1) + 1))
    else:
        n_facts = int(rng.integers(1, max(room // (vocabulary.fact_len + vocabulary.question_len), 1) + 1))
    keys = rng.permutation(len(vocabulary.keys))[:n_facts]
    values = rng.integers(0, len(vocabulary.values), len(keys))
    n_questions = (room - vocabulary.fact_len * len(keys)) // vocabulary.question_len
    asked = rng.integers(0, len(keys), min(n_questions, config.questions) if apart else n_questions)
    spare = max(room - vocabulary.fact_len * len(keys) - vocabulary.question_len * len(asked), 0)
    gaps = np.diff([0, *np.sort(rng.integers(0, spare + 1, len(keys))), spare]) if apart else [0] * (len(keys) + 1)
    fillers = [draw_filler(rng, filler, int(gap)) for gap in gaps]
    return assemble(vocabulary, _pairs(keys, values), fillers, asked.tolist())


def draw_repeat(vocabulary: Vocabulary, rng: np.random.Generator, length: int) -> RecallDocument:
    """A line of different words, and the same line again; all of the second but its first word count as answers."""
    words = [*vocabulary.keys, *vocabulary.values]
    count = max((length - 2 - 2 * len(vocabulary.end)) // (2 * max(map(len, words))), 2)
    line = [token for i in rng.permutation(len(words))[:count] for token in words[i]] + list(vocabulary.end)
    tokens = np.array([*vocabulary.bos, *line, *line, *vocabulary.eos], dtype=np.int64)
    marks = np.zeros(len(tokens), dtype=bool)
    marks[len(line) + 2 : -1] = True
    return RecallDocument(tokens, marks)


def draw_echo(vocabulary: Vocabulary, rng: np.random.Generator, length: int) -> RecallDocument:
    """Pairs of random words, the first of each said again after it; that third word is the answer."""
    words = [*vocabulary.keys, *vocabulary.values]
    tokens, answers = list(vocabulary.bos), []
    for _ in range(max((length - 2) // (3 * max(map(len, words))), 1)):
        first, second = (words[i] for i in rng.integers(0, len(words), 2))
        tokens += [*first, *second]
        answers += range(len(tokens), len(tokens) + len(first))
        tokens += first
    return _marked([*tokens, *vocabulary.eos], answers)


def needle(
    vocabulary: Vocabulary, rng: np.random.Generator, length: int, depth: float, filler: Documents, others: int = 3
) -> RecallDocument:
    """A document of exactly `length` tokens with one question, at its end; the fact stands at `depth` of it (0 first, 1 last).

    `others` facts with other keys stand at random places, so that finding any fact is not enough.
    Raises UserError where the length leaves no room, or where there are too few words.
    """
    words = min(len(vocabulary.keys), len(vocabulary.values))
    if others >= words:
        raise UserError(
            f"needle among {others} other facts: needs {others + 1} keys and as many values, found {words}; ask for fewer "
            "others, more recall.words, or a tokenizer that holds more of the words"
        )
    room = length - 2 - vocabulary.question_len - (others + 1) * vocabulary.fact_len
    if room < 0:
        raise UserError(f"needle of length {length}: at least {length - room} with {others} other facts")
    places = [round(depth * room), *rng.integers(0, room + 1, others).tolist()]
    order = np.argsort(places, kind="stable")
    keys = rng.permutation(len(vocabulary.keys))[: len(places)]
    values = rng.permutation(len(vocabulary.values))[: len(places)]
    gaps = np.diff([0, *np.array(places)[order], room])
    fillers = [draw_filler(rng, filler, int(gap)) for gap in gaps]
    return assemble(vocabulary, _pairs(keys[order], values[order]), fillers, np.flatnonzero(order == 0).tolist())


def assemble(
    vocabulary: Vocabulary, facts: Sequence[tuple[int, int]], fillers: Sequence[list[int]], asked: Sequence[int]
) -> RecallDocument:
    """fillers[i] stands before fact i, the last one before the questions; `asked` numbers the facts in question order."""
    tokens, answers = list(vocabulary.bos), []
    for (key, value), filler in zip(facts, fillers[:-1], strict=True):
        tokens += [*filler, *vocabulary.fact, *vocabulary.values[value], *vocabulary.keys[key]]
    tokens += fillers[-1]
    for key, value in (facts[i] for i in asked):
        tokens += [*vocabulary.question, *vocabulary.keys[key]]
        answers += range(len(tokens), len(tokens) + len(vocabulary.values[value]))
        tokens += vocabulary.values[value]
    return _marked([*tokens, *vocabulary.eos], answers)


def draw_filler(rng: np.random.Generator, filler: Documents | None, count: int) -> list[int]:
    """`count` tokens of text from a random place, without the documents' own first and last tokens."""
    tokens: list[int] = []
    while filler is not None and len(tokens) < count:
        document = filler[int(rng.integers(len(filler)))][1:-1]
        if len(document):
            start = int(rng.integers(len(document)))
            tokens.extend(document[start : start + count - len(tokens)].tolist())
    return tokens


def sample_text(rng: np.random.Generator, count: int) -> list[str]:
    """Recall documents as text: what a tokenizer is trained on so that the words become single tokens."""
    texts = []
    for _ in range(count):
        words = [WORDS[i] for i in rng.permutation(len(WORDS))[:24]]
        facts = "".join(f"@ {value} {key}" for key, value in zip(words[:12], words[12:], strict=True))
        texts.append(facts + "".join(f"? {words[i]} {words[12 + i]}" for i in rng.permutation(12)))
    return texts


def _marked(tokens: list[int], answers: list[int]) -> RecallDocument:
    marks = np.zeros(len(tokens), dtype=bool)
    marks[answers] = True
    return RecallDocument(np.array(tokens, dtype=np.int64), marks)


def _pairs(keys: np.ndarray, values: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(keys.tolist(), values.tolist(), strict=True))
