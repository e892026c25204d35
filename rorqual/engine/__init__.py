"""Floor 2: token ids to completions."""

from rorqual.engine.engine import Engine, EngineConfig

__all__ = ["Engine", "EngineConfig"]
