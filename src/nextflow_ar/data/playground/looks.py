"""Canvases to pixels: recoloured sprites, silhouettes, line drawings, turns, written words, moods and lights.

Every mood and light is an exact function of the pixels, so a change of one of them alone has one right answer.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.canvases import Canvas, Item
from nextflow_ar.data.playground.sprites import draw_shape, source
from nextflow_ar.data.playground.words import COLOURS, SHAPES
from nextflow_ar.data.playground.world import NATIVE

RGB = tuple[int, int, int]
PAPER: RGB = (245, 245, 245)
INK: RGB = (30, 30, 30)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_HUE_SPAN = 45.0  # degrees around a sprite's main hue that take the new colour
_GRAY = 0.28  # saturation below which a pixel keeps its look
_MARGIN = 2  # pixels around a written word
_FINE = 3  # line drawings are made this many times larger and reduced


def _hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and saturation 0..1 of (h, w, 3) values 0..255."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(
        high == red,
        (green - blue) / span,
        np.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    return hue * 60 % 360, (high - low) / np.maximum(high, 1e-6)


@lru_cache(maxsize=256)
def _recolouring(name: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a sprite: (h, w, 4) pixels, (h, w, 1) how much of each takes a new colour, and how bright each is relative to
    the median of those.
    """
    picture = np.asarray(source(name, folder), np.float32)
    rgb, alpha = picture[..., :3], picture[..., 3]
    hue, saturation = _hue(rgb)
    strong = (saturation > _GRAY) & (alpha > 128)
    tally = np.histogram(hue[strong], 72, (0, 360))[0]
    around = tally + np.roll(tally, 1) + np.roll(tally, -1)
    main = float(around.argmax()) * 5 + 2.5
    distance = np.abs((hue - main + 180) % 360 - 180)
    share = np.clip((_HUE_SPAN - distance) / 12, 0, 1) * np.clip((saturation - _GRAY + 0.1) / 0.1, 0, 1)
    light = rgb @ _LUMA
    middle = float(np.median(light[strong & (distance < _HUE_SPAN)]))
    return picture, share[..., None], np.clip(light / middle, 0.45, 1.6)[..., None]


def _recoloured(name: str, colour: str, folder: Path | None, rgb: RGB | None = None) -> Image.Image:
    """The sprite with its main hue replaced by the palette's colour, or by its shade ``rgb``."""
    picture, share, shade = _recolouring(name, folder)
    goal = np.array(rgb or COLOURS[colour], np.float32)
    new = np.where(shade <= 1, goal * shade, goal + (255 - goal) * (shade - 1) * 0.6)
    if colour == "black":  # nothing is darker than black: its shading goes upwards
        new = goal + (shade - 0.45) * 45
    made = np.concatenate([picture[..., :3] * (1 - share) + new * share, picture[..., 3:]], -1)
    return Image.fromarray(np.clip(made + 0.5, 0, 255).astype(np.uint8), "RGBA")


@lru_cache(maxsize=1024)
def _native(name: str, colour: str | None, folder: Path | None) -> Image.Image:
    if colour is None or colour == NATIVE.get(name):
        return source(name, folder)
    return _recoloured(name, colour, folder)


@lru_cache(maxsize=1)
def _all_shades() -> dict[str, list[RGB]]:
    tries = np.random.default_rng(20_000).integers(0, 256, (20_000, 3))
    palette = np.array(list(COLOURS.values()))
    nearest = ((tries[:, None] - palette) ** 2).sum(-1).argmin(1)
    return {
        name: [(int(r), int(g), int(b)) for r, g, b in tries[nearest == number]]
        for number, name in enumerate(COLOURS)
    }


def shades(colour: str) -> list[RGB]:
    """Many colours that go by this name: those to which no other palette colour is nearer."""
    return _all_shades()[colour]


def _inside(
    name: str, colour: str | None, size: int, folder: Path | None, rgb: RGB | None = None
) -> Image.Image:
    """The thing in a square box with a small margin, RGBA. ``rgb``: the shade of its colour."""
    inner = size - 2 * max(1, size // 16)
    if name in SHAPES:
        picture = draw_shape(name, inner, rgb or COLOURS[colour or "black"])
    else:
        shaded = _recoloured(name, colour, folder, rgb) if rgb and colour else None
        picture = shaded or _native(name, colour, folder)
        scale = inner / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    box = Image.new("RGBA", (size, size))
    box.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return box


def _lines(name: str, colour: str | None, size: int, folder: Path | None) -> np.ndarray:
    """How much ink a line drawing of the thing puts on each pixel, (size, size) 0..1: edges of its outline and of its
    brightness.
    """
    large = np.asarray(_inside(name, colour, size * _FINE, folder), np.float32)
    alpha = large[..., 3] / 255
    light = (large[..., :3] @ _LUMA) / 255 * alpha + (1 - alpha)
    edges = np.zeros_like(alpha)
    for plane, gain in ((alpha, 1.0), (light, 2.2)):
        framed = np.pad(plane, 1, mode="edge")
        shifts = [
            framed[dy : dy + plane.shape[0], dx : dx + plane.shape[1]] for dy in range(3) for dx in range(3)
        ]
        edges = np.maximum(edges, (np.max(shifts, 0) - np.min(shifts, 0)) * gain)
    ink = Image.fromarray((np.clip(edges * 1.2 - 0.2, 0, 1) * 255).astype(np.uint8))
    small = np.asarray(ink.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    return np.clip(small * 1.9, 0, 1)


@lru_cache(maxsize=4096)
def patch(
    name: str,
    colour: str | None,
    size: int,
    turn: int,
    ink: RGB | None,
    lines: bool,
    folder: Path | None,
    rgb: RGB | None = None,
) -> np.ndarray:
    """A thing in its box, (size, size, 4) float32 RGBA: premultiplied 0..255, alpha 0..1.

    ``ink``: its one colour in a silhouette or a line drawing (``lines``), None in full colour. ``rgb``: shade of a shape.
    """
    out = np.asarray(_inside(name, colour, size, folder, rgb), np.float32).copy()
    out[..., 3] /= 255.0
    if ink is not None:
        if lines:
            out[..., 3] = _lines(name, colour, size, folder)
        out[..., :3] = ink
    out[..., :3] *= out[..., 3:]
    out = np.ascontiguousarray(np.rot90(out, turn))
    out.setflags(write=False)
    return out


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def word_box(text: str, size: int) -> tuple[int, int]:
    """(width, height) in pixels of a written word with its margin."""
    left, top, right, bottom = font(size).getbbox(text, stroke_width=_stroke(size))
    return int(right - left) + 1 + 2 * _MARGIN, int(bottom - top) + 1 + 2 * _MARGIN


def _stroke(size: int) -> float:
    return size / 32  # the font is thin: a little stroke makes it legible when it is small


@lru_cache(maxsize=4096)
def word_mask(text: str, size: int) -> np.ndarray:
    """(height, width) float32 0..1 of a written word."""
    width, height = word_box(text, size)
    left, top, _, _ = font(size).getbbox(text, stroke_width=_stroke(size))
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).text(
        (_MARGIN - left, _MARGIN - top),
        text,
        fill=255,
        font=font(size),
        stroke_width=_stroke(size),
        stroke_fill=255,
    )
    return np.asarray(picture, np.float32) / 255


def _brightness(rgb: RGB) -> float:
    return float(np.dot(rgb, _LUMA))


def ink_on(background: str) -> RGB:
    """The colour of silhouettes: dark, or white on a dark background."""
    return INK if _brightness(COLOURS[background]) > 105 else PAPER


@lru_cache(maxsize=1024)
def stands_out(colour: str, background: str, by: float = 80) -> bool:
    """Whether two colours differ in brightness by so much; the default is what a word needs to be read."""
    return abs(_brightness(COLOURS[colour]) - _brightness(COLOURS[background])) > by


@lru_cache(maxsize=256)
def _lighting(light: str, height: int, width: int) -> np.ndarray:
    """Factor per pixel, (height, width, 1): from 1.15 at the light to 0.4 far from it."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y + 0.5) / height, (x + 0.5) / width
    if light == "middle":
        far = np.clip(np.hypot(y - 0.5, x - 0.5) / 0.62, 0, 1) ** 1.5
    else:
        far = {"left": x, "right": 1 - x, "above": y, "below": 1 - y}[light]
    return (1.15 - 0.75 * far)[..., None].astype(np.float32)


def _in_mood(picture: np.ndarray, mood: str) -> np.ndarray:
    if mood == "warm":
        return picture * np.array([1.0, 0.88, 0.66], np.float32) + np.array([28, 8, 0], np.float32)
    if mood == "cold":
        return picture * np.array([0.68, 0.88, 1.0], np.float32) + np.array([0, 8, 32], np.float32)
    if mood == "dark":
        return picture * 0.38
    if mood == "bright":
        return 255 - (255 - picture) * 0.5
    return np.repeat((picture @ _LUMA)[..., None], 3, -1)


def _backdrop(canvas: Canvas) -> np.ndarray:
    height, width = canvas.size
    picture = np.empty((height, width, 3), np.float32)
    if canvas.style == "line":
        picture[:] = PAPER
        return picture
    first = np.array(COLOURS[canvas.background], np.float32) + canvas.tint
    if canvas.second is None:
        picture[:] = first
        return picture
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    picture[:] = first * (1 - ramp) + np.array(COLOURS[canvas.second], np.float32) * ramp
    return picture


def _blend(picture: np.ndarray, item: Item, canvas: Canvas, folder: Path | None) -> None:
    lines = canvas.style == "line"
    ink = None if canvas.style == "full" else INK if lines else ink_on(canvas.background)
    make = patch if item.rgb is None else patch.__wrapped__  # shades hardly ever come twice
    drawn = make(item.name, item.colour, item.size, item.turn % 4, ink, lines, folder, item.rgb)
    window = picture[item.y : item.y + item.size, item.x : item.x + item.size]
    window *= 1.0 - drawn[..., 3:]
    window += drawn[..., :3]


def render(canvas: Canvas, sprite_folder: Path | None = None) -> np.ndarray:
    """Picture of a canvas, (height, width, 3) uint8 sRGB. Raises SpritesMissing when it shows a sprite without font."""
    picture = _backdrop(canvas)
    for item in canvas.items:
        _blend(picture, item, canvas, sprite_folder)
    if canvas.word is not None:
        word = canvas.word
        mask = word_mask(word.text, word.font)[..., None]
        colour = INK if canvas.style == "line" else COLOURS[word.colour]
        window = picture[word.y : word.y + word.height, word.x : word.x + word.width]
        window *= 1.0 - mask
        window += mask * np.array(colour, np.float32)
    if canvas.light is not None:
        picture *= _lighting(canvas.light, *canvas.size)
    if canvas.mood is not None:
        picture = _in_mood(np.clip(picture, 0, 255), canvas.mood)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
