"""Weights are drawn from the seed alone, all of them, with the width that the config states."""

from __future__ import annotations

import subprocess
import sys

import torch

from rorqual.model import ModelConfig, Transformer
from tests.model.small_models import SMALL


def test_every_matrix_is_normal_with_init_std_and_vectors_are_ones_or_zeros() -> None:
    model = Transformer(ModelConfig(**{**SMALL, "dim": 128, "init_std": 0.03}))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert abs(weight.std().item() - 0.03) < 0.005 and abs(weight.mean().item()) < 0.005, name
            assert weight.abs().max() < 0.03 * 6, name
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
    assert all(not buffer.any() for buffer in model.buffers())


def test_a_seed_gives_one_model_and_another_seed_another() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 3)  # the global generator has no part in it
        return list(Transformer(ModelConfig(**SMALL), seed=seed).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True) if a.dim() > 1)


def test_on_the_meta_device_nothing_is_drawn_and_nothing_takes_memory() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    assert all(each.is_meta for each in [*model.parameters(), *model.buffers()])


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(ModelConfig(**{**SMALL, "tie_embeddings": True}))
    assert model.head.weight is model.embed.weight


def test_a_config_is_read_without_torch() -> None:
    code = "import sys; from rorqual.model import ModelConfig; ModelConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
