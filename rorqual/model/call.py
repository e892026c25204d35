"""What all layers of one forward share: the rows, their angles, where keys are kept, how to attend, what to replay and tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rorqual.errors import require
from rorqual.model.cache import LayerCaches, OwnRows
from rorqual.model.replay import Replay
from rorqual.model.rope import Rotation
from rorqual.model.rows import Rows
from rorqual.model.trace import Trace


@dataclass(frozen=True)
class AttentionMode:
    """How one forward attends; every choice computes the same function up to rounding, but for `sparse`."""

    sparse: bool = True
    """False: all layers attend to all keys, whatever their indexers say (the dense warm-up; a dense baseline)."""
    form: Literal["absorbed", "expanded", "auto"] = "absorbed"
    """absorbed: multi-query attention over the latents; a row's bits depend on its context alone, so that decoding equals
    prefill. expanded: multi-head attention, sparse by a mask. auto: expanded where that is faster, absorbed elsewhere."""
    masked_factor: float = 3.5
    """auto simulates sparse attention by masked multi-head attention for prompts up to this many times index_topk, and for later
    chunks whose rows see as many keys on average as those of such a prompt. Measured: on CPU level at 4 to 8 times
    (benchmarks/prove_masked_crossover.py); on one H200 with 128 heads 1.56 times as fast at twice and 0.86 at 4 times
    (`rorqual bench masked-prefill`), so level near 3.4; the paper's cost curve has its knee at 3.2 times."""

    def __post_init__(self) -> None:
        require(self, masked_factor=(self.masked_factor >= 0, "at least 0"))


ABSORBED = AttentionMode()
EXPANDED = AttentionMode(form="expanded")


@dataclass(frozen=True)
class Call:
    rows: Rows
    rotation: Rotation
    caches: LayerCaches
    mode: AttentionMode = ABSORBED
    replay: Replay | None = None
    trace: Trace = field(default_factory=Trace)

    @property
    def is_cached(self) -> bool:
        """Whether later forwards will read what this one keeps."""
        return not isinstance(self.caches, OwnRows)

    @property
    def wants_index(self) -> bool:
        """Whether indexers must select."""
        return self.mode.sparse or self.trace.wants_index
