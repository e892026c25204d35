"""The global batch is a pure function of seed and step; rows keep document bounds; the mixture keeps its shares."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.chat.markers import SPECIAL_TOKENS
from rorqual.data.bpe import train_bpe
from rorqual.data.loader import Batch, Loader, RecallSource, Row, TextSource, nth_of_mixture, positions_of
from rorqual.data.recall import RecallConfig, Vocabulary, draw_document, needle, sample_text
from rorqual.data.store import Documents, TokenStore, write_store
from rorqual.errors import UserError
from rorqual.parallel.world import World
from rorqual.train.setup import BatchConfig, Feed


def some_documents(lengths: list[int]) -> Documents:
    """Document i holds the tokens 1000 (i + 1), 1000 (i + 1) + 1, ..."""
    tokens = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])
    return Documents(tokens, np.cumsum([0, *lengths]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(sample_text(np.random.default_rng(0), 500), 800, SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary.of(tokenizer, (0, 1))


def test_an_epoch_holds_every_token_once_but_for_the_last_incomplete_row():
    documents = some_documents([5, 17, 1, 9, 30, 2])
    source = TextSource(documents, 8, seed=3)
    rows = [source.row(n) for n in range(source.rows_per_epoch)]
    seen = Counter(int(t) for row in rows for t in row.tokens)
    assert source.rows_per_epoch == 64 // 8 and max(seen.values()) == 1 and len(seen) == 64
    again = [source.row(n) for n in range(source.rows_per_epoch, 2 * source.rows_per_epoch)]
    assert any((a.tokens != b.tokens).any() for a, b in zip(rows, again, strict=True)), "epochs have one order"


def test_documents_of_a_row_are_numbered_and_never_run_together():
    source = TextSource(some_documents([5, 17, 1, 9, 30, 2]), 8, seed=3)
    for n in range(16):
        row = source.row(n)
        same_text = row.tokens[1:] - row.tokens[:-1] == 1
        assert ((row.documents[1:] == row.documents[:-1]) == same_text).all()


def test_a_document_longer_than_the_row_goes_on_in_the_next_one():
    source = TextSource(some_documents([20]), 8, seed=0)
    assert source.row(0).tokens.tolist() == list(range(1000, 1008)) and source.row(1).tokens.tolist() == list(range(1008, 1016))


def test_a_corpus_that_fills_no_row_is_refused():
    with pytest.raises(UserError, match="fills no row of 8"):
        TextSource(some_documents([7]), 8, seed=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 400))
def test_the_mixture_numbers_each_sources_rows_without_gap_and_keeps_its_shares(weights, count):
    drawn = [nth_of_mixture([float(w) for w in weights], n) for n in range(count)]
    for source, weight in enumerate(weights):
        places = [place for s, place in drawn if s == source]
        assert places == list(range(len(places)))
        assert abs(len(places) - count * Fraction(weight, sum(weights))) < len(weights)


class Numbered:
    """Row n of a source is the number n, so that a batch shows which rows it holds."""

    def __init__(self, offset: int):
        self.offset = offset

    def row(self, n: int) -> Row:
        return Row(np.full(4, self.offset + n), np.zeros(4, np.int64), np.ones(4, bool))


def test_ranks_slice_the_same_global_batch_and_any_step_can_be_had_alone():
    def fresh() -> Loader:
        return Loader({"a": (Numbered(0), 3.0), "b": (Numbered(1000), 1.0)}, batch=6)

    whole = [fresh().batch(step).tokens[:, 0] for step in range(5)]
    assert torch.equal(torch.cat(whole[:5]), torch.tensor([fresh().row(n).tokens[0] for n in range(30)]))
    for ranks in (2, 3, 6):
        parts = [fresh().batch(4, rank, ranks).tokens[:, 0] for rank in range(ranks)]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole[4])
    with pytest.raises(UserError, match="does not divide over 4 ranks"):
        fresh().batch(0, 0, 4)


def test_targets_stay_within_documents_and_trained_tokens():
    batch = Batch(
        torch.tensor([[10, 11, 12, 20, 21, 0]]),
        torch.tensor([[0, 0, 0, 1, 1, -1]]),
        torch.tensor([[True, True, False, True, True, True]]),
    )
    assert batch.targets().tolist() == [[11, -1, -1, 21, -1, -1]]
    assert batch.targets(2).tolist() == [[-1, -1, -1, -1, -1, -1]]
    assert positions_of(batch.documents).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_recall_answers_are_the_facts_values(vocabulary):
    rng = np.random.default_rng(0)
    filler = some_documents([50, 60])
    for trial in range(50):
        document = draw_document(vocabulary, rng, 96, filler, RecallConfig(repeats=0, filler=0.5))
        assert 16 <= len(document.tokens) <= 96
        facts = {}
        tokens = document.tokens.tolist()
        for i, token in enumerate(tokens[:-3]):
            if (token,) == vocabulary.fact:
                facts[tokens[i + 2]] = tokens[i + 1]
        answers = np.flatnonzero(document.answers)
        assert len(answers) and all(facts[tokens[a - 1]] == tokens[a] for a in answers), trial


def test_a_repeat_is_a_line_of_different_words_twice(vocabulary):
    for length in (16, 37, 64):
        document = draw_document(vocabulary, np.random.default_rng(length), length, None, RecallConfig(repeats=1))
        line = document.tokens[1:-1]
        half = len(line) // 2
        assert len(document.tokens) <= length and (line[:half] == line[half:]).all() and len(set(line[:half])) == half
        assert np.flatnonzero(document.answers).tolist() == list(range(half + 2, len(document.tokens) - 1))


def test_an_echo_says_the_first_word_of_each_pair_again_and_that_is_its_answer(vocabulary):
    words = {word[0] for word in (*vocabulary.keys, *vocabulary.values)}
    for length in (16, 37, 64):
        document = draw_document(vocabulary, np.random.default_rng(length), length, None, RecallConfig(echoes=1))
        tokens = document.tokens[1:-1]
        assert len(document.tokens) <= length and set(tokens.tolist()) <= words and len(tokens) % 3 == 0
        assert (tokens[2::3] == tokens[0::3]).all() and (tokens[1::3] != tokens[0::3]).any()
        assert np.flatnonzero(document.answers).tolist() == list(range(3, len(document.tokens) - 1, 3))


def test_early_rows_have_their_own_share_of_echoes(vocabulary):
    config = RecallConfig(min_length=64, repeats=0, filler=0, echoes=0.25, early_echoes=1.0, early_rows=10)
    source = RecallSource(vocabulary, None, 64, 7, config)
    echoed = [vocabulary.fact[0] not in source.row(n).tokens for n in range(410)]
    assert all(echoed[:10]) and abs(sum(echoed[10:]) / 400 - 0.25) < 0.1  # 4.6 standard deviations


def test_words_of_recall_documents_become_single_tokens(vocabulary):
    assert len(vocabulary.keys) >= 70 and {len(w) for w in (*vocabulary.keys, *vocabulary.values)} == {1}
    assert not set(vocabulary.keys) & set(vocabulary.values)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_has_the_asked_length_and_depth_and_one_answer(vocabulary, depth):
    filler = some_documents([500])
    document = needle(vocabulary, np.random.default_rng(5), 200, depth, filler)
    tokens = document.tokens.tolist()
    (answer,) = np.flatnonzero(document.answers)
    assert len(tokens) == 200 and answer == 200 - 2
    fact = next(i for i in range(answer - 3) if (tokens[i], tokens[i + 2]) == (vocabulary.fact[0], tokens[answer - 1]))
    assert tokens[fact + 1] == tokens[answer] and abs(fact / 200 - depth) < 0.13
    with pytest.raises(UserError, match="at least"):
        needle(vocabulary, np.random.default_rng(5), 16, depth, filler)


def test_a_needle_among_more_facts_than_there_are_words_is_refused(tokenizer):
    few = Vocabulary.of(tokenizer, (0, 1), count=7)  # 4 keys, 3 values
    assert len(needle(few, np.random.default_rng(5), 64, 0.5, some_documents([500]), others=2).tokens) == 64
    with pytest.raises(UserError, match="among 3 other facts: needs 4 keys and as many values, found 3; ask for fewer"):
        needle(few, np.random.default_rng(5), 64, 0.5, some_documents([500]))


def test_recall_rows_are_whole_documents_then_padding_and_pure_in_their_number(vocabulary):
    source = RecallSource(vocabulary, some_documents([500]), 128, 7, RecallConfig(min_length=24))
    for n in range(20):
        row, again = source.row(n), source.row(n)
        assert all((getattr(row, name) == getattr(again, name)).all() for name in ("tokens", "documents", "trained"))
        for document in range(row.documents.max() + 1):
            tokens = row.tokens[row.documents == document]
            assert (tokens[0],) == vocabulary.bos and (tokens[-1],) == vocabulary.eos
        padding = row.documents == -1
        assert not row.trained[padding].any() and (np.diff(padding.astype(int)) >= 0).all() and padding.sum() < 24 + 24


def test_a_store_holds_what_was_written_and_appears_whole(tokenizer, tmp_path):
    documents = [np.array([0, 5, 1], np.uint32), np.array([0, 70000, 2, 1], np.uint32)]
    store = write_store(tmp_path / "s", tokenizer, {"files:x": {"train": documents, "held_out": documents[:1]}}, {"note": 1})
    found = TokenStore(tmp_path / "s").documents("files:x", "train")
    assert [found[i].tolist() for i in range(2)] == [d.tolist() for d in documents]
    assert store.facts["corpora"]["files:x"]["held_out"] == {"documents": 1, "tokens": 3} and store.facts["note"] == 1
    with pytest.raises(UserError, match="no corpus 'python'"):
        store.documents("python", "train")
    with pytest.raises(UserError, match="no token store"):
        TokenStore(tmp_path)
    (tmp_path / "s" / next(p.name for p in (tmp_path / "s").glob("*.train.tokens.npy"))).write_bytes(b"x")
    with pytest.raises(UserError, match="make the store again"):
        store.documents("files:x", "train")


def test_batches_drawn_ahead_by_other_processes_are_those_that_the_step_would_draw():
    loader = Loader({"text": (TextSource(some_documents([7] * 60), 16, 0), 1.0)}, 4)
    world = World(0, 1, torch.device("cpu"))
    ahead, own = (Feed(loader, BatchConfig(rows=4, length=16, micro_rows=2, workers=n), world) for n in (2, 0))
    for step in (3, 4, 5, 9, 10):
        for a, b in zip(ahead(step), own(step), strict=True):
            assert a.rows.lengths == b.rows.lengths
            for name in ("targets", "mtp_targets", "following", "sequences"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert torch.equal(a.rows.tokens, b.rows.tokens) and torch.equal(a.rows.starts, b.rows.starts)
