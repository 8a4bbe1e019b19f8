"""The pipeline: pictures out, captions out, seeds, sizes, names of models, saved defaults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.pipeline import NextFlowPipeline, RequestError, fold_seed, resolve_model
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.types import ImageReady, ScaleReady

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
