"""A tokenizer whose text tokens are single bytes and whose special tokens are DeepSeek's: small enough for any test."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rorqual.chat import SPECIAL_TOKENS, Tokenizer


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return Tokenizer(backend)
