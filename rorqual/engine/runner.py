"""Computes one step: the work of many requests as packed rows through the model, and the MTP layer's guesses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.cache import PagedCache, Span
from rorqual.engine.records import RecordStore
from rorqual.engine.scheduler import Work
from rorqual.model.call import AttentionMode
from rorqual.model.rows import Rows
from rorqual.model.transformer import States, Transformer


@dataclass(frozen=True)
class Step:
    """What one forward gave. `ends[i]` is the row of work i's last known token; a draft is the row after it."""

    states: States
    ends: list[int]


class Runner:
    """Holds the model and the tensors behind the blocks; decides nothing."""

    def __init__(self, model: Transformer, cache: PagedCache, records: RecordStore, mode: AttentionMode):
        self.model, self.cache, self.records, self.mode = model, cache, records, mode

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Step:
        """Compute the activations of all rows, keep what the records ask for."""
        rows = self._rows(work)
        slots = self.cache.plan([Span(item.request.blocks, item.start, item.count) for item in work])
        trace = self.records.trace()
        states = self.model.run(rows, self.cache, trace=trace, mode=self.mode)
        self.records.write(slots, trace)
        ends, at = [], 0
        for item in work:
            at += item.count
            ends.append(at - 1 - item.has_draft)
        return Step(states, ends)

    @torch.inference_mode()
    def logits(self, step: Step, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of chosen rows of a step."""
        return self.model.logits(step.states.hidden[self._ints(rows)])

    @torch.inference_mode()
    def guesses(self, step: Step, next_tokens: list[int], rows: list[int]) -> list[int]:
        """The likeliest token after the next, as the MTP layer sees it from chosen rows of a step.

        next_tokens: the token after each row of the step (any id after a row whose token was rejected: its cache entry is
        written again when the right token comes).
        """
        hidden = self.model.mtp_hidden(step.states, self._ints(next_tokens))
        return self.model.logits(hidden[self._ints(rows)]).argmax(-1).tolist() if rows else []

    def _rows(self, work: list[Work]) -> Rows:
        tokens, positions, starts = [], [], []
        for item in work:
            known = item.request.tokens[item.start : item.start + item.count]
            draft = [item.request.draft] if item.has_draft else []
            starts += [len(tokens)] * item.count
            positions += range(item.start, item.start + item.count)
            tokens += [*known, *draft]
        counts = tuple(item.count for item in work)
        packed = map(self._ints, (tokens, positions, starts))
        return Rows(*packed, shape=(1, len(tokens)), counts=counts, lengths=counts)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)
