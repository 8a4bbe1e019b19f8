"""What transformers' way asks is what the pipeline asks: conversations, edits, questions about pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.hub import NextFlowForConditionalGeneration, NextFlowProcessor, register
from nextflow_ar.hub.processing import as_pixels
from nextflow_ar.hub.tokens import asks
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.sequence.layout import build
from nextflow_ar.types import Codes, Document, Image, ImageReady, Text
from tests.conftest import TINY_MODEL, tiny_bundle

LONG = replace(TINY_MODEL, max_positions=4096, copies=True)
CLOSING = replace(LONG, closing_input="accumulated", context_images="closing")
Loaded = tuple[NextFlowForConditionalGeneration, NextFlowProcessor]
SAYS = {
    "canvases": ["40x40", "24x64"], "caption": "what is it?", "answer_guidance": 3.0, "think": True,
    "temperature": 8.0,
}  # fmt: skip


def loaded(folder: Path, config: Any = LONG, **generation: Any) -> Loaded:
    bundle = tiny_bundle(config)
    bundle.generation |= SAYS | generation
    with torch.no_grad():
        bundle.model.head.weight[: config.text_vocab] *= 0.05  # many words are likely, so guidance decides
    NextFlowPipeline(bundle).save_pretrained(folder)
    model = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, NextFlowProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["raw", "dialogue"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(tmp_path_factory.mktemp("hub") / "tiny", dialogue=request.param)


def picture(seed: int, size: tuple[int, int] = (24, 64)) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return PILImage.fromarray(pixels).resize(size, PILImage.Resampling.NEAREST)


def content(*parts: str | PILImage.Image) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one}
        for one in parts
    ]


CONVERSATION: list[tuple[str, list[str | PILImage.Image]]] = [
    ("user", ["draw", "a red circle"]),
    ("assistant", [picture(0)]),
    ("user", ["hello"]),
    ("assistant", [""]),
    ("user", ["what", picture(1), " ", "colour", "is it?"]),
]


@pytest.mark.parametrize("seen", [False, True], ids=["drawn with their scales", "seen as any picture"])
def test_a_conversation_is_laid_out_as_the_pipelines(seen: bool, tmp_path: Path) -> None:
    model, processor = loaded(tmp_path / "tiny", CLOSING, dialogue=True, think_told=seen)
    inputs = processor.apply_chat_template([{"role": r, "content": content(*c)} for r, c in CONVERSATION])
    vocab, layout = model.pipeline.bundle.vocab, model.pipeline.bundle.layout
    found = build(model.documents(**inputs)[0], vocab, layout, close_last=True)
    request = model.pipeline.chat_requests([{"role": r, "content": c} for r, c in CONVERSATION])
    wanted = build(request.document, vocab, layout, close_last=True)
    for name in ("tokens", "positions", "blocks", "scales", "lengths"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert [span.scales for span in wanted.images] == [0 if seen else 5, 0]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_texts_in_pieces_can_be_scored(both: Loaded) -> None:
    model, processor = both
    pieces = [{"role": "user", "content": content("the", "re is a c", "at")}]
    ids = processor.apply_chat_template(pieces)["input_ids"]
    assert "the\nre is a c\nat" in processor.tokenizer.decode(ids[0])
    assert model(ids).logits.shape[1] == ids.shape[1]


@pytest.mark.parametrize("think", [None, True], ids=["as edits do", "planned"])
def test_a_picture_is_changed_as_edit_changes_it(think: bool | None, both: Loaded) -> None:
    """Its size, its plan (this checkpoint plans what it draws, not what it changes) and its untouched pixels."""
    model, processor = both
    given, square = picture(1), picture(2, (40, 40))
    options: dict[str, Any] = {"generation_mode": "image", "think": think}
    found = model.generate(**processor(images=given, text="make it red"), seed=5, **options)[0]
    assert found.size == (24, 64)
    assert np.array_equal(found, model.pipeline.edit(given, "make it red", seed=5, think=think)[0])
    several = processor(images=[square, given], text="both of them")
    wanted = model.pipeline.edit([square, given], "both of them", seed=5, think=think)[0]
    assert np.array_equal(model.generate(**several, seed=5, **options)[0], wanted)
    drawn = model.generate(**processor(text="two dogs"), seed=5, **options)[0]
    assert np.array_equal(drawn, model.pipeline.generate("two dogs", seed=5, think=think)[0])
    other = model.generate(**processor(images=given, text="make it red"), size=(40, 40), **options)[0]
    assert other.size == (40, 40)


def test_what_a_change_leaves_alone_has_its_own_pixels(both: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = both
    given = picture(3)
    codes = model.pipeline.encode(given)
    true_images = model.pipeline.engine.images

    def same(requests: Any) -> Any:
        """Every code is drawn as it was."""
        for event in true_images(requests):
            yield ImageReady(event.row, codes) if isinstance(event, ImageReady) else event

    monkeypatch.setattr(model.pipeline.engine, "images", same)
    inputs = processor(images=[[given], []], text=["make it red", "two dogs"])
    found = model.generate(**inputs, generation_mode="image", think=False)
    assert np.array_equal(found[0], given) and not np.array_equal(found[1], given)


def test_a_picture_of_an_earlier_turn_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the next one is drawn in its size, as chat does."""
    model, processor = loaded(tmp_path / "tiny", dialogue=True)
    asked: list[Any] = []
    monkeypatch.setattr(model.pipeline, "draw", asked.extend)
    monkeypatch.setattr(model.pipeline, "think", list)
    talk = [
        {"role": "user", "content": content(picture(1), "what is it?")},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "draw a dog"},
    ]
    for messages in (talk, talk[:1]):
        model.generate(**processor.apply_chat_template(messages), generation_mode="image")
    assert [one.original is None for one in asked] == [True, False]
    chat = [{"role": "user", "content": [picture(1)]}, {"role": "user", "content": "draw a dog"}]
    assert asked[0].schedule == asked[1].schedule == model.pipeline.chat_requests(chat).schedule


def answered(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, inputs: Any, **options: Any
) -> str:
    ids = model.generate(**inputs, max_new_tokens=8, **options)
    assert isinstance(ids, torch.Tensor)
    return processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])[0].strip()


def test_questions_about_a_picture_are_describe_s(both: Loaded) -> None:
    model, processor = both
    differs = 0
    for seed in range(4):
        given = picture(seed)
        own = model.pipeline.describe(given, max_tokens=8)[0]  # its own question, its own guidance
        assert answered(model, processor, processor(images=given)) == own
        assert answered(model, processor, processor(images=[given], text=[" "])) == own
        wanted = [
            model.pipeline.describe(given, question="two dogs?", max_tokens=8, guidance=g)[0]
            for g in (1.0, 30.0)
        ]
        inputs = processor(images=given, text="two dogs?")
        assert [answered(model, processor, inputs, guidance_scale=g) for g in (1.0, 30.0)] == wanted
        differs += wanted[0] != wanted[1]
    assert differs
    shown, said = (
        Image(Codes.plain(ScaleSchedule.square(2), torch.zeros(5, dtype=torch.long))),
        Text("two dogs?"),
    )
    assert asks(Document(turns([("user", shown), ("user", said), ("assistant", Text("a"))])))
    assert asks(Document((shown, said)))
    assert not asks(
        Document(turns([("user", said), ("assistant", shown)]))
    )  # a drawing that goes on in words
    blind = {"guidance_scale": 30.0}
    hot = SamplingSettings(temperature=4.0)
    wanted = model.pipeline.describe(picture(0), question="a cat", max_tokens=8, settings=hot, guidance=30.0)
    inputs = processor(images=picture(0), text="a cat")
    assert answered(model, processor, inputs, do_sample=True, temperature=4.0, **blind) == wanted[0]
    silent = processor.apply_chat_template([{"role": "user", "content": content(picture(0))}])
    for nothing in (processor(text="two dogs"), silent):
        assert answered(model, processor, nothing, guidance_scale=1.0) is not None
        with pytest.raises(ValueError, match="has no picture or no words") as error:
            model.generate(**nothing, **blind)
        assert "\n" not in str(error.value)


def test_a_finished_conversation_has_its_last_mark(both: Loaded) -> None:
    _, processor = both
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a cat"}]

    def shown(messages: Any, **options: Any) -> str:
        return processor.tokenizer.decode(processor.apply_chat_template(messages, **options)["input_ids"][0])

    whole = shown(talk, add_generation_prompt=False)
    if processor.dialogue:
        template = processor.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=False)
        assert whole + "\n" == template and whole.endswith("a cat<|im_end|>")
        assert shown(talk[:1], add_generation_prompt=False) == "<|im_start|>user\nhello<|im_end|>"
        assert shown(talk[:1]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    else:
        assert whole == "helloa cat"
    options = {"add_generation_prompt": False, "continue_final_message": True}  # as pipelines ask
    assert shown(talk, **options) == shown(talk) == whole.removesuffix("<|im_end|>")


def test_pipelines_go_on_with_the_assistants_words(tmp_path: Path) -> None:
    pytest.importorskip("transformers.pipelines.any_to_any")
    register()
    from transformers import pipeline

    model, processor = loaded(tmp_path / "tiny", dialogue=True)
    pipe = pipeline("any-to-any", model=model, processor=processor)
    talk = [{"role": "user", "content": content("hello")}, {"role": "assistant", "content": content("a cat")}]
    found = pipe(text=talk, max_new_tokens=6, return_full_text=False)
    ids = processor.apply_chat_template(talk)["input_ids"]
    assert processor.tokenizer.decode(ids[0]).endswith("assistant\na cat")
    wanted = processor.tokenizer.decode(model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :])
    assert found[0]["generated_text"].strip() == wanted.replace("<|endoftext|>", "").strip()


def test_pictures_are_read_upright(tmp_path: Path) -> None:
    upright = picture(4)
    turned = upright.transpose(PILImage.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "phone.png", exif=exif)
    for given in (tmp_path / "phone.png", PILImage.open(tmp_path / "phone.png")):
        assert np.array_equal(as_pixels(given), upright)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((8, 8, 3), np.float32), r"\(8, 8, 3\) float32"),
        (torch.zeros(8, 8, 3, dtype=torch.bfloat16), r"\(8, 8, 3\) torch.bfloat16"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\) uint8"),
        (np.zeros((4, 0, 3), np.uint8), r"\(4, 0, 3\) uint8"),
        (np.zeros((8, 8, 1), np.uint8), r"\(8, 8, 1\) uint8"),
        (np.zeros((8, 8), bool), r"\(8, 8\) bool"),
        (PILImage.new("RGB", (0, 4)), r"\(4, 0, 3\) uint8"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(given: Any, got: str, both: Loaded) -> None:
    model, processor = both
    message = f"a picture is a Pillow image, a file or \\(H, W, 3\\) uint8, got {got}"
    with pytest.raises(ValueError, match=message):
        processor(images=[given], text="what is it?")
    if isinstance(given, np.ndarray):  # past the processor, too
        inputs = processor(images=picture(0), text="what is it?") | {
            "pixel_values": [torch.from_numpy(given)]
        }
        with pytest.raises(ValueError, match="a picture is a Pillow image"):
            model.generate(**inputs, generation_mode="image")
