"""The pipeline: pictures out, captions out, seeds, sizes, names of models, saved defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.pipeline import NextFlowPipeline, RequestError, fold_seed, resolve_model
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import FINAL_GRIDS, ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import place
from nextflow_ar.types import Codes, ImageReady, ScaleReady
from tests.conftest import TINY_TOKENIZER, tiny_bundle

HOT = SamplingSettings(temperature=8.0)


@pytest.fixture
def pipeline(bundle: Bundle) -> NextFlowPipeline:
    return NextFlowPipeline(bundle)


def test_pictures_of_a_call(pipeline: NextFlowPipeline) -> None:
    events = []
    pictures = pipeline.generate(["two dogs", "a cat"], n=2, seed=5, settings=HOT, on_event=events.append)
    assert [p.size for p in pictures] == [(40, 40)] * 4
    assert sum(isinstance(e, ScaleReady) for e in events) == 4 * 5
    ready = [e for e in events if isinstance(e, ImageReady)]
    assert all(np.array_equal(e.image, pictures[e.row]) for e in ready)
    alone = pipeline.generate("a cat", seed=fold_seed(5, 1), settings=HOT)[0]
    assert np.array_equal(alone, pictures[3])
    assert not np.array_equal(pictures[2], pictures[3])


def test_saved_defaults_are_used_and_may_be_changed(pipeline: NextFlowPipeline) -> None:
    assert pipeline.defaults == SamplingSettings(guidance=2.0, top_p=0.95)
    by_default = pipeline.generate("two dogs", seed=1)[0]
    named = pipeline.generate("two dogs", seed=1, settings=SamplingSettings(guidance=2.0, top_p=0.95))[0]
    assert np.array_equal(by_default, named)


def test_previews_grow_into_the_picture(pipeline: NextFlowPipeline) -> None:
    events = []
    picture = pipeline.generate("two dogs", settings=HOT, on_event=events.append)[0]
    schedule = pipeline.schedule_for()
    scales = [e for e in events if isinstance(e, ScaleReady)]
    previews = [pipeline.preview(schedule, e.codes, e.scale + 1) for e in scales]
    assert np.array_equal(previews[-1], picture)
    assert not np.array_equal(previews[0], picture)


def test_sizes(pipeline: NextFlowPipeline) -> None:
    assert pipeline.schedule_for((24, 24)).final == (3, 3)
    assert pipeline.generate("a cat", size=(24, 24), settings=HOT)[0].size == (24, 24)
    with pytest.raises(
        RequestError, match="no scale schedule covers 50x41 pixels; this model draws up to 40x40"
    ):
        pipeline.schedule_for((50, 41))


def test_what_can_be_drawn_is_read_at_that_size() -> None:
    made = tiny_bundle()
    large = replace(TINY_TOKENIZER, num_scales=8)
    eight = ImageTokenizer(large).eval().requires_grad_(False)
    eight.load_state_dict(made.image_tokenizer.state_dict())
    for canvases in ([], ["72x56", "96x96"]):
        found = NextFlowPipeline(Bundle(made.model, eight, made.vocab, {"canvases": canvases}))
        for level in (8, 10) if canvases else (8,):
            for final in FINAL_GRIDS:
                height, width = ScaleSchedule.nearest(*final, level).image_size(8)
                drawn = found.schedule_for((width, height))
                assert found.canvas_for(height, width) == drawn and len(drawn) == level
                assert found.fit(PILImage.new("RGB", (width, height))).shape == (height, width, 3)
        assert found.canvas_for(32, 32).final == (8, 8)  # an icon is enlarged, not read from four scales
    assert found.canvas_for(480, 640).final == (7, 9) and found.canvas_for(48, 639).final == (7, 9)
    assert found.canvas_for(500, 520).final == (8, 8) and found.canvas_for(1000, 901).final == (8, 8)


def test_pictures_are_read_on_the_canvas_that_an_extraction_lays_them_on() -> None:
    made = tiny_bundle()
    sizes = {
        (400, 600): (4, 6),
        (400, 500): (4, 6),
        (400, 480): (4, 5),
        (400, 440): (5, 5),
        (400, 900): (3, 8),
    }
    canvases = {"canvases": [f"{8 * w}x{8 * h}" for h, w in sorted(set(sizes.values()))]}
    found = NextFlowPipeline(replace(made, generation=canvases))
    for (height, width), final in sizes.items():
        assert found.canvas_for(height, width).final == final
        assert found.canvas_for(height, width) == ScaleSchedule.nearest(height, width, 5)
    plain = NextFlowPipeline(made)  # a checkpoint that names none reads all on its square
    assert {plain.canvas_for(*size) for size in sizes} == {ScaleSchedule.square(5)}


def test_a_picture_is_fitted_as_the_model_was_taught(pipeline: NextFlowPipeline) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (30, 60, 3), np.uint8)
    picture = PILImage.fromarray(pixels)
    padded = NextFlowPipeline(replace(pipeline.bundle, generation={"fit": "pad"}))
    assert np.array_equal(padded.fit(picture), place(picture, 40, 40, "pad")[0])
    assert np.array_equal(pipeline.fit(picture), place(picture, 40, 40, "crop")[0])
    small = PILImage.fromarray(pixels[:20, :24])
    assert np.array_equal(padded.fit(small)[10:30, 8:32], small)  # not enlarged: as extraction lays it out
    laid = padded.image_tokenizer.encode(picture, num_scales=5, schedule=ScaleSchedule.square(5))
    assert isinstance(laid, Codes) and torch.equal(padded.encode(picture).target, laid.target)
    with pytest.raises(StorageError, match=r"generation.json: fit is pad or crop, got 'stretch'"):
        NextFlowPipeline(replace(pipeline.bundle, generation={"fit": "stretch"}))


def test_pictures_lie_as_they_are_seen(pipeline: NextFlowPipeline, tmp_path: Path) -> None:
    whole = PILImage.fromarray(np.random.default_rng(2).integers(0, 255, (40, 64, 3), np.uint8))
    side = whole.transpose(PILImage.Transpose.ROTATE_90)
    side.getexif()[0x0112] = 6
    side.save(tmp_path / "phone.png", exif=side.getexif())
    phone = PILImage.open(tmp_path / "phone.png")
    assert phone.size == (40, 64)
    assert np.array_equal(pipeline.fit(phone), pipeline.fit(whole))
    assert torch.equal(pipeline.encode(phone).target, pipeline.encode(whole).target)
    assert pipeline.describe(phone, max_tokens=6) == pipeline.describe(whole, max_tokens=6)


def test_what_is_no_picture_is_one_clear_line(pipeline: NextFlowPipeline) -> None:
    for bad, got in (
        (np.zeros((8, 8, 3), np.float32), r"\(8, 8, 3\) float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\) uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\) uint8"),
    ):
        with pytest.raises(
            RequestError, match=r"^a picture is a Pillow image or .H, W, 3. uint8, got " + got
        ):
            pipeline.encode(bad)
    with pytest.raises(RequestError, match=r"^the picture is empty: 0x3 pixels$"):
        pipeline.describe(PILImage.new("RGB", (0, 3)))
    grey = np.full((8, 8), 0.5, np.float32)
    assert pipeline.fit(grey).max() == pipeline.fit(grey).min() == 128  # as to_rgb has it


def test_captions_and_answers(pipeline: NextFlowPipeline) -> None:
    rng = np.random.default_rng(0)
    pictures = [PILImage.fromarray(rng.integers(0, 255, (n, 50, 3), np.uint8)) for n in (40, 70)]
    texts = pipeline.describe(pictures, max_tokens=8)
    assert len(texts) == 2 and pipeline.describe(pictures[1], max_tokens=8) == [texts[1]]
    assert pipeline.describe(np.asarray(pictures[0]), max_tokens=8) == [texts[0]]
    asked = pipeline.describe(pictures, question="two dogs?", max_tokens=8)
    assert len(asked) == 2


def test_reconstruction_is_the_tokenizers(pipeline: NextFlowPipeline) -> None:
    picture = PILImage.new("RGB", (80, 60), (200, 30, 30))
    pixels = torch.from_numpy(pipeline.fit(picture).copy())[None]
    codes = pipeline.image_tokenizer.encode_bytes(pixels).target
    wanted = pipeline.image_tokenizer.decode_bytes(codes, pipeline.schedule_for())[0].numpy()
    assert np.array_equal(pipeline.reconstruct(picture), wanted)


def test_prompts_must_say_something(pipeline: NextFlowPipeline) -> None:
    for prompt in ("", "  \n"):
        with pytest.raises(RequestError, match="the prompt is empty"):
            pipeline.generate(prompt)


def test_names_of_models(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("nano").name == "nano"
    with pytest.raises(
        RequestError, match="unknown model 'nanoo': nano, a checkpoint folder or a Hub id OWNER/NAME"
    ):
        resolve_model("nanoo")


def test_what_is_drawn_where_nobody_says_a_size() -> None:
    """A model that was trained on finer levels than its tokenizer's own draws, reads and offers those."""
    made = tiny_bundle()
    named = NextFlowPipeline(replace(made, generation={"size": "56x56"}))
    plain = NextFlowPipeline(made)
    level = len(plain.schedule_for((32, 32)))
    assert plain.schedule_for() == ScaleSchedule.square(5) and level < 5
    finer = named.schedule_for()
    assert len(finer) > 5 and finer.image_size(8) == (56, 56)
    assert named.canvas_for(500, 500) == finer and plain.canvas_for(500, 500) == plain.schedule_for()
    assert named.requests(["two dogs"], [1])[0].schedule == finer
    with pytest.raises(RequestError, match="56x56"):
        plain.schedule_for((56, 56))
    with pytest.raises(StorageError, match="size: '57x56' is no size"):
        NextFlowPipeline(replace(made, generation={"size": "57x56"}))
