"""Stages say what is wrong and what to do, and leave what was there."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from rorqual.chat.markers import SPECIAL_TOKENS
from rorqual.data.bpe import train_bpe
from rorqual.data.recall import sample_text
from rorqual.data.store import TokenStore
from rorqual.errors import UserError
from rorqual.parallel.world import ParallelConfig, start
from rorqual.runlog import RunLog, read_events
from rorqual.stages import extend, prepare, pretrain, run, train_sparse, warm_indexer
from rorqual.stages.recipe import Recipe, load_recipe
from rorqual.train.export import finished
from rorqual.train.loop import Place
from tests.train.shapes import shape

WORLD = start(ParallelConfig(), "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(sample_text(np.random.default_rng(0), 60)):
        (folder / f"{i}.txt").write_text(text)
    config = prepare.Config((prepare.CorpusConfig(f"files:{folder}"),), held_out_share=0.2, vocab_size=400)
    return prepare.main(config, folder / "data", RunLog(folder, quiet=True))


def place(store: TokenStore, directory) -> Place:
    return Place.open(directory, store, WORLD, quiet=True)


def config(**changes) -> pretrain.Config:
    smoke = load_recipe(
        "smoke", ["--pretrain.batch.length=32", "--pretrain.batch.recall.min-length=24", "--pretrain.pace.steps=1"]
    )
    assert smoke.pretrain is not None
    return smoke.pretrain


def test_empty_and_missing_corpora_are_errors_and_optional_ones_a_line_in_the_log(tmp_path):
    (tmp_path / "empty").mkdir()
    bad = prepare.CorpusConfig(f"files:{tmp_path}/empty")
    with pytest.raises(UserError, match="holds no readable text"):
        prepare.main(prepare.Config((bad,)), tmp_path / "data", RunLog(tmp_path, quiet=True))
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="leave no document"):
        prepare.main(prepare.Config((), (bad,)), tmp_path / "data", RunLog(tmp_path, quiet=True))
    (event,) = read_events(tmp_path, "corpus left out")
    assert event["corpus"] == bad.name


def test_a_tokenizer_without_the_special_tokens_is_refused_or_mended(store, tmp_path):
    train_bpe(sample_text(np.random.default_rng(0), 60), 400, SPECIAL_TOKENS[:3]).save(str(tmp_path / "tokenizer.json"))
    corpora = tuple(prepare.CorpusConfig(name) for name in store.names)
    refused = prepare.Config(corpora, held_out_share=0.2, tokenizer=tmp_path)
    with pytest.raises(UserError, match="lacks the special tokens"):
        prepare.main(refused, tmp_path / "data", RunLog(tmp_path, quiet=True))
    mended = prepare.Config(corpora, held_out_share=0.2, tokenizer=tmp_path, add_special_tokens=True)
    found = prepare.main(mended, tmp_path / "data", RunLog(tmp_path, quiet=True))
    assert found.tokenizer.get_vocab_size() == 405


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="its tokenizer has 400 ids, the model only 97"):
        pretrain.main(config(), shape(), place(store, tmp_path))


@pytest.mark.parametrize("stage", [extend, warm_indexer, train_sparse])
def test_a_stage_whose_checkpoint_is_not_there_says_which_one(store, tmp_path, stage):
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        stage.main(stage.Config(), tmp_path / "nowhere", place(store, tmp_path / "stage"))


def test_a_recipe_without_the_stage_that_makes_the_checkpoint_is_refused(store, tmp_path):
    recipe = load_recipe("smoke", ["--pretrain=none"])
    assert isinstance(recipe, Recipe) and recipe.pretrain is None
    (tmp_path / "data").symlink_to(store.directory)
    with pytest.raises(UserError, match=r"needs a checkpoint.*add a table \[pretrain\]"):
        run.main(recipe, tmp_path, WORLD, quiet=True)


def test_sparse_training_of_a_model_without_indexers_is_refused(store, tmp_path):
    dense = pretrain.main(config(), shape(vocab_size=400, indexers="none"), place(store, tmp_path / "dense"))
    with pytest.raises(UserError, match="has no indexer; warm one first"):
        train_sparse.main(train_sparse.Config(), dense, place(store, tmp_path / "sparse"))


def test_rows_longer_than_the_corpus_or_the_extended_context_are_refused(store, tmp_path):
    dense = pretrain.main(config(), shape(vocab_size=400), place(store, tmp_path / "dense"))
    longer = load_recipe("smoke", ["--extend.batch.length=129", "--extend.batch.recall.share=0"]).extend
    with pytest.raises(UserError, match="rows of 129 exceed the extended context 128"):
        extend.main(longer, dense, place(store, tmp_path / "extend"))
    huge = load_recipe("smoke", ["--extend.batch.length=1000000"]).extend
    with pytest.raises(UserError, match="no corpus has 1000000 tokens"):
        extend.main(huge, dense, place(store, tmp_path / "huge"))


def test_a_full_disk_at_the_end_of_a_stage_loses_no_step(store, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rorqual.train.export.save_model", full)
    here = place(store, tmp_path)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        pretrain.main(config(), shape(vocab_size=400), here)
    assert finished(here) is None
    monkeypatch.undo()
    pretrain.main(config(), shape(vocab_size=400), place(store, tmp_path))
    assert len(read_events(tmp_path, "metrics")) == 1, "the finished steps ran again"
