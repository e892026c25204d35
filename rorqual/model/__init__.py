"""One device, plain nn.Module, no process groups: the DeepSeek-V3.2 architecture and its checkpoints.

Names are imported when they are first used, so that a config can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.model.cache import Cache, KeyCache
    from rorqual.model.call import AttentionMode
    from rorqual.model.config import ModelConfig, YarnConfig
    from rorqual.model.replay import Replay
    from rorqual.model.trace import Trace
    from rorqual.model.transformer import States, Transformer
    from rorqual.model.weights import load_model

_ORIGIN = {
    "AttentionMode": "call",
    "Cache": "cache",
    "KeyCache": "cache",
    "ModelConfig": "config",
    "Replay": "replay",
    "States": "transformer",
    "Trace": "trace",
    "Transformer": "transformer",
    "YarnConfig": "config",
    "load_model": "weights",
}

__all__ = [
    "AttentionMode",
    "Cache",
    "KeyCache",
    "ModelConfig",
    "Replay",
    "States",
    "Trace",
    "Transformer",
    "YarnConfig",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ORIGIN[name]}"), name)
