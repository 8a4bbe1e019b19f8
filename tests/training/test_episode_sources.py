"""The wide world's tasks in training: every task's losses, exact resume, what is corrected, prefetch, recipes, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nextflow_ar.config import ConfigError, from_dict, to_dict
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.playground.canvases import two_ways
from nextflow_ar.data.playground.curriculum import GROUPED, TASK_NAMES, by_task, episode
from nextflow_ar.data.playground.episodes import Episode
from nextflow_ar.precision import mixed_precision
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, ImageGroup, collate, joined, pack
from nextflow_ar.sequence.layout import IGNORED, TEXT_SCALE, build
from nextflow_ar.tokenizer.correction import chances, corrected_codes
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.episode_feed import EpisodeFeed, Filler
from nextflow_ar.training.episode_sources import Draft, EpisodeBatches, Place
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer
from nextflow_ar.training.prefetch import Ahead
from nextflow_ar.training.recipe import CorrectionConfig
from nextflow_ar.types import Codes
from tests.conftest import TINY_MODEL, TINY_SEMANTIC, TINY_TOKENIZER, tiny_image_tokenizer

EIGHT = replace(TINY_TOKENIZER, num_scales=8, semantic=replace(TINY_SEMANTIC, position_grid=8))
MODEL = replace(
    TINY_MODEL, text_vocab=400, max_positions=2048, closing_input="accumulated", context_images="closing"
)
OPTIMIZER = {
    "lr": 5e-3, "muon_lr": 1e-2, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.98, "warmup": 3,
    "schedule": "constant", "decay": 0.3, "final": 0.1, "clip": 1.0,
}  # fmt: skip
CORRECTED = {"share": 0.5, "top_k": 4, "temperature": 1.0, "start": 0, "ramp": 1}
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer") / "final"
    state, larger = tiny_image_tokenizer().state_dict(), ImageTokenizer(EIGHT)
    fresh = larger.state_dict()
    larger.load_state_dict(
        {k: state[k] if k in state and state[k].shape == v.shape else v for k, v in fresh.items()}
    )
    larger.save_pretrained(found)
    return found


def source(**changes: Any) -> dict[str, Any]:
    values = {
        "kind": "episodes", "rows": 3, "seed": 4, "tasks": {"caption": 1.0, "edit_move": 1.0, "chat": 1.0},
        "canvases": {"64x64": 1.0, "80x48": 1.0}, "packing": {"mode": "length", "budget": 900, "open_rows": 2},
    }  # fmt: skip
    return values | changes


def trainer(out: Path, folder: Path, sources: list[dict[str, Any]], **changes: Any) -> ModelTrainer:
    values = {
        "kind": "model", "out": str(out), "seed": 1, "image_tokenizer": str(folder), "text_entries": 400,
        "start": None, "steps": 40, "alpha": 0.9, "text_weight": 4.0, "ema": 0.9, "compile": False,
        "sheet_seconds": 1e9, "save_seconds": 1e9, "optimizer": OPTIMIZER, "correction": CORRECTED,
        "sources": sources, "model": to_dict(MODEL),
    }  # fmt: skip
    recipe = from_dict(ModelRecipe, values | changes)
    return ModelTrainer(recipe, to_dict(recipe))


def same_batches(one: ModelTrainer, two: ModelTrainer) -> None:
    a, b = one.batch(0), two.batch(0)
    for name in ("tokens", "targets", "weights", "positions", "blocks", "scales", "documents"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(a.images, b.images, strict=True):
        assert torch.equal(x.codes, y.codes) and torch.equal(x.starts, y.starts)


def test_a_step_over_several_tasks_tells_the_loss_of_each(folder: Path, tmp_path: Path) -> None:
    tasks = {"draw_scene": 1.0, "caption_full": 1.0, "edit_colour": 1.0, "riddle": 1.0, "plain": 1.0}
    training = trainer(tmp_path / "run", folder, [source(tasks=tasks, rows=5)])
    told = [training.advance() for _ in range(6)]
    assert {f"{t}_loss" for t in tasks} | {f"{t}_right" for t in tasks} <= set().union(*told)
    assert told[-1]["text"] < told[0]["text"]
    assert {"scale_1", "scale_8", "text"} <= set(told[0])
    assert training.documents > 6 * 5  # rows are shared
    corpus = (tmp_path / "run" / "text_tokenizer" / "tokenizer.json").read_text()
    assert "backgr" in corpus and "assistant" in corpus


@pytest.mark.parametrize("together", [False, True])
def test_a_resumed_run_meets_the_same_batches_and_ends_the_same(
    folder: Path, tmp_path: Path, together: bool
) -> None:
    sources = [source(dialogue=True), source(tasks={"ask": 1}, swap=0.5, seed=9)]
    whole = trainer(tmp_path / "a", folder, sources, together=together)
    told = [whole.advance() for _ in range(19)]  # beyond the steps that are packed together
    first = trainer(tmp_path / "b", folder, sources, together=together, prefetch=not together)
    assert [first.advance() for _ in range(17)] == told[:17]  # made ahead or in place is the same
    first.save()
    first.advance()  # lost
    second = trainer(tmp_path / "b", folder, sources, together=together)
    assert second.step == 17 and [second.advance() for _ in range(2)] == told[17:]
    same_batches(whole, second)
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    first.episodes.close()


def feed(folder: Path, tmp_path: Path, **changes: Any) -> EpisodeFeed:
    return trainer(tmp_path / "one", folder, [source(**changes)]).episodes


def made(found: EpisodeFeed, step: int, correction: SelfCorrection | None = None) -> tuple[Draft, Batch]:
    (draft,) = found.sources[0].drafts(step, Place())
    (batch,) = found.filler.filled([draft], correction)
    return draft, batch


def kinds(batch: Batch) -> dict[tuple[int, bool], ImageGroup]:
    return {(group.scales, group.closed): group for group in batch.images}


def test_a_draft_with_codes_is_what_the_documents_with_codes_are(folder: Path, tmp_path: Path) -> None:
    found = feed(folder, tmp_path, tasks={"edit_move": 1, "caption": 1, "chat": 1, "in_context": 1}, rows=5)
    one = found.sources[0]
    _, batch = made(found, 0)
    one._at = (-1, 0)
    tokenizer, rows = found.filler.tokenizer, []
    for numbers in one._numbers(0):
        samples = []
        for number in numbers:
            episode, _ = one._open.pop(number)
            codes = []
            for picture in episode.pictures:
                schedule = one.schedules[picture.canvas.size]
                with mixed_precision(torch.device("cpu")), torch.no_grad():
                    pixels = to_unit(torch.from_numpy(picture.render()[None]))
                    codes.append(Codes.plain(schedule, tokenizer.quantize(pixels, schedule).target[0]))
            samples.append(build(one.document(episode, codes), one.vocab, one.layout))
        rows.append(pack(samples))
    slow = collate(rows, batch.shape[1])
    for name in ("tokens", "weights", "positions", "blocks", "scales", "lengths", "documents"):
        assert torch.equal(getattr(batch, name), getattr(slow, name)), name
    assert torch.equal(batch.targets == IGNORED, slow.targets == IGNORED)
    # bf16 convolutions round by the size of the batch, so a few codes are their neighbours'
    assert float((batch.targets == slow.targets).float().mean()) > 0.9
    for x, y in zip(batch.images, slow.images, strict=True):
        assert (x.schedule, x.scales, x.closed) == (y.schedule, y.scales, y.closed)
        assert torch.equal(x.rows, y.rows) and torch.equal(x.starts, y.starts)
        assert float((x.codes == y.codes).float().mean()) > 0.6


def test_processes_and_joined_widths_give_the_same_data(folder: Path, tmp_path: Path) -> None:
    sources = [source(seed=4), source(seed=5, tasks={"draw": 1.0}, rows=2), source(
        seed=6, tasks={"story": 1.0}, rows=1, packing={"mode": "length", "budget": 1600, "open_rows": 2}
    )]  # fmt: skip
    alone = trainer(tmp_path / "a", folder, sources, correction=CORRECTED | {"share": 0.0}).episodes
    crew = trainer(
        tmp_path / "b", folder, sources, workers=2, together=True, correction=CORRECTED | {"share": 0.0}
    ).episodes
    for step in (0, 1, 9):  # 9: another group of steps than the first
        widths: dict[int, list[Batch]] = {}
        for number in range(3):
            for _, batch in alone.batches(number, step):
                widths.setdefault(batch.shape[1], []).append(batch)
        found = crew.together(step)
        assert [batch.shape[1] for _, batch in found] == [900, 1600] == list(widths)
        for draft, batch in found:
            one = joined(widths[batch.shape[1]])
            for name in ("tokens", "weights", "positions", "blocks", "scales", "documents"):
                assert torch.equal(getattr(batch, name), getattr(one, name)), name
            assert (
                float((batch.targets == one.targets).float().mean()) > 0.9
            )  # rounded by the size of the batch
            assert draft.seen == int((one.documents >= 0).sum())
            assert draft.weight == pytest.approx(float(one.weights.sum()))
            assert len(draft.tasks) == batch.shape[0]
    crew.close()


def test_an_error_in_a_process_is_one_line(folder: Path, tmp_path: Path) -> None:
    sources = [source(tasks={"video": 1.0}, packing={"mode": "pad", "budget": 60})]
    training = trainer(tmp_path / "a", folder, sources, workers=1)
    with pytest.raises(ConfigError, match=r"^2000 episodes one after the other \(video_draw, .*fit no row"):
        training.advance()


def test_words_alone_have_no_image(folder: Path, tmp_path: Path) -> None:
    found = feed(folder, tmp_path, tasks={"plain": 1.0}, packing={"mode": "pad", "budget": 400}, rows=12)
    draft, batch = made(found, 0)
    shown = {int(row) for group in batch.images for row in group.rows}
    silent = [row for row in range(12) if row not in shown]
    assert 5 <= len(silent) < 12  # every third asks for a picture
    for row in silent:
        assert draft.tasks[row] == ("plain",) and bool((batch.scales[row] == TEXT_SCALE).all())
        assert bool((batch.targets[row] != IGNORED).any())
    assert batch.shape[1] % 64 == 0


def test_given_pictures_are_neither_learnt_nor_corrected(folder: Path, tmp_path: Path) -> None:
    found = feed(folder, tmp_path, tasks={"edit": 1.0}, packing={"mode": "pad", "budget": 400}, rows=8)
    (draft,) = found.sources[0].drafts(3, Place())
    strong = SelfCorrection(1.0, 4, 1.0)
    (fed,) = found.filler.filled([draft], strong)
    (plain,) = found.filler.filled([draft], None)
    one, other = kinds(fed), kinds(plain)
    assert set(one) == {(0, True), (8, False)}  # a given one is its closing block alone
    assert torch.equal(one[0, True].codes, other[0, True].codes)
    assert not torch.equal(one[8, False].codes, other[8, False].codes)
    size = fed.shape[1]
    for group in fed.images:
        for row, start in zip(group.rows.tolist(), group.starts.tolist(), strict=True):
            if group.scales == 0:
                end = start + group.schedule.sizes[-1]
                assert bool((fed.targets[row, start - 1 : end] == IGNORED).all())
                assert float(fed.weights[row, start - 1 : end].sum()) == 0
            else:
                learnt = fed.targets[row, start - 1 : min(size, start - 1 + group.schedule.num_tokens)]
                assert bool((learnt >= 400).all())
    pictures = sum(len(group.rows) for group in fed.images if group.scales)
    assert pictures == 8 and all(tasks[0].startswith("edit_") for tasks in draft.tasks)


def test_canvases_prefixes_and_dropped_conditions(folder: Path, tmp_path: Path) -> None:
    found = feed(
        folder, tmp_path, tasks={"draw": 1.0}, rows=40, scales=5, condition_dropout=0.5,
        packing={"mode": "pad", "budget": 200},
    )  # fmt: skip
    _, batch = made(found, 0)
    counts = {group.schedule.final: len(group.rows) for group in batch.images}
    assert set(counts) == {(8, 8), (6, 10)} and 10 <= counts[8, 8] <= 30
    assert all((group.scales, group.closed) == (5, False) for group in batch.images)
    alone = [
        int(row) for g in batch.images for row, start in zip(g.rows, g.starts, strict=True) if start == 1
    ]
    assert 10 <= len(alone) <= 30
    offsets = {int(row): g.schedule.offsets[5] for g in batch.images for row in g.rows}
    assert all(int((batch.documents[row] >= 0).sum()) == offsets[row] for row in alone)


def test_a_share_of_what_is_drawn_is_laid_out_in_words(folder: Path, tmp_path: Path) -> None:
    one = feed(folder, tmp_path, tasks={"edit": 1.0, "planned": 1.0}, planned=0.5).sources[0]
    found = [one.episode(number) for number in range(200)]
    edits = [each for each in found if each.task != "planned"]
    with_plans = [each for each in edits if len(each.texts) > 1]
    assert 0.35 * len(edits) < len(with_plans) < 0.65 * len(edits)
    assert all(each.texts[-1].text.startswith("plan: ") for each in with_plans)
    assert all(len(each.texts) == 2 for each in found if each.task == "planned")  # its own plan is enough


def test_processes_share_the_rows(folder: Path, tmp_path: Path) -> None:
    one = feed(folder, tmp_path, rows=4).sources[0]
    (whole,) = one.drafts(5, Place())
    halves = [one.drafts(5, Place(process, 2))[0] for process in range(2)]
    quarter = one.drafts(5, Place(1, 2, 2))[1]
    for i in range(4):
        assert torch.equal(whole.batch.targets[i] == IGNORED, halves[i % 2].batch.targets[i // 2] == IGNORED)
        assert torch.equal(whole.batch.tokens[i], halves[i % 2].batch.tokens[i // 2])
    assert torch.equal(quarter.batch.tokens[0], whole.batch.tokens[3])


Row = tuple[list[int], list[int], list[list[int]]]
HALF = SelfCorrection(0.5, 4, 1.0)


def rows_of(parts: list[tuple[Draft, Batch]]) -> list[Row]:
    """Of every row what is fed and learnt in words and codes, and the input codes of its pictures in order."""
    found: list[Row] = []
    for _, batch in parts:
        images: dict[int, list[tuple[int, list[int]]]] = {}
        for group in batch.images:
            for row, start, codes in zip(group.rows.tolist(), group.starts, group.codes, strict=True):
                images.setdefault(row, []).append((int(start), codes.tolist()))
        for row in range(batch.shape[0]):
            on = batch.documents[row] >= 0
            codes = [each for _, each in sorted(images.get(row, []))]
            found.append((batch.tokens[row][on].tolist(), batch.targets[row][on].tolist(), codes))
    return found


@pytest.mark.parametrize(
    ("tasks", "swap", "packing"),
    [
        (
            {"draw": 1.0, "edit_move": 1.0, "story": 1.0},
            0.0,
            {"mode": "length", "budget": 1600, "open_rows": 2},
        ),
        (
            {"ask": 1.0, "caption": 1.0},
            0.5,
            {"mode": "pad", "budget": 400},
        ),  # rows of another width in each part
    ],
)
def test_processes_and_parts_see_together_what_one_would(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tasks: dict[str, float],
    swap: float,
    packing: dict[str, Any],
) -> None:
    """Words swapped and codes corrected at random included, wherever a row is and whatever is beside it."""
    one_by_one = Filler._features

    def features(self: Filler, pixels: np.ndarray) -> torch.Tensor:
        # bf16 convolutions round by the size of the batch, which is not what is looked at here
        return torch.cat([one_by_one(self, pixels[i : i + 1]) for i in range(len(pixels))])

    monkeypatch.setattr(Filler, "_features", features)
    changed = source(tasks=tasks, swap=swap, packing=packing, rows=4)
    training = trainer(tmp_path / "run", folder, [changed])

    def rows(step: int, place: Place, correction: SelfCorrection | None = HALF) -> list[Row]:
        drafting = replace(training.episodes.drafting, place=place)
        feed = EpisodeFeed(drafting, training.image_tokenizer, lambda _: correction, steps=40)
        return rows_of(feed.batches(0, step))

    for step in (0, 17):
        whole = rows(step, Place())
        halves = [rows(step, Place(process, 2)) for process in range(2)]
        assert [halves[i % 2][i // 2] for i in range(4)] == whole
        parts = rows(step, Place(0, 1, 2))
        assert [parts[(i % 2) * 2 + i // 2] for i in range(4)] == whole
        quarters = [rows(step, Place(process, 2, 2)) for process in range(2)]
        assert [quarters[i % 2][i // 2] for i in range(4)] == whole
        plain = rows(step, Place(), None)
        if swap:
            told = [(fed[1:], learnt[:-1]) for fed, learnt, _ in whole]
            assert any(
                a != b for fed, learnt in told for a, b in zip(fed, learnt, strict=True) if 0 < b < 400
            )
        else:
            assert all(a[2] != b[2] for a, b in zip(whole, plain, strict=True))  # every row draws
        assert len({str(row) for row in whole}) == 4


def test_codes_are_corrected_as_the_quantiser_does_it(folder: Path) -> None:
    """The same residual chain, the same share of cells, and of those the same share that is another code."""
    quantizer = ImageTokenizer.from_pretrained(folder).quantizer
    random = torch.Generator().manual_seed(0)
    schedule = ScaleSchedule.square(8)
    features = torch.randn(64, quantizer.config.dim, *schedule.final, generator=random) * 0.5
    seeds = torch.randint(2**62, (64,), generator=random)

    def ours(share: float, correction: SelfCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return corrected_codes(quantizer, features, schedule, correction, torch.full((64,), share), seeds)

    strong = SelfCorrection(0.6, 6, 1.0)
    plain = quantizer.quantize(features, schedule)
    for share, correction in ((0.0, strong), (1.0, SelfCorrection(1.0, 1, 1.0))):
        target, fed = ours(share, correction)
        assert torch.equal(target, plain.target) and torch.equal(fed, plain.input)
    theirs = quantizer.quantize(features, schedule, correction=strong, generator=random)
    target, fed = ours(0.6, strong)
    for k in range(2, 8):  # of the first scales there are few cells
        part = slice(schedule.offsets[k], schedule.offsets[k + 1])
        expected = float((theirs.target != theirs.input)[:, part].float().mean())
        assert float((target != fed)[:, part].float().mean()) == pytest.approx(expected, abs=0.08), k
    # the codes fed are what was subtracted: the next targets answer them
    first = slice(0, schedule.offsets[1])
    other = (target != fed)[:, first].any(1)
    assert 0 < int(other.sum()) < 64
    for k, changed in ((0, 0.0), (1, 0.01)):
        part = slice(schedule.offsets[k], schedule.offsets[k + 1])
        assert float((target != plain.target)[other][:, part].float().mean()) >= changed
    half = corrected_codes(quantizer, features[::2], schedule, strong, torch.full((32,), 0.6), seeds[::2])
    assert torch.equal(half[0], target[::2]) and torch.equal(half[1], fed[::2])


def test_random_numbers_of_a_seed_are_evenly_spread() -> None:
    seeds = torch.tensor([0, 1, -5, 2**62 + 7, -(2**63)])
    found = chances(seeds, 5000)
    assert torch.equal(found[1:3, :70], chances(seeds[1:3], 70))  # beside whatever others, however many
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # splitmix64 of seed 0
    assert found[0, :2].tolist() == [(number >> 40) / 2**24 for number in first]
    assert bool((found >= 0).all()) and bool((found < 1).all())
    assert (found.mean(1) - 0.5).abs().max() < 0.02 and (found.var(1) * 12 - 1).abs().max() < 0.05
    assert torch.corrcoef(found).triu(1).abs().max() < 0.06


def test_episodes_that_no_row_holds_are_counted_once(folder: Path, tmp_path: Path) -> None:
    """Whoever makes a step, and after a resume, too: a step packs those before it in its block once more."""
    packing = {"mode": "length", "budget": 300, "open_rows": 2}
    values = [source(tasks={"draw_scene": 1.0, "caption": 1.0, "chat": 1.0}, rows=2, packing=packing)]
    whole = trainer(tmp_path / "a", folder, values)

    def skipped(steps: range) -> dict[int, int]:
        one = whole.episodes.drafting.batches()[0]
        return {step: one.drafts(step, Place())[0].skipped for step in steps}

    in_order = skipped(range(20))
    assert sum(in_order.values()) > 3
    assert in_order == {k: v for worker in range(3) for k, v in skipped(range(worker, 20, 3)).items()}
    for _ in range(18):
        whole.advance(told=False)
    assert whole.episodes.skipped == sum(in_order[step] for step in range(18)) > 3
    whole.save()
    again = trainer(tmp_path / "a", folder, values)
    assert again.episodes.skipped == whole.episodes.skipped
    again.advance(told=False)
    assert again.episodes.skipped == sum(in_order[step] for step in range(19))
    state = torch.load(tmp_path / "a" / "checkpoint.pt")
    del state["skipped"]  # of an earlier version
    torch.save(state, tmp_path / "a" / "checkpoint.pt")
    assert trainer(tmp_path / "a", folder, values).episodes.skipped == 0


def test_packing_by_compute_and_what_fits_no_row(folder: Path, tmp_path: Path) -> None:
    one = feed(
        folder, tmp_path, tasks={"video_draw": 1.0, "caption": 1.0}, rows=2,
        packing={"mode": "compute", "budget": 0.001, "longest": 700, "open_rows": 2},
    ).sources[0]  # fmt: skip
    drafts = [one.drafts(step, Place())[0] for step in range(3)]
    assert sum(draft.skipped for draft in drafts) > 0 and max(d.batch.shape[1] for d in drafts) <= 704
    short = feed(folder, tmp_path / "short", tasks={"video": 1.0}, packing={"mode": "pad", "budget": 60})
    with pytest.raises(ConfigError, match=r"2000 episodes one after the other \(video_draw, .*fit no row"):
        short.batches(0, 0)


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"tasks": {"paint": 1.0}}, "unknown playground task 'paint': a group (draw, practice, caption, "),
        ({"tasks": {"draw": 0.0}}, "at least one task with a weight above 0"),
        ({"canvases": {"64": 1.0}}, "a canvas is its width and height in pixels such as 96x64"),
        ({"canvases": {}}, "at least one canvas"),
        ({"swap": 0.5}, "swap is for tasks that answer in words about a picture, not for edit_move"),
        ({"condition_dropout": 1.5}, "condition_dropout is a share from 0 to 1"),
        (
            {"planned": 0.5, "tasks": {"riddle": 1.0}},
            "planned is for tasks that draw or edit, not for riddle",
        ),
        ({"level": "hard"}, "level"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ConfigError) as caught:
            trainer(tmp_path / "run", folder, [source(**changes)])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for changes, message in (
        ({"canvases": {"60x64": 1.0}}, "canvas 60x64: no scale schedule covers"),
        ({"scales": 9}, "has 8 scales, not 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path / "run", folder, [source(**changes)])


def test_groups_spread_their_weight() -> None:
    found = by_task({"caption": 1.0, "caption_full": 0.25, "in_context": 2.0, "plain": 0.0})
    assert found == {"caption_short": 0.5, "caption_full": 0.75, "in_context": 2.0}
    assert set(by_task(dict.fromkeys(GROUPED, 1.0))) == set(TASK_NAMES)


def test_ahead_gives_every_step_once_and_tells_errors() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            raise ConfigError("step 3 cannot be made")
        return step * step

    ahead = Ahead(make, 6)
    assert [ahead.get(0), ahead.get(0), ahead.get(1), ahead.get(2)] == [0, 0, 1, 4]
    with pytest.raises(ConfigError, match="step 3"):
        ahead.get(3)
    assert ahead.get(5) == 25  # another step than the one that was waiting
    ahead.close()
    assert made[:4] == [0, 1, 2, 3] and max(made) == 5


STAGES = [
    p
    for p in sorted([*RECIPES.glob("world_*.yaml"), *RECIPES.glob("gpu_*.yaml")])
    if yaml.safe_load(p.read_text()).get("kind") == "model"
]


def test_a_plan_says_which_relation_was_asked_for(folder: Path, tmp_path: Path) -> None:
    """The playground shows relations that hold diagonally, too; what is taught to be drawn is told by the plan's places."""
    values = [source(tasks={"relation": 1.0}, planned=1.0)]
    (one,) = trainer(tmp_path / "run", folder, values).episodes.sources.values()
    canvases = [one.episode(number).pictures[0].canvas for number in range(60)]
    assert sum(two_ways(canvas) for canvas in canvases) <= 2
    assert sum(two_ways(episode("relation", n, 4).pictures[0].canvas) for n in range(60)) > 20
    assert {canvas.relation for canvas in canvases} == {"left of", "right of", "above", "below"}


def test_with_many_rows_for_each_open_one_a_step_is_packed_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that make steps in turn would pack the steps of a block again and again."""
    packing = {"mode": "length", "budget": 900, "open_rows": 1}
    asked: list[int] = []
    whole = EpisodeBatches.episode

    def counted(self: EpisodeBatches, number: int) -> Episode:
        asked.append(number)
        return whole(self, number)

    monkeypatch.setattr(EpisodeBatches, "episode", counted)
    for rows, alone in ((4, True), (3, False)):
        values = [source(tasks={"caption": 1.0}, rows=rows, packing=packing)]
        (one,) = trainer(tmp_path / str(rows), folder, values).episodes.sources.values()
        counts = []
        for step in (0, 15):
            asked.clear()
            one.drafts(step, Place())
            counts.append(len(asked))
        assert (counts[1] < 2 * counts[0]) == alone


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_recipes_are_whole(path: Path) -> None:
    recipe = from_dict(ModelRecipe, yaml.safe_load(path.read_text()), path.name)
    recipe.check()
    assert recipe.start is None or (RECIPES / f"{recipe.start.parent.name}.yaml").exists()
    assert all(isinstance(source, EpisodeSource) for source in recipe.sources)
    assert len({source.seed for source in recipe.sources}) == len(recipe.sources)  # type: ignore[union-attr]
    assert any(isinstance(source, EpisodeSource) and source.scales is None for source in recipe.sources)


def test_self_correction_grows_from_its_first_step() -> None:
    def shares(start: int, ramp: int) -> list[float]:
        config = CorrectionConfig(0.6, 4, 1.0, start, ramp)
        return [0.0 if (found := config.at(step)) is None else round(found.share, 6) for step in range(6)]

    assert shares(0, 0) == shares(0, 1) == [0.6] * 6
    assert shares(2, 3) == [0.0, 0.0, 0.2, 0.4, 0.6, 0.6]
