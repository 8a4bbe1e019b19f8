"""Pictures of single things: emoji sprites rendered from the system's font at run time, files, and drawn shapes."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.words import SHAPES
from nextflow_ar.data.playground.world import SPRITES

FONT_PACKAGE = "fonts-noto-color-emoji"
_FONT_FILE = "NotoColorEmoji.ttf"
_FONT_DIRS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "~/Library/Fonts",
)
_STRIKE = 109  # the only bitmap size in the font
_OVERSAMPLE = 4  # shapes are drawn larger and reduced, for soft edges


class SpritesMissing(RuntimeError):
    """The emoji font is not installed and no sprite folder was given."""


@lru_cache(maxsize=1)
def find_font() -> Path | None:
    """Path of the colour emoji font, or None. ``NEXTFLOW_AR_EMOJI_FONT`` overrides the search."""
    override = os.environ.get("NEXTFLOW_AR_EMOJI_FONT")
    if override is not None:
        return Path(override) if Path(override).is_file() else None
    for folder in _FONT_DIRS:
        root = Path(folder).expanduser()
        found = next(iter(sorted(root.rglob(_FONT_FILE))), None) if root.is_dir() else None
        if found is not None:
            return found
    return None


@lru_cache(maxsize=512)
def source(name: str, folder: Path | None) -> Image.Image:
    """The sprite at its native size, RGBA, cropped to its visible part. Raises as :func:`sprite` does."""
    if folder is not None:
        with Image.open(folder / f"{name}.png") as file:
            picture = file.convert("RGBA")
    else:
        path = find_font()
        if path is None:
            raise SpritesMissing(
                f"sprites need the emoji font: install the package {FONT_PACKAGE}, or name a folder of PNG sprites; "
                "shapes work without it"
            )
        glyph = next((noun.glyph for noun in SPRITES if noun.name == name), None)
        if glyph is None:
            raise ValueError(f"no sprite is called {name!r}")
        picture = Image.new("RGBA", (160, 160))
        font = ImageFont.truetype(str(path), _STRIKE)
        ImageDraw.Draw(picture).text((8, 8), glyph, font=font, embedded_color=True)
    box = picture.getchannel("A").getbbox()
    return picture.crop(box) if box else picture


def draw_shape(name: str, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """A shape that fills a box of ``side`` pixels, RGBA."""
    n = side * _OVERSAMPLE
    picture = Image.new("RGBA", (n, n), (*colour, 0))
    draw = ImageDraw.Draw(picture)
    fill = (*colour, 255)
    last = n - 1
    if name == "circle":
        draw.ellipse((0, 0, last, last), fill=fill)
    elif name == "square":
        inset = n // 14
        draw.rectangle((inset, inset, last - inset, last - inset), fill=fill)
    elif name == "triangle":
        draw.polygon([(n // 2, n // 20), (last, last - n // 20), (0, last - n // 20)], fill=fill)
    elif name == "cross":
        third = n * 3 // 10
        draw.rectangle((third, 0, last - third, last), fill=fill)
        draw.rectangle((0, third, last, last - third), fill=fill)
    elif name == "ring":
        draw.ellipse((0, 0, last, last), fill=fill)
        hole = n * 7 // 24
        draw.ellipse((hole, hole, last - hole, last - hole), fill=(*colour, 0))
    else:
        raise ValueError(f"unknown shape {name!r}: one of {', '.join(SHAPES)}")
    return picture.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=16384)
def sprite(
    name: str, size: int, colour: tuple[int, int, int] | None = None, folder: Path | None = None
) -> np.ndarray:
    """A thing in a square box.

    ``size``: side of the box in pixels; the thing keeps a margin of one pixel (a sixteenth on large boxes).
    ``colour``: fill of a shape, sRGB 0..255 (sprites keep their own look). Returns (size, size, 4) float32 RGBA,
    colour 0..255 premultiplied, alpha 0..1. Raises SpritesMissing without font or folder, ValueError for a name
    that is neither shape nor sprite.
    """
    inner = size - 2 * max(1, size // 16)
    if name in SHAPES:
        picture = draw_shape(name, inner, colour or (128, 128, 128))
    else:
        picture = source(name, folder)
        scale = inner / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    out = np.asarray(canvas, dtype=np.float32).copy()
    out[..., 3] /= 255.0
    out[..., :3] *= out[..., 3:]
    out.setflags(write=False)
    return out
