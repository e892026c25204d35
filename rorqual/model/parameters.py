"""How many parameters a model has, in total and for one token, by component; counted from the shapes, nothing is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rorqual.model.config import ModelConfig
from rorqual.model.names import Entry, entries, mtp_prefix


@dataclass(frozen=True)
class Count:
    """total parameters of a component, and those that work on one token (of routed experts: the chosen ones)."""

    total: int = 0
    activated: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.activated + other.activated)


@dataclass(frozen=True)
class Parameters:
    """main and mtp: component -> Count. Router correction biases count as parameters, copies in the MTP layer do not."""

    main: dict[str, Count]
    mtp: dict[str, Count]
    copies: int
    """Parameters that a checkpoint stores a second time, in the MTP layer: the embedding and the head."""

    @property
    def indexers(self) -> int:
        return self.main.get("indexers", Count()).total

    @property
    def without_indexers(self) -> int:
        return _total(self.main) - self.indexers

    @property
    def mtp_indexer(self) -> int:
        return self.mtp.get("indexers", Count()).total

    @property
    def mtp_without_indexer(self) -> int:
        return _total(self.mtp) - self.mtp_indexer

    @property
    def checkpoint(self) -> int:
        """All that a released checkpoint stores: main model, indexers, MTP layer, copies."""
        return _total(self.main) + _total(self.mtp) + self.copies

    @property
    def activated(self) -> int:
        """Main model without indexers, embedding and head included. A token reads one row of the embedding; all of it counts."""
        return sum(count.activated for name, count in self.main.items() if name != "indexers")

    @property
    def activated_without_embedding(self) -> int:
        return self.activated - self.main["embedding"].total

    @property
    def activated_matrices(self) -> int:
        """Of one token's matrix products: no embedding, norms, biases or indexers. A tied head is the embedding's matrix."""
        left_out = ("embedding", "norms", "indexers")
        matrices = sum(count.activated for name, count in self.main.items() if name not in left_out)
        return matrices + (0 if "head" in self.main else self.main["embedding"].total)


def count_parameters(config: ModelConfig) -> Parameters:
    """The parameters of the Transformer of `config`."""
    main: dict[str, Count] = {}
    mtp: dict[str, Count] = {}
    copies = 0
    for entry in entries(config):
        if entry.copy_of is not None:
            copies += math.prod(entry.shape)
            continue
        part = mtp if entry.name.startswith(mtp_prefix(config)) else main
        part[entry.component] = part.get(entry.component, Count()) + _count(entry, config)
    return Parameters(main, mtp, copies)


def _count(entry: Entry, config: ModelConfig) -> Count:
    total = math.prod(entry.shape)
    is_chosen = entry.expert is None or entry.expert < config.n_activated_experts  # which ones does not matter: all are alike
    return Count(total, total if is_chosen else 0)


def _total(part: dict[str, Count]) -> int:
    return sum(count.total for count in part.values())
