"""The tokenizer: special tokens are single ids, every text comes back, text never becomes a special id."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rorqual.chat.markers import BOS, EOS, PAD, SPECIAL_TOKENS
from rorqual.data.bpe import encode_documents, open_tokenizer, save_tokenizer, train_bpe, with_special_tokens
from rorqual.errors import UserError

TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over 1234567 lazy dogs " * 3, "鯨は大きい"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXT, 330, SPECIAL_TOKENS)


def test_special_tokens_come_first_each_as_one_id(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.get_vocab_size() == 330
    for i, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False).ids == [i]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_decodes_back_to_itself(tokenizer, text):
    (document,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(document[1:-1].tolist(), skip_special_tokens=False) == text


def test_a_special_token_spelt_out_in_a_document_stays_text(tokenizer):
    (document,) = encode_documents(tokenizer, [f"a{EOS}b{PAD}<think>"])
    assert document[0] == tokenizer.token_to_id(BOS) and document[-1] == tokenizer.token_to_id(EOS)
    assert all(id >= len(SPECIAL_TOKENS) for id in document[1:-1])
    assert tokenizer.encode(EOS, add_special_tokens=False).ids == [tokenizer.token_to_id(EOS)], "the setting leaked"


def test_digits_run_to_three_and_a_word_takes_the_space_before_it(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a  1234 fox\n\nx")]
    assert pieces == ["a", "ĠĠ", "123", "4", "Ġfox", "ĊĊ", "x"]


def test_saved_and_opened_it_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert open_tokenizer(tmp_path, SPECIAL_TOKENS).to_str() == tokenizer.to_str()


def test_transformers_opens_it_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The fox returns 42 鯨."
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_bad_tokenizers_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(UserError, match="at least 264"):
        train_bpe(TEXT, 263, SPECIAL_TOKENS)
    with pytest.raises(UserError, match="the text gave only"):
        train_bpe(["ab"], 1000, SPECIAL_TOKENS)
    with pytest.raises(UserError, match="no such tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        open_tokenizer(tmp_path)


def test_missing_special_tokens_are_named_and_can_be_added(tmp_path):
    plain = train_bpe(TEXT, 320, SPECIAL_TOKENS[:2])
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"lacks the special tokens .*<think>.*add_special_tokens=true"):
        open_tokenizer(tmp_path, SPECIAL_TOKENS)
    mended = with_special_tokens(open_tokenizer(tmp_path), SPECIAL_TOKENS)
    assert mended.token_to_id("<think>") >= 320 and mended.token_to_id(BOS) == 0


def test_transformers_renders_the_chat_template_as_the_encoder_does(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    from rorqual.chat import encode

    save_tokenizer(tokenizer, tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    assert peer.apply_chat_template(messages, tokenize=False, thinking=True) == encode(messages, thinking=True)
