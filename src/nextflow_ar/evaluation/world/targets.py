"""From labels to what the network should say, and the distortions that pictures go through before it sees them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nextflow_ar.data.playground.canvases import base_of
from nextflow_ar.evaluation.world.detector import BASE, LETTER_STRIDE, SIZE_UNIT, STRIDE, DetectorConfig
from nextflow_ar.evaluation.world.examples import Labels
from nextflow_ar.evaluation.world.verdict import UNKNOWN

Moves = np.ndarray
"""(B, 3): scale about the middle, shift x and y in pixels at base 64."""


@dataclass(frozen=True)
class Targets:
    """Cells of 4 px, (B, h, w): ``heat`` (1 at centres), ``weight`` of the other heads, ``colour_weight`` (letters' cells
    have one too), ``name``, ``colour``, ``turn`` (-1: not to be told), ``offset`` (B, 2, h, w), ``size``. Cells of 2 px:
    ``letter_heat``, ``letter_weight``, ``letter``. ``whole``: (B,) index per head, -1 where it does not show.
    """

    heat: Tensor
    weight: Tensor
    colour_weight: Tensor
    name: Tensor
    colour: Tensor
    turn: Tensor
    offset: Tensor
    size: Tensor
    letter_heat: Tensor
    letter_weight: Tensor
    letter: Tensor
    whole: dict[str, Tensor]


def _stamp(heat: np.ndarray, weight: np.ndarray, cx: float, cy: float) -> np.ndarray:
    """Put a bump around (cx, cy) cells into ``heat`` and ``weight``; returns the cells that are this thing's."""
    rows, columns = np.ogrid[0 : heat.shape[0], 0 : heat.shape[1]]
    j, i = round(min(max(cx, 0), heat.shape[1] - 1)), round(min(max(cy, 0), heat.shape[0] - 1))
    bump = np.exp(-((columns - j) ** 2 + (rows - i) ** 2) / 2.0).astype(np.float32)
    np.maximum(heat, bump, out=heat)
    near = (bump > 0.3) & (bump > weight)
    weight[near] = bump[near]
    return near


def targets(
    labels: Sequence[Labels], moves: Moves, shape: tuple[int, int], config: DetectorConfig
) -> Targets:
    """Targets of pictures at base 64 whose padded size is ``shape`` (h, w), moved by ``moves``."""
    b, h, w = len(labels), shape[0] // STRIDE, shape[1] // STRIDE
    names = {word: k for k, word in enumerate((*config.names, UNKNOWN))}
    colours = {word: k for k, word in enumerate(config.colours)} | {None: -1}
    heat, weight, size, extra = (np.zeros((b, h, w), np.float32) for _ in range(4))
    name, colour, turn = (np.full((b, h, w), -1, np.int64) for _ in range(3))
    offset = np.zeros((b, 2, h, w), np.float32)
    fine = (b, 2 * h, 2 * w)
    letter_heat, letter_weight = np.zeros(fine, np.float32), np.zeros(fine, np.float32)
    letter = np.full(fine, -1, np.int64)
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    for k, one in enumerate(labels):
        scale = BASE / base_of(one.size)
        for what, shade, x, y, side, turned in one.things:
            px, py = moved(x * scale, y * scale, moves[k], one.size, scale)
            cx, cy = px / STRIDE, py / STRIDE
            near = _stamp(heat[k], weight[k], cx, cy)
            name[k][near] = names[what] if what is not None else -1
            colour[k][near] = colours[shade]
            turn[k][near] = -1 if turned is None else turned
            offset[k, 0][near], offset[k, 1][near] = cx - columns[near], cy - rows[near]
            size[k][near] = np.log(side * scale * moves[k][0] / SIZE_UNIT)
        for sign, x, y in one.letters:
            px, py = moved(x * scale, y * scale, moves[k], one.size, scale)
            near = _stamp(letter_heat[k], letter_weight[k], px / LETTER_STRIDE, py / LETTER_STRIDE)
            letter[k][near] = config.letters.index(sign)
            if one.word_colour is not None:  # the word's colour is read where its letters stand
                i, j = int(py / STRIDE), int(px / STRIDE)
                if 0 <= i < h and 0 <= j < w and weight[k][i, j] == 0:
                    colour[k][i, j], extra[k][i, j] = colours[one.word_colour], 0.5
    whole = {
        "background": [colours[one.background] for one in labels],
        "second": [-1 if one.second is None else ("", *config.colours).index(one.second) for one in labels],
        "style": [config.styles.index(one.style) for one in labels],
        "mood": [("", *config.moods).index(one.mood) for one in labels],
        "light": [("", *config.lights).index(one.light) for one in labels],
    }
    return Targets(
        heat=torch.from_numpy(heat),
        weight=torch.from_numpy(weight),
        colour_weight=torch.from_numpy(weight + extra),
        name=torch.from_numpy(name),
        colour=torch.from_numpy(colour),
        turn=torch.from_numpy(turn),
        offset=torch.from_numpy(offset),
        size=torch.from_numpy(size),
        letter_heat=torch.from_numpy(letter_heat),
        letter_weight=torch.from_numpy(letter_weight),
        letter=torch.from_numpy(letter),
        whole={key: torch.tensor(values) for key, values in whole.items()},
    )


def moved(x: float, y: float, move: np.ndarray, size: tuple[int, int], scale: float) -> tuple[float, float]:
    """Where a point at base 64 lies after :func:`distort`; ``size`` (height, width) is the picture's own."""
    middle_x, middle_y = size[1] * scale / 2, size[0] * scale / 2
    return middle_x + (x - middle_x) * move[0] + move[1], middle_y + (y - middle_y) * move[0] + move[2]


def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as file:
        return np.asarray(file.convert("RGB"))


def compressed(pictures: np.ndarray, rng: np.random.Generator, share: float = 0.15) -> np.ndarray:
    """Some pictures (B, H, W, 3) uint8 with JPEG's blocks."""
    pixels = [_jpeg(p, int(rng.integers(45, 95))) if rng.random() < share else p for p in pictures]
    return np.stack(pixels)


def distort(x: Tensor, size: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Moves]:
    """Pictures (B, 3, h, w) at base 64, distorted as drawing models distort: small shifts, gentle warps, blur, noise,
    drifting colours. ``size``: (height, width) of them without padding. Half keep their place, a third their looks.
    """
    b = len(x)
    still = rng.random(b) < 0.5
    moves = np.stack(
        [
            np.where(still, 1.0, rng.uniform(0.94, 1.04, b)),
            np.where(still, 0.0, rng.uniform(-2.5, 2.5, b)),
            np.where(still, 0.0, rng.uniform(-2.5, 2.5, b)),
        ],
        1,
    )
    x = _warp(x, size, moves, np.where(still, 0.0, rng.uniform(0, 0.8, b)), rng)
    x = _blur(x, rng)
    clean = rng.random(b) < 0.33
    gain = np.where(clean[:, None], 1.0, rng.uniform(0.95, 1.05, (b, 3)))
    drift = np.where(clean[:, None], 0.0, rng.uniform(-0.05, 0.05, (b, 3)))
    noise = np.where(clean, 0.0, rng.uniform(0, 0.06, b))
    x = x * _column(gain) + _column(drift)
    x = x + torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)) * _column(noise[:, None])
    return x.clamp_(-1, 1), moves


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, :, None, None]


def _warp(
    x: Tensor, size: tuple[int, int], moves: Moves, wobble: np.ndarray, rng: np.random.Generator
) -> Tensor:
    """Scale about the middle of ``size``, shift; a smooth random field of ``wobble`` pixels on top."""
    b, _, h, w = x.shape
    scale, dx, dy = (torch.from_numpy(column.astype(np.float32))[:, None, None] for column in moves.T)
    rows = torch.arange(h, dtype=torch.float32)[None, :, None] + 0.5
    columns = torch.arange(w, dtype=torch.float32)[None, None, :] + 0.5
    middle_y, middle_x = size[0] / 2, size[1] / 2
    coarse = torch.from_numpy(rng.standard_normal((b, 2, 6, 6), dtype=np.float32)) * _column(wobble[:, None])
    field = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)
    at_y = middle_y + (rows - dy - middle_y) / scale + field[:, 1]
    at_x = middle_x + (columns - dx - middle_x) / scale + field[:, 0]
    grid = torch.stack((at_x * (2 / w) - 1, at_y * (2 / h) - 1), -1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blur(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Per group of eight pictures: nothing, a Gaussian of up to 0.8 px, or a detour over three quarters of the pixels."""
    parts = []
    for group in x.split(8):
        kind = rng.random()
        if kind < 0.5:
            parts.append(group)
        elif kind < 0.8:
            taps = torch.exp(-0.5 * (torch.arange(-2, 3) / float(rng.uniform(0.3, 0.8))) ** 2)
            taps = (taps / taps.sum()).float()
            padded = F.pad(group, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[:, None]
            wide = F.conv2d(padded, taps.view(1, 1, 1, 5))
            parts.append(F.conv2d(wide, taps.view(1, 1, 5, 1)).view_as(group))
        else:
            share = float(rng.uniform(0.6, 0.9))
            size = (round(x.shape[-2] * share), round(x.shape[-1] * share))
            small = F.interpolate(group, size=size, mode="area")
            parts.append(F.interpolate(small, size=x.shape[-2:], mode="bicubic", align_corners=False))
    return torch.cat(parts)
