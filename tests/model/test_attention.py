"""The two forms are one function, and sparse attention is dense attention over what the indexer selects."""

from __future__ import annotations

import itertools

import pytest
import torch

from rorqual.kernels.rowwise import hadamard_transform
from rorqual.model import AttentionMode, Cache, Trace, Transformer, YarnConfig
from tests.model.small_models import random_tokens, small_model

YARN = YarnConfig(factor=4.0, original_max_positions=16)


def logits(model: Transformer, T: int = 45, trace: Trace | None = None, **mode: object) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(2, T), trace=trace, mode=AttentionMode(**mode))


def twin(model: Transformer, **changes: object) -> Transformer:
    """The same weights under a changed config."""
    changed = small_model(**changes)
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "YaRN"])
def test_the_expanded_form_equals_the_absorbed_form(sparse: bool, yarn: YarnConfig | None) -> None:
    model = small_model(yarn=yarn)
    expanded = logits(model, sparse=sparse, form="expanded")
    torch.testing.assert_close(expanded, logits(model, sparse=sparse, form="absorbed"), rtol=0, atol=2e-5)


def test_auto_expands_short_prefill_and_keeps_the_latents_elsewhere() -> None:
    """With latent 20, nope 10 and v 14 an expansion pays from 30 queries on; the mask from there to 3 x 9 keys never does."""
    model = small_model(n_mtp_layers=0)
    forms = {form: logits(model, 45, form=form) for form in ("absorbed", "expanded", "auto")}
    wide = logits(model, 45, form="auto", masked_factor=5)
    dense = {form: logits(model, 45, sparse=False, form=form) for form in ("absorbed", "expanded", "auto")}
    assert not torch.equal(forms["absorbed"], forms["expanded"])
    assert torch.equal(forms["auto"], forms["absorbed"]) and torch.equal(wide, forms["expanded"])
    assert torch.equal(dense["auto"], dense["expanded"]) and not torch.equal(dense["auto"], dense["absorbed"])
    with torch.no_grad():
        assert torch.equal(model(random_tokens(1, 29), mode=AttentionMode(form="auto")), model(random_tokens(1, 29)))


def test_sparse_attention_differs_from_dense_and_equals_it_once_top_k_reaches_the_length() -> None:
    model = small_model()
    dense = logits(model, sparse=False)
    assert (logits(model) - dense)[:, 9:].abs().max() > 0.1
    assert torch.equal(logits(model)[:, 0], dense[:, 0])
    torch.testing.assert_close(logits(twin(model, index_topk=45)), dense, rtol=0, atol=1e-6)


def test_a_model_without_indexers_is_the_dense_mode_of_one_with_them() -> None:
    model = small_model()
    without = small_model(indexers="none")
    without.load_state_dict({name: w for name, w in model.state_dict().items() if ".indexer." not in name})
    assert torch.equal(logits(without), logits(model, sparse=False))


def test_the_layout_of_the_indexers_rope_matters_once_top_k_is_below_the_length() -> None:
    """The published demo rotated index queries and keys as interleaved pairs; trained weights expect half-split ones."""
    model = small_model()
    wrong = twin(model, index_rope_interleaved=True)
    right, demo = Trace(selected_indices=True), Trace(selected_indices=True)
    a, b = logits(model, trace=right), logits(wrong, trace=demo)
    assert torch.equal(a[:, :9], b[:, :9]), "with at most top-k keys both select all of them"
    assert (right.selected[0] != demo.selected[0]).any()
    assert (a - b).abs().max() > 1e-2


def test_the_hadamard_rotation_changes_nothing() -> None:
    model = small_model()
    torch.testing.assert_close(logits(twin(model, index_hadamard=True)), logits(model), rtol=0, atol=2e-5)


def test_the_hadamard_transform_is_the_orthonormal_matrix_of_parities() -> None:
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]) / 32**0.5
    x = torch.randn(7, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_transform(x), x @ matrix)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)


def test_documents_are_computed_as_if_alone_wherever_they_stand() -> None:
    model = small_model()
    lengths = (1, 23, 8, 13)
    tokens = random_tokens(1, sum(lengths))
    documents = torch.repeat_interleave(torch.tensor([4, 0, 4, 2]), torch.tensor(lengths))[None]
    with torch.no_grad():
        together = model(tokens, documents=documents)
        edges = [0, *itertools.accumulate(lengths)]
        for a, b in itertools.pairwise(edges):
            assert torch.equal(together[:, a:b], model(tokens[:, a:b])), f"document of {b - a} tokens"


def test_padding_anywhere_changes_no_bit_of_the_rest_and_gives_zeros() -> None:
    model = small_model()
    tokens = random_tokens(2, 30)
    documents = torch.zeros(2, 30, dtype=torch.long)
    documents[0, [0, 1, 12, 29]] = -1
    documents[1] = -1
    kept = documents[0] >= 0
    with torch.no_grad():
        out = model(tokens, documents=documents)
        assert torch.equal(out[0, kept], model(tokens[:1, kept])[0])
    assert not out[0, ~kept].any() and not out[1].any()


def test_shared_layers_use_the_selection_of_the_last_full_layer() -> None:
    shared = small_model(indexers=("full", "shared", "full"))
    trace = Trace(selected_indices=True)
    before = logits(shared, trace=trace)
    assert sorted(trace.selected) == [0, 2]
    with torch.no_grad():
        shared.layers[0].attn.indexer.weights_proj.weight.neg_()
    assert (logits(shared) - before).abs().max() > 1e-2


def test_a_model_without_a_query_latent_has_indexers_too() -> None:
    model = small_model(q_lora_rank=None)
    assert model.layers[0].attn.indexer.wq_b.weight.shape == (80, 40)
    assert (logits(model) - logits(model, sparse=False)).abs().max() > 1e-2


@pytest.mark.parametrize("indexers", ["full", "none"])
def test_a_batch_without_tokens_gives_zeros_and_an_empty_cache_stays_so(indexers: str) -> None:
    model = small_model(indexers=indexers)
    padding = torch.full((2, 5), -1)
    cache = Cache(model.config, 2)
    with torch.no_grad():
        for given in (None, cache):
            assert not model(random_tokens(2, 5), documents=padding, cache=given).any()
        assert model(random_tokens(2, 0)).shape == (2, 0, 97)
    assert cache.lengths == [0, 0]
