"""Conversations: chat marks as the text tokenizer's own template puts them."""

from __future__ import annotations

from nextflow_ar.sequence.dialogue import opened, turns
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, build
from nextflow_ar.types import Document, Mark, Text
from tests.conftest import tiny_bundle


def test_turns_are_the_chat_template_s() -> None:
    vocab = tiny_bundle().vocab
    parts = [("user", Text("two dogs")), ("assistant", Text("a cat", True)), ("user", Text("a red circle"))]
    sample = build(Document(turns(parts)), vocab, LayoutOptions(12.0))
    messages = [{"role": role, "content": segment.text} for role, segment in parts]
    told = vocab.tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(told, str)
    wanted = vocab.tokenizer.encode(told.removesuffix("\n"), add_special_tokens=False)
    assert vocab.tokenizer.decode(sample.tokens.tolist()) == vocab.tokenizer.decode(wanted)


def test_a_response_learns_its_words_and_the_end_of_its_turn() -> None:
    vocab = tiny_bundle().vocab
    said = turns(
        [("user", Text("two dogs")), ("assistant", Text("a ", True)), ("assistant", Text("cat", True))]
    )
    assert said.count(Mark("<|im_end|>", True)) == 1 and said.count(Mark("<|im_end|>", False)) == 1
    one = turns([("user", Text("two dogs")), ("assistant", Text("a cat", True))])
    sample = build(Document(one), vocab, LayoutOptions(12.0))
    learned = [t for t in sample.targets.tolist() if t != IGNORED]
    assert learned == [*vocab.encode("a cat"), vocab.special("<|im_end|>")]


def test_an_opened_turn_is_the_beginning_of_the_finished_one() -> None:
    asked = ("user", Text("two dogs"))
    assert opened([]) == (Mark("<|im_start|>"), Text("assistant\n"))
    for said in (Text("a cat", True), Text("red")):
        whole = turns([asked, ("assistant", said)])
        assert opened([asked]) == whole[:-2]
    thought = ("assistant", Text("a plan", True))
    whole = turns([asked, thought, ("assistant", Text("a cat", True))])
    assert opened([asked, thought]) == whole[:-2]  # the turn goes on
