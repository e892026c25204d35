"""What the page is given of a model is what the model does."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rorqual.data.store import TokenStore, write_store
from rorqual.model.cache import Fresh
from rorqual.model.call import AttentionMode
from rorqual.model.transformer import Transformer
from rorqual.model.weights import save_model
from rorqual.runlog import RunLog, read_events
from rorqual.train.exhibits import ExhibitConfig, cost, paper_cost, prefill_times, record_exhibits
from rorqual.train.export import open_model
from tests.byte_tokenizer import byte_tokenizer
from tests.model.small_models import small_model

TOPK, LENGTH = 16, 112
CONFIG = ExhibitConfig(rows=2, batches=2, needles=1, tokens=96, shown=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages have checkpoints, with its exhibits."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    tokenizer = byte_tokenizer().backend
    documents = [np.array(tokenizer.encode("what a whale keeps " * n, add_special_tokens=False).ids) for n in (20, 30)]
    write_store(directory / "data", tokenizer, {"text": {"train": documents, "held_out": documents}}, {})
    for number, name in enumerate(("warm-indexer", "train-sparse", ".")):
        stage = directory / name
        stage.mkdir(exist_ok=True)
        (stage / "config.toml").write_text(f"[batch]\nlength = {LENGTH}\n[batch.recall]\nwords = 'none'\n")
        model = small_model(number, vocab_size=tokenizer.get_vocab_size(), index_topk=TOPK, max_positions=128)
        save_model(model, stage / "model", "float32")
    log = RunLog(directory, quiet=True)
    record_exhibits(directory, directory / "model", log, CONFIG)
    log.close()
    return directory


def exhibit(run: Path, name: str) -> dict:
    return json.loads((run / "exhibits" / f"{name}.json").read_text())


def opened(run: Path, name: str = ".") -> Transformer:
    from rorqual.model.weights import load_model

    return load_model(run / name / "model", "float32").eval()


def test_nothing_was_left_out(run: Path) -> None:
    assert read_events(run, "exhibit left out") == []
    assert sorted(path.name for path in (run / "exhibits").iterdir()) == [
        "cost.json", "model.json", "quality.json", "selection.json",
    ]  # fmt: skip


@torch.no_grad()
def test_a_row_depends_on_the_entries_shown_as_selected_and_on_no_other(run: Path) -> None:
    """Entries of tokens outside the recorded selection may be anything; one inside may not."""
    found, model = exhibit(run, "selection"), opened(run)
    text = next(each for each in found["texts"] if each["title"] == "Held-out text")
    tokens = torch.from_numpy(np.asarray(TokenStore(run / "data").documents("text", "held_out")[1][:96]).astype(np.int64))
    assert text["length"] == 96 and text["first"] == 56 and len(text["pieces"]) == 40
    packed = np.frombuffer(base64.b64decode(text["layers"]["0"]["selected"]), np.uint8).reshape(40, 12)
    bits = np.unpackbits(packed, axis=1)[:, :96].astype(bool)
    assert (bits.sum(1) == TOPK).all() and not np.triu(bits, 57).any(), "top-k of each row, none in the future"
    for row in (0, 17, 39):
        at = text["first"] + row
        outside = [i for i in range(at) if not bits[row, i]]
        inside = [i for i in range(at) if bits[row, i]]
        before = _first_layer(model, tokens, at)
        changed = tokens.clone()
        # Only its value is changed, not its index key: the selection stays, and the output with it.
        assert torch.equal(_first_layer(model, changed, at, silence=outside), before)
        assert not torch.equal(_first_layer(model, changed, at, silence=inside[:1]), before)


def _first_layer(model: Transformer, tokens: torch.Tensor, row: int, silence: list[int] | None = None) -> torch.Tensor:
    """The first layer's attention at a row, with the latents of some tokens made huge."""
    attention = model.layers[0].attn
    entries = Fresh.entries

    def disturbed(fresh: Fresh) -> torch.Tensor:
        made = entries(fresh).clone()
        if fresh.norm is attention.kv_norm:
            made[silence or []] += 100.0
        return made

    found = []
    hook = attention.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fresh, "entries", disturbed)
        model(tokens[None])
    hook.remove()
    return found[0][row]


@torch.no_grad()
def test_losses_by_position_are_of_the_sparse_stage_and_of_the_dense_model_before_it(run: Path) -> None:
    found = exhibit(run, "quality")
    assert found["length"] == LENGTH and set(found["loss"]) == {"sparse", "same weights, dense", "before, dense"}
    from rorqual.data.recall import RecallConfig
    from rorqual.train.setup import BatchConfig, mixture

    loader = mixture(TokenStore(run / "data"), BatchConfig(rows=2, length=LENGTH, recall=RecallConfig(share=0.0)), "held_out")
    for name, stage, sparse in (("sparse", "train-sparse", True), ("before, dense", "warm-indexer", False)):
        model, losses = opened(run, stage), []
        for batch in (loader.batch(0), loader.batch(1)):
            logits = model(batch.tokens, documents=batch.documents, mode=AttentionMode(sparse=sparse))
            targets = batch.targets()
            losses.append(F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none"))
        assert found["loss"][name]["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert set(found["retrieval"]["accuracy"]) == {*found["loss"], "random indexers"}
    for layer in found["selection"].values():
        assert 0 < layer["captured"] <= layer["oracle"] < 1


def test_exhibits_are_made_again_for_other_weights_only(run: Path) -> None:
    path = run / "exhibits" / "model.json"
    before = path.stat().st_mtime_ns
    log = RunLog(run, quiet=True)
    record_exhibits(run, run / "model", log, CONFIG)
    assert path.stat().st_mtime_ns == before
    record_exhibits(run, run / "train-sparse" / "model", log, CONFIG)
    log.close()
    assert path.stat().st_mtime_ns > before


def test_what_can_not_be_had_is_logged_with_its_reason_and_the_rest_is_made(tmp_path: Path, run: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("exhibits", "events.jsonl"))
    shutil.rmtree(other / "train-sparse" / "model")
    log = RunLog(other, quiet=True)
    record_exhibits(other, other / "model", log, CONFIG)
    log.close()
    (left,) = read_events(other, "exhibit left out")
    assert left["exhibit"] == "quality" and "train-sparse" in left["reason"]
    assert (other / "exhibits" / "selection.json").is_file()


def test_costs_are_the_papers_where_the_paper_has_them() -> None:
    found = paper_cost()
    assert found["top_k"] == 2048 and found["positions"][0] == 0 and found["positions"][-1] == 163_839
    per_key = 61 * 128 * 2 * (2 * 512 + 64)
    at = found["positions"].index(163_839)
    assert found["dense_flops"][at] == per_key * 163_840
    assert found["sparse_flops"][at] == per_key * 2048 + 61 * 163_840 * 2 * 64 * 129
    small = cost(small_model(0).config)
    assert len(small["positions"]) == len(small["sparse_flops"]) <= 41


def test_a_prefill_is_timed_chunk_by_chunk_in_both_modes(run: Path) -> None:
    model, store = open_model(run / "model").eval(), TokenStore(run / "data")
    chunk = model.config.max_positions // 2
    found = prefill_times(model, store, replace(CONFIG, timed_chunk=chunk))
    assert found["positions"] == [0, chunk] and set(found["seconds"]) == {"dense", "sparse"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
