"""Picture files: every mode becomes the right RGB, and what cannot be read says so in one line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.tokenizer.pictures import (
    PictureError,
    as_picture,
    fit_picture,
    open_picture,
    save_picture,
    upright,
)


def saved(picture: Image.Image, path: Path, **options: object) -> Image.Image:
    picture.save(path, **options)
    return open_picture(path)


def test_modes(tmp_path: Path) -> None:
    base = Image.new("RGB", (8, 6), (200, 100, 50))
    assert saved(base, tmp_path / "a.png").getpixel((0, 0)) == (200, 100, 50)
    assert saved(base.convert("L"), tmp_path / "l.png").getpixel((0, 0)) == (124, 124, 124)
    assert saved(base.convert("1"), tmp_path / "1.png").mode == "RGB"
    assert saved(base.quantize(4), tmp_path / "p.png").getpixel((0, 0)) == (200, 100, 50)
    cmyk = saved(base.convert("CMYK"), tmp_path / "c.jpg", quality=95).getpixel((4, 4))
    assert np.abs(np.array(cmyk) - (200, 100, 50)).max() < 8
    clear = Image.new("RGBA", (8, 6), (200, 100, 50, 0))
    assert saved(clear, tmp_path / "rgba.png").getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (8, 6), (0, 0, 0, 128))
    assert saved(half, tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)
    deep = Image.fromarray(np.full((6, 8), 32768, np.uint16))
    assert saved(deep, tmp_path / "16.png").getpixel((0, 0)) == (128, 128, 128)
    palette = base.quantize(4)
    palette.info["transparency"] = 0
    assert saved(palette, tmp_path / "pt.png", transparency=0).mode == "RGB"


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "e.jpg", exif=exif)
    assert open_picture(tmp_path / "e.jpg").size == (4, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(10))
def test_upright_is_what_a_file_is_opened_as(tmp_path: Path, kind: str, orientation: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "e", kind, exif=exif)
    turned = upright(Image.open(tmp_path / "e"))
    assert turned.size == ((16, 32) if orientation in (5, 6, 7, 8) else (32, 16))
    assert np.array_equal(turned, open_picture(tmp_path / "e"))
    assert upright(turned).size == turned.size and np.array_equal(upright(turned), turned)  # not once more


def test_upright_of_a_picture_without_orientation_is_itself(tmp_path: Path) -> None:
    plain = Image.new("L", (8, 4))
    assert upright(plain) is plain
    plain.save(tmp_path / "bad.png", exif=b"Exif\0\0no TIFF at all")
    bad = Image.open(tmp_path / "bad.png")
    with pytest.raises(SyntaxError):
        bad.getexif()
    assert upright(bad).size == (8, 4)


def test_arrays_as_pictures() -> None:
    for array, mode in (
        (np.zeros((4, 8, 3), np.uint8), "RGB"),
        (np.zeros((4, 8), np.uint8), "L"),
        (np.zeros((4, 8, 4), np.uint8), "RGBA"),
        (np.zeros((4, 8), np.float32), "F"),
    ):
        assert as_picture(array).size == (8, 4) and as_picture(array).mode == mode
    for bad in (
        np.zeros((4, 8, 3), np.float32),
        np.zeros((3, 4, 8), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(5, np.uint8),
    ):
        with pytest.raises(ValueError, match=r"a picture is a Pillow image or \(H, W, 3\) uint8, got \("):
            as_picture(bad)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(PictureError, match=r"bomb.png: .*up to 64 megapixels are accepted"):
        open_picture(tmp_path / "bomb.png")


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (
        ("none.png", "no such file"),
        ("short.png", "damaged or truncated"),
        ("text.png", "not a picture"),
        ("empty.png", "not a picture"),
        ("", "is a folder"),
    ):
        with pytest.raises(PictureError, match=reason) as caught:
            open_picture(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_fitting_crops_about_the_middle() -> None:
    picture = Image.new("RGB", (128, 64), (0, 0, 0))
    picture.paste((255, 255, 255), (32, 0, 96, 64))
    assert fit_picture(picture, 64, 64).min() == 255
    assert fit_picture(picture.crop((32, 0, 96, 64)), 16, 16).shape == (16, 16, 3)


def test_saving(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    save_picture(pixels, tmp_path / "new" / "a.webp")
    assert open_picture(tmp_path / "new" / "a.webp").size == (6, 4)
    with pytest.raises(PictureError, match=r"cannot write '.xyz' pictures; use .png, .jpg or .webp"):
        save_picture(pixels, tmp_path / "a.xyz")
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="cannot be written"):
        save_picture(pixels, tmp_path / "file" / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]
