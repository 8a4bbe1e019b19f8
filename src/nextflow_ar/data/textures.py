"""Dead leaves: endless pictures with the statistics of photographs, for when there are no photographs.

Opaque shapes of every size (radii follow a power law) are dropped until they cover the canvas; occlusion gives edges and
1/f spectra as in natural pictures. Leaves are plain, shaded, striped or mottled.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

_LEAVES = 300
_OVERSAMPLE = 2


def dead_leaves(seed: tuple[int, ...], height: int, width: int) -> np.ndarray:
    """One picture, (height, width, 3) uint8; the seed decides everything."""
    rng = np.random.default_rng(seed)
    h, w = height * _OVERSAMPLE, width * _OVERSAMPLE
    labels = Image.new("I", (w, h), 0)
    draw = ImageDraw.Draw(labels)
    largest, smallest = 0.5 * max(h, w), 8.0
    # Radii with density r^-3 between the two ends, in any order: large leaves hide small ones as well as the other way.
    spread = rng.random(_LEAVES)
    radii = (smallest**-2 + spread * (largest**-2 - smallest**-2)) ** -0.5
    for number, radius in enumerate(radii, start=1):
        centre = rng.random(2) * (w, h)
        corners = int(rng.integers(3, 9))
        if rng.random() < 0.5:
            squeeze = radius * rng.uniform(0.4, 1.0)
            box = (centre[0] - radius, centre[1] - squeeze, centre[0] + radius, centre[1] + squeeze)
            draw.ellipse(box, fill=number)
        else:
            angles = np.sort(rng.random(corners)) * 2 * np.pi
            reach = radius * rng.uniform(0.6, 1.0, corners)
            points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * reach[:, None]
            draw.polygon([(float(x), float(y)) for x, y in points], fill=number)
    picture = _paint(rng, np.asarray(labels))
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX), dtype=np.uint8)


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    h, w = labels.shape
    count = _LEAVES + 1
    # Colours lie around a few of the picture's own hues, as they do outdoors and indoors.
    palette = rng.uniform(20, 235, (int(rng.integers(2, 6)), 1)) + rng.normal(0, 38, (1, 3))
    palette = palette + rng.normal(0, 22, palette.shape)
    base = palette[rng.integers(len(palette), size=count)] + rng.normal(0, 12, (count, 3))
    base += rng.normal(0, 32, (count, 1))
    out = base[labels]
    rows, columns = np.mgrid[0:h, 0:w].astype(np.float32)
    shade = rng.normal(0, 40, (count, 2)) * (rng.random(count) < 0.6)[:, None]
    out += (shade[labels, 0] * (rows / h - 0.5) + shade[labels, 1] * (columns / w - 0.5))[..., None]
    angle, period = rng.random(count) * np.pi, np.exp(rng.uniform(1.0, 3.5, count))
    stripes = rng.uniform(0, 45, count) * (rng.random(count) < 0.25)
    phase = rows * np.sin(angle)[labels] + columns * np.cos(angle)[labels]
    out += (stripes[labels] * np.sin(2 * np.pi * phase / period[labels]))[..., None]
    mottle = np.abs(rng.normal(0, 22, count)) * (rng.random(count) < 0.6)
    out += (mottle[labels] * _cloud(rng, h, w))[..., None]
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def _cloud(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Noise with a 1/f spectrum, deviation 1."""
    rows, columns = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    amplitude = 1.0 / np.maximum(np.hypot(rows, columns), 1.0 / max(h, w))
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(h, w))) * amplitude, s=(h, w))
    return noise / max(noise.std(), 1e-6)
