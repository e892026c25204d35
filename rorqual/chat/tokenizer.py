"""Text <-> token ids: special tokens are single ids that only special spans give; text never gives one.

A wrapper of a `tokenizers` tokenizer (tokenizer.json). The library turns every added token that it sees in a text into its
id, and `encode_special_tokens` spares only those flagged special, which DeepSeek's <think> and <｜User｜> are not. So plain
text goes through a second copy of the tokenizer from which the added tokens were taken away. Added tokens that are only
white space stay: they are text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from rorqual.chat.errors import ChatError
from rorqual.chat.markers import ASSISTANT, BOS, DSML, END_THINK, EOS, PAD, RESERVED, SPECIAL_TOKENS, THINK, USER

__all__ = ["ASSISTANT", "BOS", "DSML", "END_THINK", "EOS", "PAD", "SPECIAL_TOKENS", "THINK", "USER"]
__all__ += ["Detokenizer", "Piece", "Tokenizer"]

FILE = "tokenizer.json"
REQUIRED = tuple(token for token in SPECIAL_TOKENS if token != PAD)


class Piece(NamedTuple):
    """Decoded text; is_special says that it was one special token and not text that looks like one."""

    text: str
    is_special: bool


class Tokenizer:
    """DeepSeek's special tokens and byte-level text over token ids.

    Raises ChatError where the tokenizer lacks a special token of the format, unless it's named in `allow_missing`: such a
    marker is written as text, so that text can forge it, and `encode_tokens` refuses it inside fields.
    """

    def __init__(self, backend: tokenizers.Tokenizer, allow_missing: Iterable[str] = (), name: str = "tokenizer"):
        self.backend = backend
        self.missing = frozenset(token for token in REQUIRED if backend.token_to_id(token) is None)
        refused = sorted(self.missing - set(allow_missing))
        if refused:
            raise ChatError(name, f"lacks the special tokens {', '.join(refused)}; train one with rorqual.chat.SPECIAL_TOKENS")
        settings = json.loads(backend.to_str())
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        reserved = {token: vocabulary[token] for token in RESERVED if token in vocabulary}
        self.special_ids: dict[str, int] = {text: i for text, i in {**added, **reserved}.items() if text.strip()}
        self.special_tokens: dict[int, str] = {i: text for text, i in self.special_ids.items()}
        self._plain = _without_tokens(settings, self.special_ids)
        self.is_byte_level = _decodes_bytes(settings.get("decoder"))
        self._plain_added = {i: text for text, i in added.items() if not text.strip()}

    @classmethod
    def open(cls, path: str | Path, allow_missing: Iterable[str] = ()) -> Tokenizer:
        """From a tokenizer.json, or the directory that holds one. Raises ChatError where it's absent or broken."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ChatError(str(path), f"not a tokenizer that can be read: {error}") from None
        return cls(backend, allow_missing, str(path))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        return self.special_ids[BOS]

    @property
    def eos_id(self) -> int:
        return self.special_ids[EOS]

    @property
    def pad_id(self) -> int:
        """The id of the padding token; that of EOS where the tokenizer has none."""
        return self.special_ids.get(PAD, self.eos_id)

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises ChatError where the tokenizer lacks it."""
        if token not in self.special_ids:
            raise ChatError("tokenizer", f"has no special token {token}")
        return self.special_ids[token]

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; a special token spelt out in it stays text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of plain text, and the character at which each one begins."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, text: str) -> list[int]:
        """The ids of a flat prompt as other engines read it: every special token spelt out in it becomes its id."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def pieces(self, tokens: Iterable[int]) -> list[Piece]:
        """Ids as runs of text and single special tokens, for `StreamParser.feed`."""
        detokenizer = self.detokenizer()
        runs: list[Piece] = []
        texts: list[str] = []
        for token in tokens:
            for piece in detokenizer.feed(token):
                if piece.is_special:
                    runs += _joined(texts), piece
                    texts = []
                else:
                    texts.append(piece.text)
        texts += [piece.text for piece in detokenizer.finish()]
        return [piece for piece in (*runs, _joined(texts)) if piece.text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids, special tokens spelt out; bytes that are not UTF-8 become U+FFFD."""
        return "".join(piece.text for piece in self.pieces(tokens))

    def detokenizer(self) -> Detokenizer:
        """A fresh streaming decoder."""
        return Detokenizer(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a plain token of a byte-level vocabulary stands for."""
        if token in self._plain_added:
            return self._plain_added[token].encode()
        name = self.backend.id_to_token(token)
        if name is None:
            raise ChatError("tokens", f"id {token} is not in the vocabulary of {self.vocab_size}")
        return bytes(map(_BYTE_OF.__getitem__, name)) if all(map(_BYTE_OF.__contains__, name)) else name.encode()


class Detokenizer:
    """Token ids -> text as they come; an incomplete UTF-8 character is held back until its last byte arrives."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        self._is_byte_level = tokenizer.is_byte_level
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes: dict[int, bytes] = {}
        self._held: list[int] = []  # of a vocabulary that is not byte-level: ids since the last special token
        self._given = ""

    def feed(self, token: int) -> list[Piece]:
        """What this id makes certain: nothing where a character is incomplete; two pieces where a special token cuts one."""
        special = self._special.get(token)
        if special is not None:
            return [*self.finish(), Piece(special, True)]
        text = self._decoder.decode(self._bytes_of(token)) if self._is_byte_level else self._difference(token)
        return [Piece(text, False)] if text else []

    def finish(self) -> list[Piece]:
        """What is held back: U+FFFD for an incomplete character, or nothing."""
        if self._is_byte_level:
            text = self._decoder.decode(b"", final=True)
        else:
            text = self._tokenizer.backend.decode(self._held, skip_special_tokens=False)[len(self._given) :] if self._held else ""
            self._held, self._given = [], ""
        return [Piece(text, False)] if text else []

    def _bytes_of(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._tokenizer.token_bytes(token)
        return known

    def _difference(self, token: int) -> str:
        self._held.append(token)
        text = self._tokenizer.backend.decode(self._held, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return ""
        fresh, self._given = text[len(self._given) :], text
        return fresh


def _joined(texts: list[str]) -> Piece:
    return Piece("".join(texts), False)


def _without_tokens(settings: dict[str, Any], special_ids: dict[str, int]) -> tokenizers.Tokenizer:
    """A copy for plain text: without the special tokens, and without the post-processor that may name them."""
    model = dict(settings["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in special_ids}
        used = set(model["vocab"])
        model["merges"] = [merge for merge in model.get("merges", []) if _is_possible(merge, used)]
    added = [token for token in settings["added_tokens"] if token["content"] not in special_ids]
    plain = {**settings, "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    if "merges" not in settings["model"]:
        plain["model"].pop("merges", None)
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _is_possible(merge: Any, vocabulary: set[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocabulary and right in vocabulary and left + right in vocabulary


def _decodes_bytes(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_decodes_bytes, decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, which byte-level BPE vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
