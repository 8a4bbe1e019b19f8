"""Pictures for the tokenizer: textures, folders with broken files, and the deterministic mixture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.config import ConfigError
from nextflow_ar.data.photos import PhotoFolder
from nextflow_ar.data.pictures import PictureMixture, PictureSource
from nextflow_ar.data.playground.curriculum import episode, held_out_of
from nextflow_ar.data.playground.episodes import Episode
from nextflow_ar.data.playground.mixture import MixtureConfig
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.tokenizer.pictures import PictureError

SCENES = MixtureConfig({"shapes": 1.0}, "train", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, two of them wide, one broken at its head and one behind it."""
    out = tmp_path / "photos"
    (out / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, size in enumerate([(90, 60), (90, 60), (64, 64), (50, 50), (40, 80), (300, 20)]):
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.save((out / "deep" if i == 2 else out) / f"{i}.png")
    (out / "broken.jpg").write_bytes(b"no picture")
    (out / "cut.png").write_bytes((out / "0.png").read_bytes()[:3000])
    (out / "notes.txt").write_text("not a picture")
    return out


def test_textures_follow_from_their_seed_and_look_like_pictures() -> None:
    a = dead_leaves((1, 2), 96, 128)
    assert a.shape == (96, 128, 3) and a.dtype == np.uint8
    assert np.array_equal(a, dead_leaves((1, 2), 96, 128))
    assert not np.array_equal(a, dead_leaves((1, 3), 96, 128))
    # Amplitude falls about as 1/f, as in photographs (white noise: exponent 0).
    slopes = []
    for seed in range(8):
        grey = dead_leaves((seed,), 128, 128).mean(2)
        power = np.abs(np.fft.fft2(grey - grey.mean()))
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
        bands = [power[(radius >= lo) & (radius < 2 * lo)].mean() for lo in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
        slopes.append(np.polyfit(np.log([1, 2, 4, 8]), np.log(bands), 1)[0])
    assert -1.8 < np.mean(slopes) < -0.8


def test_a_folder_with_broken_files_skips_counts_and_lists_them(folder: Path) -> None:
    photos = PhotoFolder(folder)
    assert [p.name for p in photos.broken] == ["broken.jpg"]
    assert len(photos.files) == 7 and photos.buckets[52, 76] == [
        folder / "0.png",
        folder / "1.png",
        folder / "cut.png",
    ]
    assert (32, 128) in photos.buckets  # 300x20 is cropped in the widest bucket
    crops = [photos.crop((i,), 32, 48) for i in range(30)]
    assert all(c.shape == (32, 48, 3) for c in crops)
    assert {p.name for p in photos.broken} == {"broken.jpg", "cut.png"}  # found when it was opened
    assert "cut.png: damaged or truncated picture" in photos.broken[folder / "cut.png"]
    assert np.array_equal(photos.crop((4,), 32, 48), PhotoFolder(folder).crop((4,), 32, 48))
    wide = photos.crop((9,), 16, 64, (32, 128))
    assert wide.shape == (16, 64, 3)
    assert {photos.bucket(x) for x in np.linspace(0, 1, 200)} == set(photos.grids)


def test_folders_without_pictures_say_so(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no such folder"):
        PhotoFolder(tmp_path / "none")
    with pytest.raises(PictureError, match="holds no pictures"):
        PhotoFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(PictureError, match="none of its 1 picture files can be read"):
        PhotoFolder(tmp_path)


def test_a_mixture_is_deterministic_and_keeps_to_its_budget(folder: Path) -> None:
    sources = {
        "scenes": PictureSource("playground", 0.5, playground=SCENES),
        "photos": PictureSource("photos", 0.25, folder=folder, scales=(4, 6), ratios="own"),
        "leaves": PictureSource("textures", 0.25, scales=(5,), ratios="all"),
    }
    mixture = PictureMixture(sources, pixels=6144, downsample=8, seed=1)
    batches = [mixture.batch(i) for i in range(80)]
    again = PictureMixture(sources, pixels=6144, downsample=8, seed=1).batch(17)
    assert np.array_equal(again.pictures, batches[17].pictures) and again.schedule == batches[17].schedule
    shares = [sum(b.source == name for b in batches) / 80 for name in sources]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.13)
    for batch in batches:
        n, h, w, _ = batch.pictures.shape
        assert (h, w) == batch.schedule.image_size(8)
        assert n == max(1, 6144 // (h * w))
    ratios = {b.schedule.final for b in batches if b.source == "leaves"}
    assert len(ratios) > 8
    assert {len(b.schedule) for b in batches if b.source == "photos"} == {4, 6}


def test_pictures_of_the_wide_world_come_in_its_sizes_and_keep_the_split() -> None:
    tasks = {"draw_scene": 1.0, "edit": 1.0}
    world = PictureSource("world", 1.0, seed=3, scales=(8, 10), ratios="all", tasks=tasks)
    mixture = PictureMixture({"world": world}, pixels=16384, downsample=8, seed=1)
    batches = [mixture.batch(i) for i in range(12)]
    assert np.array_equal(mixture.batch(5).pictures, batches[5].pictures)
    assert {len(b.schedule) for b in batches} == {8, 10}
    assert len({b.pictures.shape[1:3] for b in batches}) > 5
    for batch in batches:
        assert batch.pictures.shape[1:3] == batch.schedule.image_size(8)
        assert len({p.tobytes() for p in batch.pictures}) == len(batch.pictures)


def test_a_split_of_the_wide_world_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Episode] = []

    def noted(*args: Any) -> Episode:
        made.append(episode(*args))
        return made[-1]

    monkeypatch.setattr("nextflow_ar.data.pictures.episode", noted)
    for split in ("train", "test"):
        source = PictureSource("world", 1.0, tasks={"draw_scene": 1.0}, split=split)
        PictureMixture({"w": source}, 32768, 8, 1).batch(0)
        shown = sum(held_out_of(e) > 0 for e in made)
        assert len(made) == 8 and (shown == 0 if split == "train" else shown > 4)
        made.clear()


def test_a_mixture_that_cannot_work_says_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = PictureSource("photos", 1.0, folder=folder, scales=(3,))
    with pytest.raises(
        ConfigError, match=r"7 usable pictures are too few for batches of 14 \(source 'mine'\)"
    ):
        PictureMixture({"mine": photos}, pixels=8192, downsample=8, seed=0)
    gone = PictureSource("photos", 1.0, folder=folder / "gone", optional=True)
    with pytest.raises(ConfigError, match="names no source that is there"):
        PictureMixture({"mine": gone}, 8192, 8, 0)
    leaves = PictureSource("textures", 1.0)
    with caplog.at_level(logging.WARNING):
        mixture = PictureMixture({"mine": gone, "leaves": leaves}, 8192, 8, 0)
    assert mixture.names == ["leaves"] and "the source 'mine' is left out" in caplog.text
    with pytest.raises(PictureError, match="no such folder"):
        PictureMixture({"mine": PictureSource("photos", 1.0, folder=folder / "gone")}, 8192, 8, 0)
    for bad in (
        {"kind": "photos", "weight": 1.0},
        {"kind": "textures", "weight": 0.0},
        {"kind": "world", "weight": 1.0},
        {"kind": "textures", "weight": 1.0, "tasks": {"draw": 1.0}},
        {"kind": "world", "weight": 1.0, "tasks": {"plain": 1.0}},
        {"kind": "world", "weight": 1.0, "tasks": {"paint": 1.0}},
        {"kind": "textures", "weight": 1.0, "ratios": "own"},
        {"kind": "textures", "weight": 1.0, "scales": (19,)},
        {"kind": "playground", "weight": 1.0},
    ):
        with pytest.raises(
            ValueError, match=r"goes with|above 0|from 1 to 18|no pictures|unknown playground task"
        ):
            PictureSource(**bad)
