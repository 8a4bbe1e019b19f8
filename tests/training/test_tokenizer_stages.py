"""The three stages of the image tokenizer at tiny size: growing, resuming, losses, and what goes wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_ar.app.stages import run_recipe
from nextflow_ar.config import ConfigError, ImageTokenizerConfig, from_dict, load_yaml, to_dict
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.semantic import contrastive_model
from nextflow_ar.training import teacher as teacher_stage
from nextflow_ar.training.growth import start_from, without_semantics
from nextflow_ar.training.teacher import TeacherRecipe, TeacherTrainer
from nextflow_ar.training.tokenizer_stage import ScaleDropout, TokenizerRecipe, TokenizerTrainer
from tests.conftest import TINY_SEMANTIC, TINY_TOKENIZER

OPTIMIZER = {
    "lr": 3e-3, "muon_lr": 5e-3, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.98, "warmup": 3,
    "schedule": "constant", "decay": 0.3, "final": 0.1, "clip": 1.0,
}  # fmt: skip
PIXEL = replace(
    TINY_TOKENIZER,
    semantic=None,
    quantizer=replace(TINY_TOKENIZER.quantizer, semantic_dim=0, codebook_size=32),
)
DUAL = replace(TINY_TOKENIZER, quantizer=replace(TINY_TOKENIZER.quantizer, codebook_size=32))
SCENES = {
    "kind": "playground", "weight": 1.0, "playground": {"levels": {"shapes": 1.0}, "split": "train", "seed": 3},
}  # fmt: skip
LEAVES = {"kind": "textures", "weight": 1.0, "scales": [4, 5], "ratios": "all"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("teacher")
    contrastive_model(TINY_SEMANTIC, 40, 8, 1).save_pretrained(folder)
    return str(folder)


def trainer(out: Path, trains: str, config: ImageTokenizerConfig, **changes: Any) -> TokenizerTrainer:
    values = {
        "kind": "tokenizer", "out": str(out), "seed": 1, "trains": trains, "start": None, "teacher": None, "steps": 20,
        "pixels": 16384, "optimizer": OPTIMIZER, "ema": 0.9, "dropout": {"kind": "nested", "share": 0.5},
        "codebook": {"kind": "ema", "decay": 0.9, "revive_below": 0.05}, "compile": False, "sheet_seconds": 1e9,
        "save_seconds": 1e9, "loss": {"mse": 1.0, "l1": 0.1, "commitment": 0.25}, "data": {"a": SCENES, "b": LEAVES},
        "heldout": {"scenes": SCENES, "leaves": LEAVES}, "heldout_pixels": 32768, "tokenizer": to_dict(config),
    } | changes  # fmt: skip
    recipe = from_dict(TokenizerRecipe, values)
    return TokenizerTrainer(recipe, to_dict(recipe))


def test_pixel_then_joint_then_decoder(teacher: str, tmp_path: Path) -> None:
    first = trainer(tmp_path / "pixel", "pixel", PIXEL, steps=40)
    losses = [first.advance()["mse"] for _ in range(39)]
    assert np.mean(losses[-8:]) < 0.9 * losses[0]
    pixel = first.fit()
    lines = [json.loads(line) for line in (tmp_path / "pixel" / "metrics.jsonl").read_text().splitlines()]
    report = lines[-1]
    assert report["scenes_psnr"] > 8 and len(report["scenes_psnr_by_scale"]) == 8
    assert len(report["leaves_psnr_by_scale"]) in (4, 5) and 0 < report["leaves_ssim"] < 1
    assert len(report["usage"]) == len(report["perplexity"]) == 18 and report["scenes_codes_used"] > 0.5
    for name in ("scenes", "leaves"):
        assert (tmp_path / "pixel" / f"sheet_000040_{name}.png").is_file()

    joint = trainer(
        tmp_path / "joint", "joint", DUAL, start=str(pixel), teacher=teacher,
        loss={"mse": 1.0, "l1": 0.1, "commitment": 0.25, "semantic": 0.3, "perceptual": 0.1},
    )  # fmt: skip
    assert joint.teacher is not None and joint.model.semantic_encoder is not None
    for a, b in zip(
        joint.teacher.state_dict().values(), joint.model.semantic_encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)  # the student starts as the teacher
    terms = joint.advance()
    assert {"semantic", "perceptual", "commitment", "mse", "l1", "norm"} <= set(terms)
    dual = joint.fit()
    assert "scenes_frechet_teacher" in json.loads(
        (tmp_path / "joint" / "metrics.jsonl").read_text().splitlines()[-1]
    )

    larger = replace(DUAL, decoder_channels=(16, 16, 32))
    last = trainer(
        tmp_path / "decoder", "decoder", larger, start=str(dual), teacher=teacher, steps=6,
        loss={"mse": 1.0, "l1": 0.1, "commitment": 0.0, "perceptual": 0.1},
    )  # fmt: skip
    assert set(last.averages) == {f"decoder.{k}" for k, _ in last.model.decoder.named_parameters()}
    final = last.fit()
    one, two = ImageTokenizer.from_pretrained(dual), ImageTokenizer.from_pretrained(final)
    picture = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(one.encode_bytes(picture).target, two.encode_bytes(picture).target)  # codes stay
    assert two.config.decoder_channels == (16, 16, 32)


def test_a_run_goes_on_with_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    for seed, goes_on in ((4, True), (5, False)):
        torch.manual_seed(seed)
        contrastive_model(TINY_SEMANTIC, 40, 8, 1).save_pretrained(folder)
        asked: Any = (tmp_path / "run", "joint", DUAL)
        if goes_on:
            first = trainer(*asked, teacher=str(folder))
            first.advance()
            first.save()
            assert trainer(*asked, teacher=str(folder)).step == 1
        else:
            with pytest.raises(StorageError, match="made with another teacher than"):
                trainer(*asked, teacher=str(folder))


def test_a_grown_tokenizer_draws_what_the_pixel_branch_drew() -> None:
    torch.manual_seed(0)
    old = ImageTokenizer(PIXEL)
    old.quantizer.codebook.normal_()
    new = ImageTokenizer(DUAL)
    start_from(new, old)
    schedule = ScaleSchedule.square(5)
    codes = torch.randint(0, 32, (2, schedule.num_tokens))
    torch.testing.assert_close(
        new.decode_pixels(codes, schedule), old.decode_pixels(codes, schedule), atol=1e-5, rtol=1e-5
    )
    for blocks in (2, 4):
        larger = ImageTokenizer(replace(DUAL, decoder_blocks=blocks))
        start_from(larger, new, ("decoder",))
        assert sum(p.numel() for p in larger.decoder.parameters()) > sum(
            p.numel() for p in new.decoder.parameters()
        )
        torch.testing.assert_close(
            larger.decode_pixels(codes, schedule), new.decode_pixels(codes, schedule), atol=1e-5, rtol=1e-5
        )
    for blocks in (2, 3):
        larger = ImageTokenizer(replace(DUAL, encoder_blocks=blocks))
        start_from(larger, new, ("encoder", "decoder"))
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        torch.testing.assert_close(larger.embed(pixels), new.embed(pixels), atol=1e-5, rtol=1e-5)
        assert len(larger.state_dict()) > len(new.state_dict())
    new.quantizer.codebook.normal_()
    alone = without_semantics(new)
    assert alone.config.semantic is None and alone.config.quantizer.dim == PIXEL.quantizer.dim
    assert torch.equal(alone.quantizer.codebook, new.quantizer.codebook[:, -PIXEL.quantizer.dim :])
    features = torch.randn(2, DUAL.quantizer.dim, 8, 8)
    features[:, : -PIXEL.quantizer.dim] = 0
    torch.testing.assert_close(alone.render(features[:, -PIXEL.quantizer.dim :]), new.render(features))
    wider = ImageTokenizer(replace(DUAL, encoder_channels=(8, 16, 32)))
    with pytest.raises(ConfigError, match="does not fit this recipe's: encoder"):
        start_from(wider, old)


def test_a_stage_keeps_the_codebook_that_it_starts_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = ImageTokenizer(PIXEL)
    old.quantizer.codebook.normal_()
    old.save_pretrained(tmp_path / "old")
    codebook = {"kind": "ema", "decay": 0.99, "revive_below": 0.5}

    def stage(name: str, **changes: Any) -> TokenizerTrainer:
        return trainer(
            tmp_path / name, "pixel", PIXEL, start=str(tmp_path / "old"), codebook=codebook, **changes
        )

    first, before = stage("run"), old.quantizer.codebook
    first.advance()
    q = first.model.quantizer
    counts = q.scale_counts.sum(0) / (1 - 0.99)
    assert first.revived == 0 and float(counts.min()) == 0  # there were codes to revive
    assert torch.allclose(q.codebook[counts == 0], before[counts == 0], atol=1e-6)
    summed = (q.ema_sum - 0.99 * counts.mean() * before) / (1 - 0.99)
    met = counts > 0
    to_mean = summed[met] / counts[met, None] - before[met]
    share = (q.codebook[met] - before[met]).norm(dim=1) / to_mean.norm(dim=1)
    assert float(share.median()) == pytest.approx(
        0.01, rel=0.5
    )  # it was 1: a code became the mean of its cells
    assert float(share.max()) < 0.3
    first.save()
    again = stage("run")
    assert again.model.quantizer.ema_weight == 1.0
    expected = first.advance()
    assert again.advance() == expected and torch.equal(again.model.quantizer.codebook, q.codebook)

    # Another encoder's features have nothing to do with these codes: they are learnt anew.
    grown = [ImageTokenizer(replace(DUAL, encoder_channels=c)) for c in (PIXEL.encoder_channels, (8, 16, 32))]
    for model in grown:
        start_from(model, old, ("encoder", "decoder"))
        model.quantizer.learn(
            [(0, torch.ones(64, DUAL.quantizer.dim), torch.zeros(64, dtype=torch.long))],
            decay=0.9,
            revive_below=0.1,
        )
    assert [float(model.quantizer.ema_weight) for model in grown] == pytest.approx([1.0, 0.1])


def test_a_checkpoint_from_before_the_count_of_steps_and_batches_goes_on(tmp_path: Path) -> None:
    first = trainer(tmp_path, "pixel", PIXEL)
    for _ in range(2):
        first.advance()
    first.save()
    assert trainer(tmp_path, "pixel", PIXEL).model.quantizer.ema_weight == pytest.approx(0.19)
    old = torch.load(tmp_path / "checkpoint.pt")
    del old["quantizer"]["ema_weight"], old["batches"]
    torch.save(old, tmp_path / "checkpoint.pt")
    again = trainer(tmp_path, "pixel", PIXEL)
    assert again.model.quantizer.ema_weight == 1.0
    assert np.array_equal(again.batch().pictures, again.data.batch(2).pictures)


@pytest.mark.parametrize("adversarial", [0.0, 0.5], ids=["plain", "with a critic"])
def test_a_resumed_run_equals_one_that_never_stopped(adversarial: float, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "loss": {
            "mse": 1.0, "l1": 0.1, "commitment": 0.25, "adversarial": adversarial, "adversarial_start": 2,
            "discriminator_channels": 8,
        },
    }  # fmt: skip
    whole = trainer(tmp_path / "a", "pixel", PIXEL, **changes)
    for _ in range(6):
        expected = whole.advance()
    first = trainer(tmp_path / "b", "pixel", PIXEL, **changes)
    for _ in range(4):
        first.advance()
    first.save()
    second = trainer(tmp_path / "b", "pixel", PIXEL, **changes)
    for _ in range(2):
        found = second.advance()
    assert second.step == 6 and found == expected
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert all(
        torch.equal(a, b) for a, b in zip(whole.averages.values(), second.averages.values(), strict=True)
    )


def test_metrics_of_a_killed_run_are_neither_lost_nor_told_twice(tmp_path: Path) -> None:
    first = trainer(tmp_path, "pixel", PIXEL, steps=3)
    first.advance()
    first.run.log(step=1, mse=0.5)
    first.save()
    first.run.log(step=2, mse=0.4)  # after the checkpoint: the resumed run says it again
    path = tmp_path / "metrics.jsonl"
    told = re.sub(r'"time": \d+\.', '"time": 1000.', path.read_text())  # however slow the machine is
    path.write_text(told + '{"time": 1002.0, "st')
    trainer(tmp_path, "pixel", PIXEL, steps=3).fit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 3] and lines[0]["mse"] == 0.5
    assert all(line["time"] >= 1000 for line in lines)  # the clock goes on, too


def test_pictures_made_ahead_train_the_same_weights(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", "pixel", PIXEL, steps=4)
    whole = (plain.fit() / "model.safetensors").read_bytes()
    for name, how in (("ahead", {"prefetch": True}), ("processes", {"workers": 2})):
        other = trainer(tmp_path / name, "pixel", PIXEL, steps=4, **how)
        assert (other.fit() / "model.safetensors").read_bytes() == whole
        for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_critic_waits_for_its_step_and_then_learns(tmp_path: Path) -> None:
    loss = {
        "mse": 1.0, "l1": 0.0, "commitment": 0.25, "adversarial": 0.5, "adversarial_start": 3,
        "discriminator_channels": 8,
    }  # fmt: skip
    training = trainer(tmp_path / "run", "pixel", PIXEL, loss=loss)
    assert training.discriminator is not None
    before = [p.clone() for p in training.discriminator.parameters()]
    found = [training.advance() for _ in range(6)]
    assert ["critic" in f for f in found] == [False, False, False, True, True, True]
    assert ["adversarial" in f for f in found] == [False, False, False, True, True, True]
    assert 0.5 < found[3]["critic"] < 2
    assert any(
        not torch.equal(a, b) for a, b in zip(before, training.discriminator.parameters(), strict=True)
    )
    assert all(p.grad is None for p in training.discriminator.parameters())


def test_every_codebook_and_chain_trains(teacher: str, tmp_path: Path) -> None:
    refined = replace(PIXEL, quantizer=replace(PIXEL.quantizer, refine=0.5, normalize=True))
    training = trainer(
        tmp_path / "run", "pixel", refined, codebook={"kind": "gradient", "decay": 0.9, "revive_below": 0.0},
        dropout={"kind": "independent", "share": 0.5},
        loss={"mse": 1.0, "l1": 0.0, "commitment": 0.25, "codebook": 1.0, "entropy": 0.01},
    )  # fmt: skip
    q = training.model.quantizer
    assert q.refiner is not None
    before = q.codebook.detach().clone(), q.refiner.convolutions[0].weight.detach().clone()  # type: ignore[union-attr]
    losses = [training.advance() for _ in range(12)]
    assert not torch.equal(before[0], q.codebook)
    assert not torch.equal(before[1], q.refiner.convolutions[0].weight)  # type: ignore[arg-type]
    assert {"codebook", "entropy"} <= set(losses[0])
    assert np.mean([x["mse"] for x in losses[-4:]]) < losses[0]["mse"]
    again = ImageTokenizer.from_pretrained(training.fit())
    assert again.config == refined


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    training = trainer(tmp_path / "run", "pixel", PIXEL)
    training.advance()
    training.save()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        training.model.decoder.last_weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError,
        match="the loss or its gradient is not finite at step 1: the last checkpoint is kept",
    ):
        training.fit()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("part", ["the loss", "the critic's loss"])
def test_a_gradient_that_overflows_is_not_saved(part: str, tmp_path: Path) -> None:
    loss = {
        "mse": 1.0, "l1": 0.1, "commitment": 0.25, "adversarial": 0.5, "discriminator_channels": 8,
    }  # fmt: skip
    training = trainer(tmp_path / "run", "pixel", PIXEL, loss=loss, save_seconds=0.0)
    training.advance()
    training.save()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert training.discriminator is not None
    broken = training.discriminator if "critic" in part else training.model.decoder
    next(broken.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError) as told:
        training.fit()
    assert str(told.value) == f"{part} or its gradient is not finite at step 1: the last checkpoint is kept"
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_teacher_whose_gradient_overflows_is_not_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {
        "kind": "teacher", "out": str(tmp_path / "run"), "seed": 1, "steps": 3, "batch": 2, "grounding": 1.0,
        "data": SCENES["playground"], "optimizer": OPTIMIZER, "semantic": to_dict(TINY_SEMANTIC),
        "text": {"entries": 280, "length": 64, "layers": 1},
    }  # fmt: skip
    recipe = from_dict(TeacherRecipe, values)
    training = TeacherTrainer(recipe, to_dict(recipe))
    training.save()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(teacher_stage, "Every", lambda _: lambda: True)
    next(training.towers.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        FloatingPointError, match="the loss or its gradient is not finite at step 0: the last"
    ):
        training.fit()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "how", [{}, {"prefetch": True}, {"workers": 2}], ids=["in place", "ahead", "processes"]
)
def test_broken_pictures_are_counted_and_listed(how: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"bad")
    whole = (folder / "4.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    photos = {"kind": "photos", "weight": 1.0, "folder": str(folder), "scales": [5], "ratios": "own"}
    training = trainer(tmp_path / "run", "pixel", PIXEL, data={"p": photos}, pixels=8000, steps=6, **how)
    training.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["broken"] == 2
    told = json.loads((tmp_path / "run" / "broken.json").read_text())
    assert sorted(told) == [str(folder / "bad.png"), str(folder / "cut.png")]
    again = trainer(tmp_path / "run", "pixel", PIXEL, data={"p": photos}, pixels=8000, steps=7, **how)
    assert again.step == 6 and again.broken == told  # a run that goes on forgets none
    with pytest.raises(ConfigError, match="6 usable pictures are too few for batches of 10"):
        trainer(tmp_path / "run2", "pixel", PIXEL, data={"p": photos})


def test_recipes_whose_parts_do_not_fit_say_so(teacher: str, tmp_path: Path) -> None:
    for trains, config, changes, told in (
        ("pixel", DUAL, {}, "trains: pixel goes with tokenizer.semantic: null"),
        ("joint", DUAL, {}, "needs tokenizer.semantic and a teacher"),
        ("decoder", PIXEL, {}, "needs a tokenizer to start from"),
        ("pixel", PIXEL, {"fresh_semantics": True}, "fresh_semantics goes with trains: joint"),
        ("pixel", PIXEL, {"loss": {"mse": 1, "l1": 0, "commitment": 0, "perceptual": 1}}, "needs a teacher"),
        (
            "pixel",
            PIXEL,
            {"codebook": {"kind": "gradient", "decay": 0.9, "revive_below": 0}},
            "loss.codebook",
        ),
        ("pixel", PIXEL, {"steps": -1}, "^steps is at least 1, got -1$"),
        ("pixel", PIXEL, {"ema": 1.5}, r"^ema is at least 0 and below 1, got 1\.5$"),
        ("pixel", PIXEL, {"workers": -2}, "^workers is at least 0, got -2$"),
        (
            "pixel",
            PIXEL,
            {"dropout": {"kind": "nested", "share": 7}},
            "'dropout': share is from 0 to 1, got 7",
        ),
        ("pixel", PIXEL, {"optimizer": OPTIMIZER | {"clip": 0}}, "'optimizer': clip is above 0, got 0"),
        (
            "pixel",
            PIXEL,
            {"loss": {"mse": -1, "l1": 0, "commitment": 0}},
            "'loss': mse is at least 0, got -1",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            trainer(tmp_path / "run", trains, config, **changes)
    other = replace(DUAL, semantic=replace(TINY_SEMANTIC, layers=2))
    with pytest.raises(ConfigError, match="the teacher is"):
        trainer(tmp_path / "run", "joint", other, teacher=teacher)


def test_dropout_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    nested = ScaleDropout("nested", 0.5).mask(4000, 6, generator)
    assert bool(nested[:, 0].all())
    assert bool((nested[:, :-1] >= nested[:, 1:]).all())  # prefixes only
    assert float(nested.all(1).float().mean()) == pytest.approx(0.5, abs=0.03)
    independent = ScaleDropout("independent", 0.3).mask(4000, 6, generator)
    assert bool(independent[:, 0].all())
    assert independent[:, 1:].float().mean(0).tolist() == pytest.approx([0.7] * 5, abs=0.03)
    assert ScaleDropout("nested", 1.0).mask(3, 1, generator).tolist() == [[True]] * 3


@pytest.mark.parametrize(
    "name",
    [
        "nano_pixel",
        "nano_tokenizer",
        "nano_decoder",
        "nano_decoder_ssim",
        "nano_joint",
        "world_tokenizer",
        "full_pixel",
        "full_tokenizer",
        "full_decoder",
    ],
)
def test_the_recipes_are_complete(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    recipe = from_dict(TokenizerRecipe, load_yaml(path), name)
    recipe.check()
    with torch.device("meta"):
        ImageTokenizer(recipe.tokenizer)


def test_a_folder_that_the_user_names_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []
    monkeypatch.setattr(
        "nextflow_ar.training.tokenizer_stage.train_tokenizer", lambda recipe, *_: trained.append(recipe.out)
    )
    path = Path(__file__).parents[2] / "recipes" / "nano_pixel.yaml"
    monkeypatch.chdir(tmp_path)  # where the recipe's own, optional folder is not
    run_recipe(path, ["steps=5"])
    (tmp_path / "mine").mkdir()
    run_recipe(path, ["data.photos.folder=mine"])
    assert len(trained) == 2
    with pytest.raises(ConfigError, match=r"^data\.photos\.folder: nope: no such folder of pictures$"):
        run_recipe(path, ["data.photos.folder=nope"])
    assert len(trained) == 2
