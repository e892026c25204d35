"""The smallest honest task with something to learn: sort a few digits. A verifiable answer of several tokens, in milliseconds.

The model is first taught three habits on the same prompts: ascending, descending, as given. It knows all three well, and only
ascending is rewarded; so reinforcement has room from about a third of the prompts to all of them, and a policy that falls
apart is seen at once. Nothing here is told to the learner but the verdict on a whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import require
from rorqual.model.call import EXPANDED
from rorqual.model.config import ModelConfig
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer

BEGIN, END = 10, 11
"""Ids after the ten digits: they frame a prompt."""


@dataclass(frozen=True)
class SortingConfig:
    digits: int = 4
    """How many are to be sorted."""
    lessons: int = 250
    """Supervised steps before reinforcement."""
    rows: int = 32
    """Of a lesson."""
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        require(self, digits=(self.digits >= 2, "at least 2"), lessons=(self.lessons >= 0, "at least 0"))


SHAPE = ModelConfig(
    vocab_size=12, dim=48, n_layers=2, n_dense_layers=0, inter_dim=64, max_positions=64, n_heads=4, q_lora_rank=24,
    kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, yarn=None, index_n_heads=2, index_head_dim=16,
    index_topk=4, n_routed_experts=8, n_activated_experts=2, moe_inter_dim=32, n_expert_groups=1, n_limited_groups=1,
    n_mtp_layers=0, init_std=0.1,
)  # fmt: skip
"""About 100K parameters with every mechanism that a stabiliser is for: experts to route to, fewer selected keys than tokens."""


def draw_prompts(count: int, digits: int, seed: Sequence[int]) -> np.ndarray:
    """int64 [count, digits + 2]: BEGIN, the digits, END; a pure function of the seed."""
    drawn = np.random.default_rng(list(seed)).integers(0, 10, (count, digits))
    frame = np.ones((count, 1), np.int64)
    return np.concatenate([frame * BEGIN, drawn, frame * END], 1)


def verdict(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """1 where the answer is the prompt's digits in ascending order, else 0."""
    return float(list(answer) == sorted(prompt[1:-1]))


def taught(shape: ModelConfig, config: SortingConfig, seed: int) -> Transformer:
    """A model that has the three habits, in about equal parts; its indexers were trained along."""
    model = Transformer(shape, seed)
    adam = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.0)
    for lesson in range(config.lessons):
        tokens = _lesson(config, (seed, lesson))
        loss = _lesson_loss(model, tokens, config.digits)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * min(1.0, 2 - 2 * lesson / config.lessons)
        adam.step()
    return model


def _lesson(config: SortingConfig, seed: tuple[int, int]) -> Tensor:
    prompts = draw_prompts(config.rows, config.digits, (1, *seed))
    digits = prompts[:, 1:-1]
    ascending = np.sort(digits, 1)
    habit = np.random.default_rng([2, *seed]).integers(0, 3, (config.rows, 1))
    answers = np.where(habit == 0, ascending, np.where(habit == 1, ascending[:, ::-1], digits))
    return torch.from_numpy(np.concatenate([prompts, answers], 1))


def _lesson_loss(model: Transformer, tokens: Tensor, digits: int) -> Tensor:
    trace = Trace(index_loss="restricted")
    logits = model(tokens[:, :-1], trace=trace, mode=EXPANDED)[:, -digits:]
    index = torch.stack([loss.mean() for loss in trace.index_losses.values()]).mean()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, -digits:].flatten()) + index
