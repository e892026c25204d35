"""Floor 3: numbers to gradients to weights."""

from rorqual.train.grpo import grpo_loss

__all__ = ["grpo_loss"]
