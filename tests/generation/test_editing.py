"""Edits, inpainting, variations: what is kept is kept exactly, seeds decide, the batch does not, cancelling is clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageDraw

from nextflow_ar.generation.engine import Engine, ImageRequest, Rounds
from nextflow_ar.generation.forcing import Forced, Forcing, first_scales, kept_cells
from nextflow_ar.generation.pipeline import NextFlowPipeline, RequestError, fold_seed
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.types import Codes, Event, ImageReady, ScaleReady, Text
from tests.conftest import tiny_bundle

HOT = SamplingSettings(guidance=2.0, temperature=8.0)


@pytest.fixture(scope="module")
def pipeline() -> NextFlowPipeline:
    bundle = tiny_bundle()
    bundle.generation["canvases"] = ["24x64"]  # tall pictures, on five scales as well
    return NextFlowPipeline(bundle)


def picture(width: int = 40, height: int = 40, seed: int = 0) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return PILImage.fromarray(pixels).resize((width, height), PILImage.Resampling.BICUBIC)


def masked(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


def arrays(pictures: Sequence[PILImage.Image]) -> list[np.ndarray]:
    return [np.asarray(one) for one in pictures]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((40, 40), (3, 5, 17, 21)),  # off the grid of the codes
        ((40, 40), (0, 0, 8, 8)),
        ((40, 40), (0, 0, 40, 32)),  # most of the picture: not even its tone is kept
        ((24, 64), (30, 0, 50, 24)),
    ],
)
def test_what_is_not_masked_is_the_tokenizers_own_reconstruction(
    size: tuple[int, int], box: tuple[int, int, int, int], pipeline: NextFlowPipeline
) -> None:
    given, mask = picture(*size), masked(*size, box)
    own = np.asarray(pipeline.reconstruct(given))
    assert own.shape == (size[1], size[0], 3)
    for found in arrays(pipeline.inpaint(given, mask, "two dogs", n=3, seed=4, settings=HOT)):
        assert np.array_equal(found[~mask], own[~mask])
        assert (found[mask] != own[mask]).mean() > 0.5
    # Without that care it would not be: the decoder's pixels depend on cells that were drawn anew.
    request = pipeline.inpaint_requests(given, mask, "two dogs", [4], HOT)[0]
    codes = next(e.codes for e in pipeline.engine.images([request]) if isinstance(e, ImageReady))
    assert not np.array_equal(np.asarray(pipeline.decode(codes))[~mask], own[~mask])


def test_which_cells_stay() -> None:
    schedule = ScaleSchedule.square(4)
    mask = masked(32, 32, (0, 0, 9, 8))  # a pixel into the second row of the last grid
    keep = kept_cells(mask, schedule)
    expected = [[1], [0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]]
    for k, cells in enumerate(expected):
        assert keep[schedule.offsets[k] : schedule.offsets[k + 1]].int().tolist() == cells
    last = torch.ones(4, 4, dtype=torch.bool)
    last[:2, 0] = False
    assert torch.equal(keep[schedule.offsets[3] :].view(4, 4), last)
    assert not kept_cells(masked(32, 32, (0, 0, 24, 32)), schedule)[0]  # three quarters: a tone of its own
    assert not kept_cells(np.ones((32, 32), bool), schedule).any()


def test_kept_cells_answer_what_is_drawn_around_them() -> None:
    tokenizer = ImageTokenizer.from_pretrained(
        "nano"
    )  # a trained codebook comes near to what it is asked for
    shown = [PILImage.new("RGB", (64, 64), colour) for colour in ("#2d5fd2", "#fad732")]
    for one, colour in zip(shown, ("#dc2828", "#32a046"), strict=True):
        ImageDraw.Draw(one).ellipse((8, 30, 32, 54), fill=colour)
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in shown]))
    schedule = tokenizer.schedule_for(64, 64)
    features = tokenizer.embed(to_unit(pixels[:1]))[0]
    codes = Codes.plain(schedule, tokenizer.encode_bytes(pixels[:1]).target[0])
    drawn = tokenizer.encode_bytes(pixels[1:]).target[0]  # what is drawn in the mask is of another picture

    def chosen(keep: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        forcing = Forcing(Forced(codes, keep, features), tokenizer.quantizer)
        at = schedule.offsets
        return torch.cat([forcing.choose(k, drawn[at[k] : at[k + 1]]) for k in range(len(schedule))])

    everything = torch.ones(schedule.num_tokens, dtype=torch.bool)
    assert torch.equal(chosen(everything, features), codes.target)  # as the tokenizer chose, bit for bit
    assert torch.equal(chosen(~everything, features), drawn)
    keep = kept_cells(masked(64, 64, (0, 0, 40, 64)), schedule)
    assert not keep[0]
    repeated, answered = chosen(keep, None), chosen(keep, features)
    assert torch.equal(repeated[keep], codes.target[keep]) and torch.equal(repeated[~keep], drawn[~keep])
    assert not torch.equal(answered[keep], codes.target[keep]) and torch.equal(answered[~keep], drawn[~keep])
    stays = keep[schedule.offsets[-2] :].view(schedule.final)

    def error(found: torch.Tensor) -> float:
        summed = tokenizer.quantizer.accumulate(found[None], schedule)[0]
        return float((summed - features).square().sum(0)[stays].mean())

    # Old codes under new coarse ones miss the old picture; codes that answer come near.
    assert error(codes.target) < error(answered) < 0.3 * error(repeated)


def test_masks_of_every_kind_mean_the_same(pipeline: NextFlowPipeline) -> None:
    given, mask = picture(), masked(40, 40, (0, 0, 16, 16))
    grey = PILImage.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    clear = PILImage.fromarray(
        np.dstack([np.zeros((40, 40, 3), np.uint8), np.where(mask, 0, 255).astype(np.uint8)])
    )
    found = [
        pipeline.inpaint(given, one, "a cat", seed=2, settings=HOT)[0]
        for one in (mask, grey, grey.convert("1"), np.dstack([np.asarray(grey)] * 3), clear)
    ]
    assert all(np.array_equal(one, found[0]) for one in found)
    larger = pipeline.inpaint(given.resize((80, 80)), grey.resize((80, 80)), "a cat", settings=HOT)[0]
    assert larger.size == (40, 40)


def test_a_mask_lies_over_the_picture_as_it_is_seen(pipeline: NextFlowPipeline) -> None:
    """A phone's picture lies on its side in the file; so may the mask that was painted over it."""
    upright, mask = picture(24, 64), PILImage.fromarray(masked(24, 64, (30, 0, 50, 24)))

    def lying(one: PILImage.Image) -> PILImage.Image:
        turned = one.transpose(PILImage.Transpose.ROTATE_90)
        turned.getexif()[0x0112] = 6
        return turned

    wanted = pipeline.inpaint(upright, mask, "a cat", seed=2, settings=HOT)[0]
    for given, over in ((lying(upright), mask), (lying(upright), lying(mask)), (upright, lying(mask))):
        assert np.array_equal(pipeline.inpaint(given, over, "a cat", seed=2, settings=HOT)[0], wanted)


def test_a_mask_is_fitted_as_its_picture_is(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 24 x 24 on 40 x 40: enlarged, or in the middle with its border repeated."""
    for fit, first in (("crop", 27), ("pad", 24)):
        monkeypatch.setattr(pipeline, "fitting", fit)
        redrawn = pipeline.keeping(picture(24, 24), masked(24, 24, (0, 16, 24, 24))).redrawn
        assert redrawn is not None and redrawn[:, first:].all() and not redrawn[:, :first].any()


def test_bad_masks_and_scales_are_one_line(pipeline: NextFlowPipeline) -> None:
    with pytest.raises(RequestError, match="the mask is 20x40 pixels, the picture 40x40"):
        pipeline.inpaint(picture(), np.ones((40, 20), bool))
    with pytest.raises(RequestError, match="the mask marks nothing"):
        pipeline.inpaint(picture(), np.zeros((40, 40), bool))
    with pytest.raises(RequestError, match="a mask is"):
        pipeline.inpaint(picture(), np.zeros((40, 40, 2), np.float32))
    for scale in (0, 6):
        with pytest.raises(RequestError, match=f"from-scale is 1 to 5 for this picture, got {scale}"):
            pipeline.variations(picture(), from_scale=scale)
    with pytest.raises(RequestError, match="the instruction is empty"):
        pipeline.edit(picture(), " ")
    with pytest.raises(RequestError, match="no picture"):
        pipeline.edit([], "make it green")
    codes = pipeline.encode(picture())
    with pytest.raises(ValueError, match="forced codes are of the schedule"):
        ImageRequest(
            pipeline.manner.unconditional, ScaleSchedule.square(4), 0, HOT, forced=first_scales(codes, 2)
        )
    with pytest.raises(ValueError, match="keep has shape"):
        Forced(codes, torch.ones(3, dtype=torch.bool))
    bundle = tiny_bundle()
    bundle.generation["canvases"] = ["33x40"]
    with pytest.raises(StorageError, match="'33x40' is no size of this image tokenizer"):
        NextFlowPipeline(bundle)


def test_variations_keep_the_first_scales(pipeline: NextFlowPipeline) -> None:
    codes = pipeline.encode(picture())
    at = codes.schedule.offsets
    for first in (1, 3, 5):
        found: dict[int, Codes] = {}

        def hear(event: Event, found: dict[int, Codes] = found) -> None:
            if isinstance(event, ImageReady):
                found[event.row] = event.codes

        pictures = pipeline.variations(picture(), from_scale=first, n=3, seed=7, settings=HOT, on_event=hear)
        drawn = [found[i].target for i in range(3)]
        assert all(torch.equal(one[: at[first - 1]], codes.target[: at[first - 1]]) for one in drawn)
        assert len({tuple(one[at[first - 1] :].tolist()) for one in drawn}) == 3
        assert all(np.array_equal(p, pipeline.decode(found[i])) for i, p in enumerate(pictures))
    anew = pipeline.variations(picture(), from_scale=1, prompt="two dogs", seed=7, settings=HOT)[0]
    assert np.array_equal(anew, pipeline.generate("two dogs", seed=7, settings=HOT)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_seeds_decide_and_the_batch_does_not(dtype: torch.dtype) -> None:
    bundle = tiny_bundle()
    bundle.model.to(dtype)
    pipeline = NextFlowPipeline(bundle)
    seeds = [fold_seed(3, j) for j in range(3)]
    mask = masked(40, 40, (0, 8, 24, 40))
    requests = [
        *pipeline.inpaint_requests(picture(), mask, "two dogs", seeds, HOT),
        *pipeline.requests(["a cat", "two dogs"], [5, 6], HOT),
        *pipeline.variation_requests(picture(seed=1), 3, "", seeds[:2], HOT),
        *pipeline.edit_requests(picture(), "make it green", seeds[:2], HOT),
    ]
    together = arrays(pipeline.draw(requests))
    assert len({one.tobytes() for one in together}) == len(requests)
    for i, request in enumerate(requests):
        assert np.array_equal(pipeline.draw([request])[0], together[i])
    calls = pipeline.inpaint(picture(), mask, "two dogs", n=3, seed=3, settings=HOT)
    assert all(np.array_equal(a, b) for a, b in zip(calls, together[:3], strict=True))
    edits = pipeline.edit(picture(), "make it green", n=2, seed=3, settings=HOT)
    assert all(np.array_equal(a, b) for a, b in zip(edits, together[-2:], strict=True))


def test_cancelling_in_the_middle_leaves_the_others_alone(pipeline: NextFlowPipeline) -> None:
    mask = masked(40, 40, (0, 0, 16, 16))
    requests = pipeline.inpaint_requests(picture(), mask, "two dogs", [1, 2, 3], HOT)
    alone = [pipeline.draw([request])[0] for request in requests]
    rounds = Rounds(Engine(pipeline.bundle))
    for i, request in enumerate(requests):
        rounds.submit(i, request)
    for _ in range(2):
        assert [e.scale for e in rounds.step() if isinstance(e, ScaleReady)]
    assert rounds.cancel(1)
    found = {}
    while rounds.busy:
        found |= {e.row: e.codes for e in rounds.step() if isinstance(e, ImageReady)}
    assert sorted(found) == [0, 2]
    assert all(np.array_equal(pipeline.finished(requests[i], found[i]), alone[i]) for i in found)
    again = pipeline.draw(requests)  # a stopped request leaves nothing behind
    assert all(np.array_equal(a, b) for a, b in zip(again, alone, strict=True))


def test_without_words_there_is_no_guidance(pipeline: NextFlowPipeline) -> None:
    mask = masked(40, 40, (0, 0, 16, 16))
    bare = pipeline.inpaint_requests(picture(), mask, " ", [1], HOT)[0]
    assert not bare.settings.guided and bare.settings.temperature == 8.0
    guided = replace(bare, settings=HOT)  # both rows see the same: it would change nothing
    assert np.array_equal(pipeline.draw([bare])[0], pipeline.draw([guided])[0])


def test_edits_have_the_pictures_size_and_may_think(bundle: Bundle) -> None:
    long = NextFlowPipeline(tiny_bundle(replace(bundle.model.config, max_positions=1024)))
    long.canvases = [ScaleSchedule.nearest(64, 24, 5)]
    assert long.edit(picture(24, 64), "make it green", settings=HOT)[0].size == (24, 64)
    assert long.edit(picture(24, 63), "make it green", settings=HOT)[0].size == (24, 64)
    assert long.edit([picture(24, 64), picture()], "make it green", settings=HOT)[0].size == (40, 40)
    requests = long.edit_requests(picture(), "make it green", [1], HOT)
    thought = long.think(requests)[0].document.segments
    assert len(thought) == 3 and isinstance(thought[-1], Text) and thought[-1].supervised and thought[-1].text
    bare = long.edit(picture(), "make it green", seed=1, settings=HOT)[0]
    assert not np.array_equal(
        bare, long.edit(picture(), "make it green", seed=1, settings=HOT, think=True)[0]
    )
    long.thinks_edits = True  # as generation.json may say
    planned = long.edit(picture(), "make it green", seed=1, settings=HOT)[0]
    assert not np.array_equal(bare, planned)
    assert np.array_equal(bare, long.edit(picture(), "make it green", seed=1, settings=HOT, think=False)[0])
    long.bundle.generation["thought_temperature"] = 0.0
    cold = NextFlowPipeline(long.bundle)
    cold.canvases = long.canvases
    plans = [
        part.text
        for seed in (1, 2)
        for request in cold.think(cold.edit_requests(picture(), "make it green", [seed], HOT))
        if isinstance(part := request.document.segments[-1], Text)
    ]
    assert len(plans) == 2 and plans[0] == plans[1]
    by_example = long.edit(picture(), "", examples=[(picture(seed=1), picture(seed=2))], settings=HOT)
    assert by_example[0].size == (40, 40)
