"""A byte-level BPE tokenizer with DeepSeek's special tokens, each as one id, trained with the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rorqual.chat import template
from rorqual.chat.markers import BOS, EOS, PAD
from rorqual.errors import UserError
from rorqual.runlog import write_atomically

TOKENIZER_FILE = "tokenizer.json"

# Digits in runs of at most three; a word with the space or sign before it; signs with the line ends after them; white space.
_DIGITS = r"\p{N}{1,3}"
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer of exactly vocab_size ids: special_tokens first (ids 0, 1, ...), the 256 bytes, then merges.

    Every text decodes back to itself. Raises UserError where vocab_size leaves no room, or the texts give too few merges.
    """
    least = len(special_tokens) + 256
    if vocab_size < least:
        raise UserError(f"vocab_size {vocab_size}: at least {least} ({len(special_tokens)} special tokens and 256 bytes)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        found = tokenizer.get_vocab_size()
        raise UserError(f"vocab_size {vocab_size}: the text gave only {found} ids; give more text or a smaller vocab_size")
    return tokenizer


def open_tokenizer(path: str | Path, required_tokens: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer.json (or the directory that holds one). Raises UserError where it's absent, broken or lacks a token."""
    path = Path(path)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer.json: {error}") from None
    missing = [token for token in required_tokens if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path}: lacks the special tokens {', '.join(missing)}; add_special_tokens=true adds them at the end")
    return tokenizer


def with_special_tokens(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer with each of the tokens as one id; new ones go to the end of its vocabulary."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, ends: tuple[str, str] = (BOS, EOS)) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, as transformers reads them."""
    write_atomically(directory / TOKENIZER_FILE, tokenizer.to_str())
    named = {"bos": ends[0], "eos": ends[1], "pad": PAD if tokenizer.token_to_id(PAD) is not None else ends[1]}
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {f"{name}_token": token for name, token in named.items()}
    settings |= {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    write_atomically(directory / "tokenizer_config.json", json.dumps(settings, indent=1, ensure_ascii=False))
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in named.items()}
    write_atomically(directory / "generation_config.json", json.dumps(ids, indent=1))
    write_atomically(directory / template.FILE, template.chat_template())


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], ends: tuple[str, str] = (BOS, EOS)) -> list[np.ndarray]:
    """Each text as its first special token, its tokens, its last one (uint32). A special token spelt out in a text stays text."""
    first, last = map(tokenizer.token_to_id, ends)
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([first, *encoding.ids, last], dtype=np.uint32) for encoding in encodings]
    finally:
        tokenizer.encode_special_tokens = False
