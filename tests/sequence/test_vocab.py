"""The text tokenizer: any text round-trips, special tokens are whole, saving keeps all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextflow_ar.sequence.vocab import (
    SPECIAL_TOKENS,
    Vocabulary,
    load_text_tokenizer,
    train_text_tokenizer,
)
from nextflow_ar.storage import StorageError

VOCAB = Vocabulary(train_text_tokenizer(["a red circle on a blue background"] * 3, 280), 288, 10)


@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    assert VOCAB.decode(VOCAB.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "  two  spaces ", "日本語とemoji 🦋", "العربية", "don't , stop .", "a\n\tb\x00", "<boi><|im_end|>"],
)
def test_hard_texts_round_trip(text: str) -> None:
    ids = VOCAB.encode(text)
    assert VOCAB.decode(ids) == text
    assert not set(ids) & {VOCAB.special(token) for token in SPECIAL_TOKENS}


def test_words_of_the_corpus_are_short() -> None:
    assert len(VOCAB.encode(" background")) < len(VOCAB.encode(" backgronud"))


def test_saved_tokenizer_is_the_same_and_carries_its_chat_template(tmp_path: Path) -> None:
    VOCAB.tokenizer.save_pretrained(tmp_path)
    again = Vocabulary(load_text_tokenizer(tmp_path), 288, 10)
    assert again.encode("a red 🦋") == VOCAB.encode("a red 🦋")
    assert (
        [again.special(t) for t in SPECIAL_TOKENS]
        == [VOCAB.special(t) for t in SPECIAL_TOKENS]
        == [0, 1, 2, 3, 4]
    )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    said = again.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\n<boi><eoi>what?<|im_end|>\n<|im_start|>assistant\n"


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"lacks the file tokenizer.json"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StorageError, match="not a text tokenizer"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the model 100"):
        Vocabulary(VOCAB.tokenizer, 100, 10)


def test_padding_entries_and_marks_are_never_written() -> None:
    never = set(VOCAB.never)
    assert {VOCAB.boi, VOCAB.eoi, *range(len(VOCAB.tokenizer), 288)} <= never
    assert VOCAB.end not in never
