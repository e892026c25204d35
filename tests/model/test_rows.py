"""Packing keeps what is there, in order, and knows where documents begin."""

from __future__ import annotations

import pytest
import torch

from rorqual.errors import UserError
from rorqual.model.rows import pack_rows

TOKENS = torch.arange(12).view(2, 6)
DOCUMENTS = torch.tensor([[3, 3, -1, 3, 5, 5], [-1, 5, 3, 3, -1, -1]])


def test_padding_is_left_out_and_documents_restart() -> None:
    rows = pack_rows(TOKENS, None, DOCUMENTS)
    assert rows.tokens.tolist() == [0, 1, 3, 4, 5, 7, 8, 9]
    assert rows.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert rows.starts.tolist() == [0, 0, 0, 3, 3, 5, 6, 6]
    assert (rows.counts, rows.lengths) == ((5, 3), (3, 2, 1, 2))
    assert rows.next_tokens().tolist() == [1, 3, -1, 5, -1, -1, 9, -1]


def test_one_id_in_two_sequences_is_two_documents() -> None:
    rows = pack_rows(TOKENS, None, torch.zeros(2, 6, dtype=torch.long))
    assert rows.lengths == (6, 6) and rows.places is None


def test_unpacking_undoes_packing() -> None:
    rows = pack_rows(TOKENS, None, DOCUMENTS)
    values = torch.randn(2, 6, 3)
    back = rows.unpack(rows.pack(values), fill=-7)
    kept = DOCUMENTS >= 0
    assert torch.equal(back[kept], values[kept]) and back[~kept].eq(-7).all()
    whole = pack_rows(TOKENS)
    assert torch.equal(whole.unpack(whole.pack(values)), values)


def test_given_positions_and_cached_lengths_are_used() -> None:
    assert pack_rows(TOKENS, torch.arange(6) + 40, DOCUMENTS).positions.tolist() == [40, 41, 43, 44, 45, 41, 42, 43]
    assert pack_rows(TOKENS[:, :2], cached_lens=(7, 0)).positions.tolist() == [7, 8, 0, 1]


def test_a_batch_without_any_row_is_empty() -> None:
    rows = pack_rows(TOKENS, None, torch.full((2, 6), -1))
    assert len(rows.tokens) == 0 and rows.lengths == () and rows.counts == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((TOKENS[0],), r"tokens: expected \[B, T\], found \[6\]"),
        ((TOKENS, None, DOCUMENTS[:1]), r"documents: expected \[2, 6\] as tokens, found \[1, 6\]"),
        ((TOKENS, torch.arange(5)), r"positions: expected \[2, 6\] or \[6\], found \[5\]"),
    ],
)
def test_wrong_shapes_are_named(arguments: tuple, text: str) -> None:
    with pytest.raises(UserError, match=text):
        pack_rows(*arguments)
