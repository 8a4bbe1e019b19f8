"""What the judge of the wide world learns from: every picture of the playground's tasks, and free mixtures with strange
things and words that are none.

Labels are exact, since a picture is a canvas. Unlike a playground's episode, a mixture joins anything with anything,
turned, before any background, so that one thing cannot be inferred from another.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.canvases import Canvas, Item, Word, base_of, canvas_sizes
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.drawing import mood_shows
from nextflow_ar.data.playground.looks import render, stands_out, word_box
from nextflow_ar.data.playground.sprites import find_font, source
from nextflow_ar.data.playground.world import (
    ALIKE_FLAT,
    ALIKE_TURNED,
    COLOUR_NAMES,
    LIGHTS,
    MOODS,
    NAMES,
    NATIVE,
    SHAPES,
    SPRITES,
    WRITTEN,
    colours_of,
    near_colours,
)
from nextflow_ar.evaluation.world.lettering import letter_centres
from nextflow_ar.evaluation.world.verdict import UNKNOWN

FIRST_SEED = 19_000_000
"""Seeds of the judge's episodes start here. Generators, recipes and the benchmark stay below."""
ACCURACY_SEED = 19_500_000
"""Seeds of the pictures on which its accuracy is reported; never trained on."""
_STRANGE = (
    "🐨🦊🐵🦁🐯🐹🐻🐼🦄🐔🐺🦒🦓🐊🦀🦞🐬🦈🥑🍆🥦🍇🍐🍑🍒🥝🍞🧀🥚🍦"
    "☕🏈⚽🎾🎯🎲🎻🎺💡🔦📱💻🛒🚜🚲🛵🏰🗿⛲🌋🪐☃🎃🧸🪁🧲🪜🧦👟👓"
)
_CHIMERAS = 160
TASKS: tuple[str, ...] = (
    "draw_scene", "draw_scene", "draw_sizes", "draw_places", "draw_word", "draw_word", "draw_style", "draw_mood",
    "draw_mood", "caption_full", "ask_choice", "edit_add", "edit_replace", "edit_colour", "edit_size", "edit_rotate",
    "edit_background", "edit_mood", "edit_light", "edit_style", "edit_word_add", "edit_word_replace", "edit_zoom_in",
    "edit_zoom_out", "edit_view_rotate", "subject_three", "subject_extract", "story", "recipe", "video_draw", "sum_drawn",
)  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """What a picture of (height, width) shows. Lengths in its pixels.

    ``things``: (name, colour or None where none can be seen, x, y, side, turn or None where it could be overlooked); a
    name of None is not to be told. ``letters``: (letter, x, y). ``word_colour``, ``background``, ``second``: None where
    they do not show; ``second`` is "" for a plain background.
    """

    size: tuple[int, int]
    things: tuple[tuple[str | None, str | None, float, float, float, int | None], ...]
    letters: tuple[tuple[str, float, float], ...]
    word_colour: str | None
    background: str | None
    second: str | None
    style: str
    mood: str
    light: str


def labels_of(canvas: Canvas) -> Labels:
    """The labels of a canvas; items that are called "unknown..." have no name."""
    things = []
    for item in canvas.items:
        strange = item.name.startswith(UNKNOWN)
        flat = canvas.style == "silhouette" and item.name in ALIKE_FLAT
        name = UNKNOWN if strange else None if flat else item.name
        colour = item.colour if canvas.shows_colours else None
        turn = None if strange or flat or item.name in ALIKE_TURNED else item.turn % 4
        things.append((name, colour, *item.centre, float(item.size), turn))
    letters, word_colour = [], None
    if canvas.word is not None:
        word = canvas.word
        centres = letter_centres(word.text, word.font)
        letters = [(c, word.x + x, word.y + y) for c, (x, y) in zip(word.text, centres, strict=True)]
        word_colour = word.colour if canvas.style != "line" and canvas.mood != "gray" else None
    ground = canvas.style != "line" and canvas.mood != "gray"
    return Labels(
        canvas.size,
        tuple(things),
        tuple(letters),
        word_colour,
        canvas.background if ground else None,
        (canvas.second or "") if ground else None,
        canvas.style,
        canvas.mood or "",
        canvas.light or "",
    )


def strange_sprites(folder: Path) -> int:
    """Fill a folder with the playground's sprites and, as "unknown-K", with foreign ones and with halves of two sprites
    glued together; returns how many of those. Raises SpritesMissing.
    """
    for noun in SPRITES:
        source(noun.name, None).save(folder / f"{noun.name}.png")
    count = 0
    path = find_font()
    assert path is not None  # source() has raised otherwise
    face = ImageFont.truetype(str(path), 109)
    for glyph in _STRANGE:
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((8, 8), glyph, font=face, embedded_color=True)
        box = picture.getchannel("A").getbbox()
        if box is not None and not any(glyph == noun.glyph for noun in SPRITES):
            picture.crop(box).save(folder / f"{UNKNOWN}-{count}.png")
            count += 1
    rng = random.Random(f"{UNKNOWN} {FIRST_SEED}")
    for _ in range(_CHIMERAS):
        first, second = (
            source(noun.name, None).resize((128, 128), Image.Resampling.LANCZOS)
            for noun in rng.sample(SPRITES, 2)
        )
        half = (64, 0, 128, 128) if rng.random() < 0.5 else (0, 64, 128, 128)
        first = first.copy()
        first.paste(second.crop(half), half)
        first.save(folder / f"{UNKNOWN}-{count}.png")
        count += 1
    return count


class Mixtures:
    """Free canvases of a size: nought to five things of any kind, maybe strange, a word, a style, a mood, a light."""

    def __init__(self, folder: Path, strange: int, unknown: float) -> None:
        self.folder, self.strange, self.unknown = folder, strange, unknown

    def canvas(self, rng: random.Random, size: tuple[int, int]) -> Canvas:
        """One canvas; draws again until what it shows can be told."""
        while True:
            found = self._propose(rng, size)
            if found is not None:
                return found

    def _propose(self, rng: random.Random, size: tuple[int, int]) -> Canvas | None:
        background = rng.choice(COLOUR_NAMES)
        style = rng.choices(("full", "line", "silhouette"), (0.72, 0.14, 0.14))[0]
        second = None
        if style == "full" and rng.random() < 0.12:
            second = rng.choice([c for c in COLOUR_NAMES if c != background])
        span = rng.choice((0, 0, 12))
        tint = (rng.randint(-span, span), rng.randint(-span, span), rng.randint(-span, span))
        canvas = Canvas(*size, background, (), second, tint, style=style)
        word = self._word(rng, canvas) if rng.random() < 0.4 else None
        canvas = replace(canvas, word=word, items=tuple(self._items(rng, canvas, word)))
        dice = rng.random()
        if dice < 0.2 and style != "line":
            canvas = replace(canvas, mood=rng.choice(MOODS))
        elif dice < 0.4 and style != "line":
            canvas = replace(canvas, light=rng.choice(LIGHTS))
        if (canvas.mood or canvas.light) and (second is not None or not mood_shows(canvas)):
            return None
        return canvas

    def _items(self, rng: random.Random, canvas: Canvas, word: Word | None) -> list[Item]:
        base = base_of(canvas.size)
        count = rng.choices(range(6), (0.05, 0.2, 0.25, 0.2, 0.2, 0.1))[0]
        side = rng.choice((18, 20, 24, 24, 28, 32, 32, 32, 36, 40, 46))
        side = min(side, {0: 48, 1: 48, 2: 36, 3: 30}.get(count, 26)) * base // 64
        placed: list[Item] = []
        twin: tuple[str, str | None] | None = None
        for _ in range(count):
            own = max(17 * base // 64, side + rng.choice((0, 0, 0, -4, -2, 2, 4)) * base // 64)
            if own > min(canvas.size):
                continue
            name, colour = twin if twin and rng.random() < 0.3 else self._kind(rng, canvas)
            twin = (name, colour)
            turn = rng.choice((1, 2, 3)) if rng.random() < 0.25 else 0
            for _ in range(12):
                x, y = rng.randint(0, canvas.width - own), rng.randint(0, canvas.height - own)
                item = Item(name, colour, x, y, own, turn)
                if all(_clear(item, other, 3 * base // 64) for other in placed) and _off(item, word):
                    placed.append(item)
                    break
        return placed

    def _kind(self, rng: random.Random, canvas: Canvas) -> tuple[str, str | None]:
        if rng.random() < self.unknown:
            return f"{UNKNOWN}-{rng.randrange(self.strange)}", None
        while True:
            name = rng.choice(SHAPES) if rng.random() < 0.12 else rng.choice(NAMES)
            if canvas.style == "silhouette" and name in ALIKE_FLAT:
                continue
            free = colours_of(name)
            colour = (
                NATIVE[name] if name in NATIVE and rng.random() < 0.3 else rng.choice(free) if free else None
            )
            if canvas.style != "full":
                return name, colour
            grounds = {canvas.background, canvas.second}
            if colour in grounds or (rng.random() < 0.6 and near_colours(name, colour) & grounds):
                continue
            return name, colour

    def _word(self, rng: random.Random, canvas: Canvas) -> Word | None:
        grounds = [c for c in (canvas.background, canvas.second) if c]
        colours = [c for c in COLOUR_NAMES if all(stands_out(c, ground) for ground in grounds)]
        if not colours and canvas.style != "line":
            return None
        text = rng.choice(WRITTEN)
        if rng.random() < 0.6:
            letters = rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 6))
            text = "".join(letters)
        face = round(base_of(canvas.size) * rng.choice((0.36, 0.3, 0.3, 0.25, 0.25)))
        width, height = word_box(text, face)
        if width > canvas.width or height > canvas.height:
            return None
        x, y = rng.randint(0, canvas.width - width), rng.randint(0, canvas.height - height)
        return Word(text, rng.choice(colours or ["black"]), x, y, width, height, face)


def _clear(a: Item, b: Item, by: int) -> bool:
    """Whether two boxes overlap by less than ``by`` pixels on some axis."""
    apart = max(abs(a.centre[0] - b.centre[0]), abs(a.centre[1] - b.centre[1]))
    return apart > (a.size + b.size) / 2 - by


def _off(item: Item, word: Word | None) -> bool:
    if word is None:
        return True
    top, left, bottom, right = item.box
    a, b, c, d = word.box
    return bottom <= a or c <= top or right <= b or d <= left


class ExampleStream:
    """Endless pictures with labels: ``tasks`` is the share of true canvases of the playground's tasks, the others are
    mixtures with a chance of ``unknown`` things. Numbers name pictures: the same number is always the same.
    """

    def __init__(self, seed: int, tasks: float, unknown: float) -> None:
        if seed < FIRST_SEED:
            raise ValueError(f"the judge's seeds start at {FIRST_SEED}, not {seed}")
        self.seed, self.tasks = seed, tasks
        self._held = tempfile.TemporaryDirectory(prefix="nextflow-ar-judge-")
        folder = Path(self._held.name)
        self.mixtures = Mixtures(folder, strange_sprites(folder), unknown)

    def size(self, number: int) -> tuple[int, int]:
        """Canvas size (height, width) of batch ``number``."""
        return any_size(random.Random(f"judge canvas {self.seed} {number}"))

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[Labels]]:
        """``count`` pictures (count, H, W, 3) uint8 of one canvas size."""
        rng = random.Random(f"judge {self.seed} {number}")
        size = self.size(number)
        canvases: list[Canvas] = []
        for k in range(round(count * self.tasks)):
            task, level = rng.choice(TASKS), rng.choices(("world", "wide", "blocks"), (0.5, 0.35, 0.15))[0]
            try:
                found = episode(task, number * count + k, self.seed, "any", size, level)
            except RuntimeError:  # nothing of this task fits so narrow a canvas
                continue
            canvases.append(rng.choice(found.pictures).canvas)
        while len(canvases) < count:
            canvases.append(self.mixtures.canvas(rng, size))
        pictures = np.stack([render(canvas, self.mixtures.folder) for canvas in canvases])
        return pictures, [labels_of(canvas) for canvas in canvases]


def any_size(rng: random.Random) -> tuple[int, int]:
    """A canvas: square ones half of the time, every level of scales."""
    sizes: Sequence[tuple[int, int]] = canvas_sizes(rng.choices((8, 10, 12), (0.6, 0.2, 0.2))[0])
    return sizes[0] if rng.random() < 0.6 else rng.choice(sizes)
