"""MinHash estimates Jaccard similarity; near copies go, the first stays; the held-out split depends on the text alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rorqual.data.corpora import Document, Tally
from rorqual.data.duplicates import BANDS, ROWS, Index, is_held_out, minhash, without_duplicates


def words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=6)) for _ in range(count)]


def jaccard(a: list[str], b: list[str]) -> float:
    shingles = [{tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@pytest.mark.parametrize("changed", [0, 20, 100, 400])
def test_equal_entries_estimate_jaccard_similarity(changed):
    a = words(2000, 1)
    b = a[: len(a) - changed] + words(changed, 2)
    truth = jaccard(a, b)
    estimate = np.mean(minhash(" ".join(a)) == minhash(" ".join(b)))
    assert abs(estimate - truth) <= 3.5 * (truth * (1 - truth) / (BANDS * ROWS)) ** 0.5 + 1e-9


def test_exact_and_near_copies_are_dropped_and_counted_and_the_first_stays():
    original, other = words(500, 1), words(500, 2)
    near = [*original]
    near[250] = "changed"
    half = original[:250] + words(250, 3)
    documents = [Document(" ".join(x), str(i)) for i, x in enumerate([original, other, near, original, half])]
    tally = Tally()
    kept = [document.origin for document in without_duplicates(documents, tally, Index(0.8))]
    assert kept == ["0", "1", "4"]
    assert tally.counts == {"near-duplicates": 1, "duplicates": 1}


def test_one_index_removes_copies_across_corpora():
    index = Index()
    text = " ".join(words(100, 1))
    assert [d.text for d in without_duplicates([Document(text, "a")], Tally(), index)] == [text]
    assert not list(without_duplicates([Document(text, "b")], Tally(), index))


def test_texts_shorter_than_a_shingle_are_told_apart():
    index = Index()
    assert index.add("one") is None and index.add("two words") is None and index.add("one") == "duplicates"


def test_held_out_is_a_function_of_the_text_with_the_asked_share():
    texts = [f"text number {i}" for i in range(20000)]
    held = [is_held_out(text, 0.1) for text in texts]
    assert held == [is_held_out(text, 0.1) for text in texts]
    assert abs(sum(held) / len(held) - 0.1) < 0.01
    assert all(is_held_out(text, 0.2) for text, out in zip(texts, held, strict=True) if out)
