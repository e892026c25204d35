"""The measures of quality against what they claim to measure."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rorqual.data.loader import positions_of
from rorqual.data.recall import Vocabulary
from rorqual.data.store import Documents
from rorqual.model.call import AttentionMode
from rorqual.model.transformer import Transformer
from rorqual.train.quality import DENSE, SPARSE, NeedleConfig, held_out, retrieval, selection, with_random_indexers
from tests.train.shapes import shape, some_batch

WORDS = Vocabulary((0,), (1,), (2,), (3,), (4,), tuple((i,) for i in range(5, 25)), tuple((i,) for i in range(25, 45)))
FILLER = Documents(50 + np.arange(40), np.array([0, 40]))


def test_held_out_loss_is_the_mean_over_targets_and_by_position():
    model, batch = Transformer(shape(), seed=0).eval(), some_batch(rows=2, length=24)
    found = held_out(model, [batch, batch], DENSE)
    logits = model(batch.tokens, documents=batch.documents, mode=DENSE)
    targets = batch.targets()
    where, positions = (targets >= 0).nonzero().tolist(), positions_of(batch.documents)
    losses = [(int(positions[b, t]), float(F.cross_entropy(logits[b, t], targets[b, t]).detach())) for b, t in where]
    assert found.loss == pytest.approx(sum(x for _, x in losses) / len(losses), rel=1e-5)
    first = [x for t, x in losses if t < found.edges[1]]
    assert found.by_position[0] == pytest.approx(sum(first) / len(first), rel=1e-5)


def test_a_selection_captures_at_most_what_the_true_top_k_would_and_all_of_it_above_the_length():
    batch = some_batch(rows=2, length=40)
    for layer in selection(Transformer(shape(), seed=0).eval(), [batch]).values():
        assert 0 < layer["captured"] <= layer["oracle"] < 1 and 0 <= layer["recall"] < 1
    assert all(x["captured"] == 0 for x in selection(Transformer(shape(index_topk=64), seed=0).eval(), [batch]).values()), (
        "no row sees more keys than are selected, so there is none to judge"
    )


class Finder(torch.nn.Module):
    """Answers a question by looking its key up among the last `reach` tokens: perfect retrieval within a window."""

    def __init__(self, reach: int):
        super().__init__()
        self.embed, self.reach = torch.nn.Embedding(100, 1), reach

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def states(self, tokens: torch.Tensor, mode: AttentionMode) -> SimpleNamespace:
        logits = torch.zeros(*tokens.shape, 100)
        for b, row in enumerate(tokens.tolist()):
            for t in range(2, len(row)):
                for s in range(max(2, t - self.reach), t):
                    if row[s] == row[t] and row[s - 2] == 2:
                        logits[b, t, row[s - 1]] = 1
        return SimpleNamespace(hidden=logits.flatten(0, 1))


def test_retrieval_is_one_for_a_perfect_finder_and_falls_with_depth_beyond_its_reach():
    config = NeedleConfig(lengths=(64,), depths=(0.0, 1.0), count=10)
    whole = retrieval(Finder(1000), WORDS, FILLER, config, DENSE)  # type: ignore[arg-type]
    near = retrieval(Finder(20), WORDS, FILLER, config, DENSE)  # type: ignore[arg-type]
    assert whole.accuracy == 1.0
    assert near.cells == {(64, 0.0): 0.0, (64, 1.0): 1.0}


def test_random_indexers_change_nothing_but_the_indexers():
    model = Transformer(shape(), seed=0)
    other = with_random_indexers(model, seed=5)
    for name, tensor in model.state_dict().items():
        drawn = ".indexer." in name and "k_norm" not in name
        assert torch.equal(tensor, other.state_dict()[name]) != drawn, name
    assert held_out(model.eval(), [some_batch()], SPARSE).loss != held_out(other, [some_batch()], SPARSE).loss
