"""Hypothesis profiles (default: 500 examples; nightly: 10,000), and a small tokenizer in the shape of DeepSeek's."""

from __future__ import annotations

import os

import pytest
import tokenizers
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from rorqual.chat import Tokenizer
from rorqual.chat.markers import ASSISTANT, BOS, DSML, END_THINK, EOS, PAD, THINK, USER

ALL_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("default", max_examples=500, derandomize=True, deadline=None, suppress_health_check=ALL_CHECKS)
settings.register_profile("quick", max_examples=100, derandomize=True, deadline=None, suppress_health_check=ALL_CHECKS)
settings.register_profile("nightly", max_examples=10_000, deadline=None, suppress_health_check=ALL_CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

CORPUS = [
    "the weather in Rome is fine; function_calls invoke name= parameter string=true false < > think User DSML",
    "día 天気 🐋",
]


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 ids whose first ids are `special`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """As DeepSeek's: three tokens flagged special in front, the others added at the end and not flagged."""
    backend = byte_level([BOS, EOS, PAD])
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in (THINK, END_THINK, USER, ASSISTANT, DSML, "<|EOT|>")]
    )
    return Tokenizer(backend)
