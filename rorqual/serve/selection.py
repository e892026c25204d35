"""Which tokens the indexer selected, for every token of a text and every layer: what the studio shows.

Computed by one forward over the text in the engine's own thread, between two of its steps, so that requests need keep nothing:
on a CPU the selection is the same bits as when the tokens were sampled; on a GPU near-ties may fall otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rorqual.chat import Tokenizer
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.model.trace import Trace
from rorqual.serve.backend import EngineBackend

MAX_TOKENS = 8192
"""Longer texts are refused: the forward holds up the engine's requests."""


@dataclass(frozen=True)
class Selection:
    """`rows[i]` int32 [N, K]: for layer `layers[i]`, the positions that each of N tokens selected, -1 where fewer."""

    texts: tuple[str, ...]
    layers: tuple[int, ...]
    rows: tuple[np.ndarray, ...]

    def of(self, token: int, layer: int) -> list[int]:
        """The positions that one token selected in one layer, ascending."""
        row = self.rows[self.layers.index(layer)][token]
        return row[row >= 0].tolist()

    def shares(self, token: int, layer: int | None) -> list[float]:
        """For each token up to `token`, the share of layers that selected it; of one layer, 1 or 0."""
        chosen = self.layers if layer is None else (layer,)
        shares = np.zeros(token + 1)
        for each in chosen:
            shares[self.of(token, each)] += 1 / len(chosen)
        return shares.round(4).tolist()


async def selection_of(backend: EngineBackend, tokens: Sequence[int]) -> Selection:
    """The selections within a text of ids. Raises UserError for a text too long, and for a model without indexers."""
    config = backend.service.engine.model.config
    layers = tuple(i for i, kind in enumerate(config.layer_indexers) if kind == "full")
    if not layers:
        raise UserError("this model attends to every token: it has no indexer that selects")
    if len(tokens) > MAX_TOKENS:
        raise UserError(f"{len(tokens)} tokens are too many to look into here; at most {MAX_TOKENS}")
    selected = await asyncio.wrap_future(backend.service.command(lambda engine: _selected(engine, tokens)))
    return Selection(tuple(text_of(backend.tokenizer, token) for token in tokens), layers, tuple(selected[i] for i in layers))


@torch.inference_mode()
def _selected(engine: Engine, tokens: Sequence[int]) -> dict[int, np.ndarray]:
    trace = Trace(selected_indices=True)
    device = engine.model.embed.weight.device
    engine.model.states(torch.tensor([list(tokens)], device=device), trace=trace, mode=engine.attention)
    return {layer: rows.cpu().numpy() for layer, rows in trace.selected.items()}


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token for the eye: special ones by name, bytes that are no text as the replacement character."""
    special = tokenizer.special_tokens.get(token)
    return special if special else tokenizer.token_bytes(token).decode("utf-8", "replace")
