"""What the tokenizer keeps, measured: codecs at equal size, files and folders, and the suite as a command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.data.playground.sprites import find_font
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.evaluation.reconstruction import bits_per_pixel, codec_at, reconstruct_files
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.types import Codes
from tests.conftest import tiny_image_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "photos"
    out.mkdir()
    for i, (height, width) in enumerate([(40, 40), (30, 66), (90, 50)]):
        Image.fromarray(dead_leaves((i,), height, width)).save(out / f"{i}.png")
    (out / "broken.png").write_bytes(b"no picture")
    return out


@pytest.mark.parametrize("codec", ["JPEG", "WEBP"])
def test_codecs_keep_to_the_bits_where_they_can(codec: str) -> None:
    pixels = dead_leaves((5,), 128, 192)
    last = 0.0
    for bits in (0.6, 1.2, 2.4):
        out, took = codec_at(pixels, bits, codec)  # type: ignore[arg-type]
        assert out.shape == pixels.shape and took <= bits
        quality = -np.mean((out.astype(float) - pixels) ** 2)
        assert quality > last or last == 0.0
        last = quality
    _, least = codec_at(pixels, 0.0, codec)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec, quality=1 if codec == "JPEG" else 0)
    assert 0 < least <= 8 * len(buffer.getvalue()) / (128 * 192)


def test_bits_per_pixel_by_hand() -> None:
    tokenizer = tiny_image_tokenizer()
    codes = tokenizer.encode(dead_leaves((1,), 40, 40))
    assert isinstance(codes, Codes)
    assert bits_per_pixel(tokenizer, codes, 40, 40) == pytest.approx(55 * np.log2(24) / 1600)
    assert bits_per_pixel(tokenizer, codes, 40, 40, 2) == pytest.approx(5 * np.log2(24) / 1600)


def test_files_are_measured_at_their_own_size(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.iterdir())
    found = reconstruct_files(tiny_image_tokenizer(), files, tmp_path / "out")
    assert [(r.width, r.height) for r in found.rows] == [(40, 40), (66, 30), (50, 90)]
    assert list(found.broken) == [str(folder / "broken.png")]
    for row in found.rows:
        before = np.asarray(Image.open(row.file).convert("RGB"), float)
        after = np.asarray(Image.open(row.out), float)
        assert row.psnr == pytest.approx(10 * np.log10(255**2 / ((before - after) ** 2).mean()), abs=0.01)
        assert row.ssim is not None and -1 < row.ssim < 1
    text = found.table()
    assert "mean of 3" in text and "1 could not be read" in text
    assert (tmp_path / "out" / "side_by_side.png").is_file()
    cropped = reconstruct_files(tiny_image_tokenizer(), files[:1], tmp_path / "o2", num_scales=3, fit="crop")
    assert cropped.rows[0].scales == 3


def test_reconstruct_as_a_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["reconstruct", str(folder), "-o", out, "-m", str(GOLDEN), "--scales", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["pictures"]) == 3 and len(found["broken"]) == 1
    assert {"psnr", "ssim", "bits_per_pixel"} == set(found["mean"])
    # a broken file that was named is an error, told after the others are done
    named = [str(folder / "0.png"), str(folder / "broken.png")]
    assert run(["reconstruct", *named, "-o", out, "-m", str(GOLDEN)]) == 1
    told = capsys.readouterr()
    assert "0.png" in told.out and "broken.png: not a picture" in told.err
    assert run(["reconstruct", named[0], "-o", out, "--fit", "stretch"]) == 2
    assert "--fit takes pad or crop, got 'stretch'" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(["reconstruct", str(empty), "-o", out]) == 1
    assert "the folder holds no pictures" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_font() is None, reason="needs the package fonts-noto-color-emoji")
def test_the_suite_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        Image.fromarray(dead_leaves((i,), 540, 520)).save(photos / f"{i}.png")
    arguments = [
        "evaluate",
        "tokenizer",
        "-o",
        str(tmp_path / "e"),
        "--photos",
        str(photos),
        "--prompts",
        "2",
    ]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scenes = found["playground"]["by_scales"]
    assert len(scenes["psnr"]) == 8 and scenes["psnr"][-1] > 27
    assert scenes["exact"][-1] >= 0.7 and scenes["named"][0] < scenes["named"][-1]
    again = found["playground"]["again"]
    assert again["to_first"] > again["to_original"] > scenes["psnr"][-1] - 3  # the second pass loses little
    assert set(found["photos"]) == {"crop_256", "crop_512", "whole"}
    for kind, values in found["photos"].items():
        assert values["tokenizer"]["bits"] == pytest.approx(values["webp"]["bits"], rel=0.25)
        assert values["webp"]["psnr"] > 15 and values["jpeg"]["psnr"] > 15
        # each prefix is decoded for the small crops only: elsewhere it would cost as many decodings as scales
        assert len(values["psnr_by_scales"]) == (16 if kind == "crop_256" else 0)
    assert 0 < found["usage"]["all"] <= 1 and len(found["usage"]["by_scale"]) == 18
    text = (tmp_path / "e" / "report.txt").read_text()
    assert "photographs, crop_256" in text and "codes used" in text
    assert {"playground.png", "photos_whole.png"} <= {p.name for p in (tmp_path / "e").iterdir()}


@pytest.mark.shared
def test_longer_prefixes_never_get_worse_on_average_on_photographs() -> None:
    kodak = Path(__file__).parents[3] / "shared" / "data" / "kodak"
    if not kodak.is_dir():
        pytest.skip("needs ../shared")
    tokenizer = ImageTokenizer.from_pretrained("nano-tokenizer")
    sums = np.zeros(12)
    for path in sorted(kodak.glob("*.png"))[:6]:
        picture = np.asarray(Image.open(path).convert("RGB").resize((192, 128)))
        codes = tokenizer.encode(picture, num_scales=12)
        assert isinstance(codes, Codes)
        canvas = np.asarray(tokenizer.decode(codes), float)
        for k in range(12):
            out = np.asarray(tokenizer.decode(codes, k + 1), float)
            assert out.shape == canvas.shape
            sums[k] += ((out - picture) ** 2).mean()
    assert bool((np.diff(sums) <= 0.01 * sums[:-1]).all())
