"""Special tokens are single ids, text never gives one, and the streaming decoder never shows half a character."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rorqual.chat import ChatError, Tokenizer, encode_tokens
from rorqual.chat.markers import DSML, RESERVED, SPECIAL_TOKENS, THINK
from rorqual.chat.tokenizer import REQUIRED
from tests.chat.conftest import byte_level
from tests.chat.test_encoder import user

TEXT = "a<think>é 天気 🐋 <｜User｜>b ｜DSML｜ <|EOT|>" + "".join(RESERVED)


def test_text_gives_no_special_id_and_comes_back(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert not set(tokens) & set(tokenizer.special_tokens)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.encode_batch([TEXT, "x"]) == [tokens, tokenizer.encode("x")]


def test_a_vocabulary_that_holds_its_special_tokens_as_words_is_safe_too() -> None:
    """A model that looks whole words up (ignore_merges) would find the marker in its vocabulary."""
    backend = byte_level(list(SPECIAL_TOKENS))
    settings = backend.to_str().replace('"ignore_merges":false', '"ignore_merges":true')
    assert '"ignore_merges":true' in settings
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(settings))
    for token in SPECIAL_TOKENS:
        assert tokenizer.special_ids[token] not in tokenizer.encode(token)
        assert tokenizer.decode(tokenizer.encode(token)) == token


def test_each_special_token_is_one_id(tokenizer: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode_flat(token) == [tokenizer.special_id(token)]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_pieces_tell_special_tokens_from_text_that_looks_like_them(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces([*tokenizer.encode("a<think>"), tokenizer.special_id(THINK), *tokenizer.encode("b")])
    assert pieces == [("a<think>", False), (THINK, True), ("b", False)]


def test_a_character_is_held_back_until_its_last_byte(tokenizer: Tokenizer) -> None:
    tokens = [token for byte in "🐋".encode() for token in range(256 + 20) if tokenizer.backend.id_to_token(token) is not None
              and token not in tokenizer.special_tokens and tokenizer.token_bytes(token) == bytes([byte])]  # fmt: skip
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(token) for token in tokens] == [[], [], [], [("🐋", False)]]
    assert detokenizer.feed(tokens[0]) == []
    assert detokenizer.feed(tokenizer.eos_id) == [("\ufffd", False), ("<｜end▁of▁sentence｜>", True)]
    assert detokenizer.feed(tokens[0]) == [] and detokenizer.finish() == [("\ufffd", False)] and detokenizer.finish() == []


def test_streamed_text_is_the_library_s_decoding(tokenizer: Tokenizer) -> None:
    for tokens in (tokenizer.encode("día 天気 🐋\n\n x"), list(range(9, 300)), list(range(300, 9, -1))):
        plain = [token for token in tokens if token not in tokenizer.special_tokens]
        detokenizer = tokenizer.detokenizer()
        text = "".join(piece.text for token in plain for piece in detokenizer.feed(token))
        text += "".join(piece.text for piece in detokenizer.finish())
        assert text == tokenizer.backend.decode(plain, skip_special_tokens=False)


def test_a_vocabulary_that_is_not_byte_level_streams_too() -> None:
    vocabulary = {token: n for n, token in enumerate([*SPECIAL_TOKENS, "[UNK]", "▁a", "▁b", "c"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer = Tokenizer(backend)
    tokens = tokenizer.encode("a b a")
    assert tokenizer.decode([0, *tokens, 1, *tokens]) == f"{SPECIAL_TOKENS[0]}a b a{SPECIAL_TOKENS[1]}a b a"


def test_a_tokenizer_that_lacks_a_marker_is_refused_unless_it_is_named() -> None:
    backend = byte_level([token for token in REQUIRED if token != DSML])
    with pytest.raises(ChatError, match="lacks the special tokens ｜DSML｜"):
        Tokenizer(backend)
    tokenizer = Tokenizer(backend, allow_missing=[DSML])
    with pytest.raises(ChatError, match=r"messages\[0\].content"):
        encode_tokens([user(f"a {DSML}")], tokenizer)


def test_a_missing_or_broken_file_is_named(tmp_path) -> None:
    with pytest.raises(ChatError, match="tokenizer"):
        Tokenizer.open(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ChatError, match="not a tokenizer that can be read"):
        Tokenizer.open(tmp_path)


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatError, match="id 100000 is not in the vocabulary"):
        tokenizer.decode([100_000])
