"""What all layers of one forward share: the rows, their angles, where keys are kept, how to attend, what to replay and tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rorqual.errors import require
from rorqual.model.cache import LayerCaches
from rorqual.model.replay import Replay
from rorqual.model.rope import Rotation
from rorqual.model.rows import Rows
from rorqual.model.trace import Trace


@dataclass(frozen=True)
class AttentionMode:
    """How one forward attends; every choice computes the same function up to rounding, but for `sparse`."""

    sparse: bool = True
    """False: all layers attend to all keys, whatever their indexers say (the dense warm-up; a dense baseline)."""
    form: Literal["absorbed", "expanded"] = "absorbed"
    """absorbed: bits depend on the row alone, so decoding equals prefill. expanded: the multi-head form wherever attention
    is dense, and masked multi-head attention where it is sparse and the context is at most masked_len."""
    masked_len: int = 1024
    """In the expanded form, up to what context sparse attention is simulated by a mask."""

    def __post_init__(self) -> None:
        require(self, masked_len=(self.masked_len >= 0, "at least 0"))


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
