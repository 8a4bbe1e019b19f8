"""Conversations: chat marks as the text tokenizer's own template puts them."""

from __future__ import annotations

import torch

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.dialogue import opened, turns, whole
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, build
from nextflow_ar.types import Codes, Document, Image, Mark, Text
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


def test_neighbouring_texts_of_one_role_are_one() -> None:
    schedule = ScaleSchedule.square(1)
    picture = Image(Codes.plain(schedule, torch.zeros(1, dtype=torch.long)))
    parts = [
        ("user", Text("two")), ("user", Text("dogs")), ("user", Text(" ")), ("user", Text("red")), ("user", picture),
        ("user", Text("a cat")), ("assistant", Text("")), ("user", Text("now")), ("assistant", Text("so", True)),
        ("assistant", Text("it", True)), ("assistant", Text("is", False)),
    ]  # fmt: skip
    assert whole(parts) == [
        ("user", Text("two\ndogs\nred")), ("user", picture), ("user", Text("a cat\nnow")),
        ("assistant", Text("so\nit", True)), ("assistant", Text("is", False)),
    ]  # fmt: skip
    assert whole([]) == [] and [one.text for _, one in parts[:2] if isinstance(one, Text)] == ["two", "dogs"]
