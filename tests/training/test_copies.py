"""Copies: what an edit leaves alone keeps its codes in training, and the model is told, cell by cell, which would copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nextflow_ar.config import ConfigError, to_dict
from nextflow_ar.generation.engine import Engine, ImageRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle, load_bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import ImageGroup, collate, pack
from nextflow_ar.sequence.layout import LayoutOptions, build, image_prefix, reference_of
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.quantizer import kept_features
from nextflow_ar.training.episode_feed import Filler, gathered, merged, waves
from nextflow_ar.training.episode_sources import Pictures, Place
from nextflow_ar.training.trainable import begin_with
from nextflow_ar.types import Codes, Document, Image, ImageReady, Text
from tests.conftest import TINY_MODEL, tiny_bundle, tiny_image_tokenizer
from tests.training.test_episode_sources import MODEL, source, trainer
from tests.training.test_episode_sources import folder as folder  # a fixture

SQUARE, WIDE = ScaleSchedule.square(5), ScaleSchedule.from_final((40, 100), 5)
COPYING = replace(MODEL, copies=True)


def codes(seed: int, schedule: ScaleSchedule = SQUARE) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))


def test_the_quantiser_says_which_codes_would_copy() -> None:
    """A picture that has taken the other's codes so far would take its next ones; one that went astray is brought back."""
    quantizer, old, new = tiny_image_tokenizer().quantizer, codes(1).target[None], codes(2).target[None]
    last = SQUARE.sizes[-1]
    found = quantizer.copied(old, old, SQUARE, 4, 5)
    assert torch.equal(found, old[:, -last:])
    whole = quantizer.copied(old, new, SQUARE, 0, 5)
    for k in range(5):
        part = whole[:, SQUARE.offsets[k] : SQUARE.offsets[k + 1]]
        assert torch.equal(quantizer.copied(old, new[:, : SQUARE.offsets[k]], SQUARE, k, k + 1), part)
    astray = torch.cat([new[:, :-last], whole[:, -last:]], 1)
    away = [
        (quantizer.accumulate(c, SQUARE) - quantizer.accumulate(old, SQUARE)).square().mean()
        for c in (new, astray)
    ]
    assert away[1] < 0.7 * away[0]


def test_only_drawn_pictures_behind_one_of_their_size_copy(bundle: Bundle) -> None:
    vocab = bundle.vocab
    one, two, wide = codes(1), codes(2), codes(3, WIDE)
    story = (
        Image(one),
        Text("now green"),
        Image(two, True),
        Text("and wide", True),
        Image(wide, True),
        Image(one, True),
    )
    on, off = LayoutOptions(12.0, copies=True), LayoutOptions(12.0)
    found = [span.reference for span in build(Document(story), vocab, on).images]
    assert found[0] is None and found[2] is None and found[3] is None
    assert found[1] is not None and torch.equal(found[1], one.input)
    assert all(span.reference is None for span in build(Document(story), vocab, off).images)
    assert torch.equal(reference_of(Document(story[:3]), SQUARE), two.input)  # type: ignore[arg-type]
    assert reference_of(Document(story[:5]), SQUARE) is None and reference_of(Document(()), SQUARE) is None
    prefix = image_prefix(Document(story[:4]), SQUARE, vocab, on)
    assert prefix.images[1].reference is not None and len(prefix.images) == 2


def test_packed_rows_keep_their_references() -> None:
    found = tiny_bundle(replace(TINY_MODEL, copies=True))
    documents = [
        Document((Image(codes(i)), Text("make it green"), Image(codes(i + 5), True))) for i in range(2)
    ] + [Document((Text("two dogs"), Image(codes(4), True)))]
    alone = [build(d, found.vocab, found.layout) for d in documents]
    batch = collate([pack(alone[:2]), alone[2]])
    assert [g.reference is not None for g in batch.images].count(True) == 1
    hidden = found.model.hidden(batch)
    start = 0
    for sample, row in ((alone[0], 0), (alone[1], 0), (alone[2], 1)):
        start = 0 if row else start
        single = found.model.hidden(collate([sample]))[0]
        torch.testing.assert_close(hidden[row, start : start + len(sample)], single, atol=1e-4, rtol=1e-4)
        start += len(sample)
    plain = build(documents[0], found.vocab, replace(found.layout, copies=False))
    assert not torch.allclose(
        found.model.hidden(collate([plain])), found.model.hidden(collate(alone[:1])), atol=1e-2
    )
    whole, part = batch.images, batch.part(0, 2).images
    assert sum(g.reference is not None for g in part) == 1 and len(part) < len(whole)


def of_copies(model: NextFlowModel) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".copy_" in name]


def silence(model: NextFlowModel, *, but: str = "none") -> None:
    for name, parameter in model.named_parameters():
        if ".copy_" in name and but not in name:
            parameter.data.zero_()


def test_it_is_told_and_may_point() -> None:
    """Each of the two ways changes the scores; a gate that is open wide chooses the code that copies."""
    document = Document((Image(codes(1)), Text("make it green"), Image(codes(2), True)))

    def scores(model: NextFlowModel) -> torch.Tensor:
        span = sample.images[-1]
        return model.logits(model.hidden(collate([sample])))[0, span.boi + 1 : span.boi + SQUARE.num_tokens]

    found = tiny_bundle(replace(TINY_MODEL, copies=True))
    sample = build(document, found.vocab, found.layout)
    both = scores(found.model)
    silence(found.model, but="connector")
    told = scores(found.model)
    silence(found.model)
    neither = scores(found.model)
    assert not torch.allclose(both, told, atol=0.1) and not torch.allclose(told, neither, atol=0.1)
    found.model.scale_inputs.copy_gate.bias.data.fill_(200.0)  # type: ignore[union-attr]
    copied = found.model.scale_inputs.copied(codes(1).target[None], codes(2).target[None], SQUARE, 1, 5)[0]
    shift = scores(found.model) - neither
    first = TINY_MODEL.text_vocab
    rise = shift[:, first:].gather(1, copied[:, None])[:, 0]
    torch.testing.assert_close(rise, torch.full_like(rise, 200.0), atol=0.1, rtol=1e-3)
    assert (shift[:, first:].argmax(1) == copied).float().mean() > 0.5  # a longer row may gain more


def test_an_edit_is_drawn_with_its_source_in_sight_whatever_the_batch() -> None:
    found = tiny_bundle(replace(TINY_MODEL, copies=True))
    settings = SamplingSettings(guidance=2.0)
    asked = [
        ImageRequest(Document((Image(codes(1)), Text("make it green"))), SQUARE, 5, settings),
        ImageRequest(Document((Text("two dogs"),)), SQUARE, 6, settings),
        ImageRequest(Document((Image(codes(2)), Text("make it green"))), SQUARE, 7, settings),
    ]

    def drawn(engine: Engine, requests: list[ImageRequest]) -> list[torch.Tensor]:
        events = [e for e in engine.images(requests) if isinstance(e, ImageReady)]
        return [e.codes.target for e in sorted(events, key=lambda e: e.row)]

    together = drawn(Engine(found), asked)
    for request, codes_ in zip(asked, together, strict=True):
        assert torch.equal(drawn(Engine(found), [request])[0], codes_)
    silence(found.model)
    without = drawn(Engine(found), asked)
    assert torch.equal(without[1], together[1])
    assert not torch.equal(without[0], together[0]) and not torch.equal(without[2], together[2])


def test_what_a_change_leaves_alone_is_the_original_itself() -> None:
    found = NextFlowPipeline(tiny_bundle(replace(TINY_MODEL, copies=True)))
    size = found.schedule_for().image_size(found.image_tokenizer.config.downsample)
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    (request,) = found.edit_requests(picture, "make it green", [1])
    assert request.original is not None and np.array_equal(request.original, picture)
    before = found.encode(picture)
    assert np.array_equal(np.asarray(found.finished(request, before)), picture)  # nothing changed
    last = before.schedule.sizes[-1]
    cell, grid = found.image_tokenizer.config.downsample, before.schedule.final
    target = before.target.clone()
    far = found.image_tokenizer.quantizer.distances(found.image_tokenizer.quantizer.lookup(target[-1:]))[
        0
    ].argmax()
    target[-1] = far  # the last cell: below right
    changed = np.asarray(found.finished(request, Codes.plain(before.schedule, target)))
    assert np.array_equal(changed[: size[0] // 2, : size[1] // 2], picture[: size[0] // 2, : size[1] // 2])
    drawn = np.asarray(found.decode(Codes.plain(before.schedule, target)))
    corner = (slice((grid[0] - 1) * cell + cell // 2, None), slice((grid[1] - 1) * cell + cell // 2, None))
    assert np.array_equal(changed[corner], drawn[corner]) and last == grid[0] * grid[1]
    (codes_only,) = found.edit_requests(before, "make it green", [1])
    assert codes_only.original is None
    (plain,) = NextFlowPipeline(tiny_bundle()).edit_requests(picture, "make it green", [1])
    assert plain.original is None
    with pytest.raises(ValueError, match="the picture before"):
        replace(request, document=Document((Text("two dogs"),)))


def test_features_stay_where_nothing_changed_nearby() -> None:
    new, old = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    same = torch.ones(1, 64, 64, dtype=torch.bool)
    same[0, 20, 20] = False  # in cell (2, 2)
    mixed = kept_features(new, old, same)[0, 0]
    assert mixed.sum() == 9 and mixed[1:4, 1:4].all()
    assert kept_features(new, old, same, border=0).sum() == 3


def test_waves_and_gathered_pictures() -> None:
    assert [w.tolist() for w in waves(np.array([-1, 0, -1, 1, 2]))] == [[0, 2], [1, 4], [3]]
    assert list(waves(np.array([], dtype=int))) == []
    with pytest.raises(ValueError, match="its own reference"):
        list(waves(np.array([-1, 2, 1])))
    with pytest.raises(ValueError, match="a reference, or -1"):
        Pictures(SQUARE, np.zeros((2, 8, 8, 3), np.uint8), 1, np.array([-1]))
    first = Pictures(SQUARE, np.full((3, 1, 1, 3), 1, np.uint8), 1, np.array([-1, 0, 1]))
    second = Pictures(SQUARE, np.full((3, 1, 1, 3), 2, np.uint8), 2, np.array([-1, -1, 1]))
    both = gathered([first, second])
    assert both.given == 3 and both.pixels[:, 0, 0, 0].tolist() == [1, 2, 2, 1, 1, 2]
    assert both.references.tolist() == [-1, -1, -1, 0, 3, 2]


def test_what_did_not_change_keeps_its_codes(folder: Path) -> None:
    """A drawn picture equal to the one before it is that one again; one that changed in a corner is it elsewhere."""
    tokenizer = ImageTokenizer.from_pretrained(folder)
    filler, schedule = Filler(tokenizer, 10), ScaleSchedule.square(8)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8).repeat(3, 0)
    pixels[2, :8, :8] = 0
    target, fed = filler._encoded(Pictures(schedule, pixels, 1, np.array([-1, 0, 1])), None, None)
    sums = tokenizer.quantizer.accumulate(fed, schedule)
    size = sums[0].square().mean()
    assert (sums[1] - sums[0]).square().mean() < 0.3 * size  # 24 codes; two pictures differ by twice the size
    copies = tokenizer.quantizer.copied(fed[:1], fed[1:2], schedule, 0, 8)
    assert torch.equal(copies, target[1:2])  # so "copy" is right at every place
    copies = tokenizer.quantizer.copied(fed[1:2], fed[2:], schedule, 7, 8).view(8, 8)
    right = copies == target[2, -64:].view(8, 8)
    assert right[2:, 2:].all() and not right[:2, :2].all()


def placed(group: ImageGroup) -> dict[tuple[int, int], torch.Tensor]:
    """Row and first place of every image of a group -> what it could copy."""
    if group.reference is None:
        return {}
    places = zip(group.rows.tolist(), group.starts.tolist(), strict=True)
    return dict(zip(places, group.reference, strict=True))


def test_the_feed_finds_what_would_copy(folder: Path, tmp_path: Path) -> None:
    """What a batch brings along is what the model would find itself, at every number of scales that is laid out."""
    packing = {"mode": "length", "budget": 1600, "open_rows": 2}
    sources = [
        source(seed=6, tasks={"edit_move": 1.0}, rows=4, packing=packing, scales=5),
        source(seed=7, tasks={"edit_colour": 1.0, "story": 1.0}, rows=4, packing=packing),
    ]
    found = trainer(tmp_path / "one", folder, sources, model=to_dict(COPYING))
    drafts = [one.drafts(0, Place())[0] for one in found.episodes.sources.values()]
    (batch,) = found.episodes.filler.filled([merged(drafts)], None, None)
    bare = replace(batch, images=tuple(replace(group, copied=None) for group in batch.images))
    known = [group.copied for group in batch.images if group.reference is not None]
    assert {group.scales for group in batch.images if group.reference is not None} >= {5, 8}
    assert all(codes is not None and (codes >= 0).all() for codes in known)
    with torch.no_grad():
        told, asked = found.model.copies(batch), found.model.copies(bare)
    assert torch.equal(told.places, asked.places)  # type: ignore[arg-type]
    assert (told.codes == asked.codes).float().mean() > 0.99  # sums are rounded by the size of the batch


def test_training_feeds_and_learns_them(folder: Path, tmp_path: Path) -> None:
    """Joined drafts are those alone, references included; the connector of copies learns; a start without is kept."""
    packing = {"mode": "length", "budget": 1600, "open_rows": 2}
    sources = [
        source(seed=4, tasks={"edit_move": 1.0, "story": 1.0}, rows=4, packing=packing),
        source(seed=5, tasks={"edit_colour": 1.0}, rows=2, packing=packing),
    ]
    found = trainer(tmp_path / "one", folder, sources, model=to_dict(COPYING))
    drafts = [one.drafts(0, Place())[0] for one in found.episodes.sources.values()]
    alone = found.episodes.filler.filled(drafts, None, None)
    (both,) = found.episodes.filler.filled([merged(drafts)], None, None)
    rows = drafts[0].batch.shape[0]
    together = {place: x for group in both.images for place, x in placed(group).items()}
    for one, start in zip(alone, (0, rows), strict=True):
        mine = {(row + start, at): x for g in one.images for (row, at), x in placed(g).items()}
        assert mine
        for place, x in mine.items():
            assert (x == together[place]).float().mean() > 0.9  # bf16 rounds by the size of the batch
    assert not any(p.any() for p in of_copies(found.model))
    for _ in range(2):
        assert np.isfinite(found.advance(told=True)["loss"])
    assert all(p.any() for p in of_copies(found.model))
    plain = trainer(tmp_path / "two", folder, sources)
    plain.advance()
    start = plain.export(tmp_path / "start", "")
    more = trainer(
        tmp_path / "three", folder, sources, model=to_dict(COPYING), start=str(start), text_entries=400
    )
    old = load_bundle(start).model
    with pytest.raises(ConfigError, match="set copies: true"):
        begin_with(old, more.model)
    assert len(of_copies(more.model)) == 3 and not any(p.any() for p in of_copies(more.model))
    for name, value in old.state_dict().items():
        assert torch.equal(more.model.state_dict()[name], value), name
    again = load_bundle(more.export(tmp_path / "copying", ""))
    assert again.layout.copies and again.model.config.copies


def test_without_the_tokenizer_it_says_so() -> None:
    found = tiny_bundle(replace(TINY_MODEL, copies=True))
    found.model.scale_inputs._quantizer = ()
    sample = build(Document((Image(codes(1)), Image(codes(2), True))), found.vocab, found.layout)
    with pytest.raises(RuntimeError, match="quantiser first"):
        found.model.hidden(collate([sample]))
