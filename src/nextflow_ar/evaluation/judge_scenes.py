"""What the judge learns from: true renders, free mixtures with unknown things among them, and their
distortions.

Nothing here has passed a tokenizer or a generator. The distortions only imitate, from the outside, what
those do to a picture: blur, lost resolution, noise, JPEG blocks, colour drift, shifts and gentle warps.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nextflow_ar.data.playground.scenes import LEVELS, Scene, SceneSampler, render
from nextflow_ar.data.playground.sprites import sprite
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES
from nextflow_ar.evaluation.judge import SIZE_UNIT, STRIDE, UNKNOWN, JudgeConfig

FIRST_SEED = 9_000_000
"""The judge trains on SceneSampler seeds from here on and the generator never does."""
ACCURACY_SEED = 9_500_000
"""Seeds of the scenes on which the judge's accuracy is reported; never trained on."""

Label = tuple[str, str | None, float, float, float]  # name, colour, centre x, centre y, side (pixels)
_OTHERS = tuple(noun.name for noun in NOUNS[20:])
_EASY = LEVELS["easy"]


@dataclass(frozen=True)
class Example:
    """A picture (64, 64, 3) uint8, its things and its background."""

    picture: np.ndarray
    labels: tuple[Label, ...]
    background: str


def from_scene(scene: Scene) -> Example:
    """A playground scene as an example."""
    labels = tuple((t.name, t.colour, *t.centre, float(t.size)) for t in scene.things)
    return Example(render(scene), labels, scene.background)


def _strange(rng: np.random.Generator, size: int) -> np.ndarray:
    """A thing without a name: a sprite of no easy noun, or the left half of one easy sprite beside the
    right of another.
    """
    if rng.random() < 0.6:
        return sprite(str(rng.choice(_OTHERS)), size)
    first, second = (str(name) for name in rng.choice(_EASY.nouns, 2, replace=False))
    patch = sprite(first, size).copy()
    if rng.random() < 0.5:
        patch[:, size // 2 :] = sprite(second, size)[:, size // 2 :]
    else:
        patch[size // 2 :] = sprite(second, size)[size // 2 :]
    return patch


def _places(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """(x, y, side) of ``count`` boxes: one or two anywhere, more each in its quarter, a few pixels off."""
    side = int(rng.choice([32, 32, 28, 24, 36] if count < 3 else [32, 32, 30, 26]))
    sizes = [side + int(rng.integers(-2, 3)) * (rng.random() < 0.5) for _ in range(count)]
    for _ in range(50 if count < 3 else 0):
        corners = [rng.integers(0, 64 - size + 1, 2) for size in sizes]
        boxes = [(int(c[0]), int(c[1]), size) for c, size in zip(corners, sizes, strict=True)]
        if count < 2 or _clear(boxes[0], boxes[1]):
            return boxes
    boxes = []
    for size, quarter in zip(sizes, rng.permutation(4), strict=False):
        centre = 16 + 32 * np.array(divmod(int(quarter), 2)) + rng.integers(-3, 4, 2)
        x, y = (int(v) for v in np.clip(centre - size // 2, 0, 64 - size))
        boxes.append((x, y, size))
    return boxes


def _clear(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two boxes overlap by less than 3 pixels on some axis."""
    apart = max(abs(a[axis] + a[2] / 2 - b[axis] - b[2] / 2) for axis in (0, 1))
    return apart > (a[2] + b[2]) / 2 - 3


def mixture(rng: np.random.Generator, unknown: float) -> Example:
    """Nought to four things of any kinds, sizes and places (boxes may overlap by a few pixels), some unknown.

    Unlike the sampler's scenes, neighbours differ freely and sprites also stand on backgrounds of their own
    colour, so that the judge cannot infer one thing from another.
    """
    background = str(rng.choice(_EASY.colours))
    picture = np.empty((64, 64, 3), np.float32)
    picture[:] = _near(rng, COLOURS[background])
    labels: list[Label] = []
    for x, y, size in _places(rng, int(rng.choice(5, p=[0.03, 0.22, 0.25, 0.25, 0.25]))):
        middle = (x + size / 2, y + size / 2)
        name, colour, patch = _thing(rng, size, background, unknown)
        window = picture[y : y + size, x : x + size]
        window *= 1.0 - patch[..., 3:]
        window += patch[..., :3]
        labels.append((name, colour, *middle, float(size)))
    return Example(np.clip(picture + 0.5, 0, 255).astype(np.uint8), tuple(labels), background)


def _near(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    span = int(rng.choice([0, 12]))
    moved = np.clip(np.array(rgb) + rng.integers(-span, span + 1, 3), 0, 255)
    return int(moved[0]) // 2 * 2, int(moved[1]) // 2 * 2, int(moved[2]) // 2 * 2


def _thing(
    rng: np.random.Generator, size: int, background: str, unknown: float
) -> tuple[str, str | None, np.ndarray]:
    if rng.random() < unknown:
        return UNKNOWN, None, _strange(rng, size)
    if rng.random() < 0.4:
        name = str(rng.choice(SHAPES))
        colour = str(rng.choice([c for c in _EASY.colours if c != background]))
        return name, colour, sprite(name, size, _near(rng, COLOURS[colour]))
    name = str(rng.choice(_EASY.nouns))
    return name, None, sprite(name, size)


class ExampleStream:
    """Endless examples: ``shares`` of easy scenes, medium scenes and mixtures; example ``index`` is always
    the same.
    """

    def __init__(self, seed: int, shares: tuple[float, float, float], unknown: float) -> None:
        if seed < FIRST_SEED:
            raise ValueError(f"the judge's seeds start at {FIRST_SEED}, not {seed}")
        self.seed, self.unknown = seed, unknown
        self.shares = np.array(shares) / sum(shares)
        self.easy = SceneSampler(LEVELS["easy"], "any", seed)
        self.medium = SceneSampler(LEVELS["medium"], "any", seed + 1)

    def example(self, index: int) -> Example:
        """Example ``index``."""
        rng = np.random.default_rng([self.seed, index, 77])
        kind = int(rng.choice(3, p=self.shares))
        if kind == 2:
            return mixture(rng, self.unknown)
        return from_scene((self.easy, self.medium)[kind].scene(index))


def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as file:
        return np.asarray(file.convert("RGB"))


def distort(examples: list[Example], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Distorted pictures and the affine map that moved them.

    Returns (B, 3, 64, 64) float32 in -1..1 and (B, 4): scale, rotation in radians, shift x and y in pixels;
    see :func:`moved`. A quarter of the pictures keeps its place, a quarter its looks.
    """
    pixels = [
        _jpeg(e.picture, int(rng.integers(40, 95))) if rng.random() < 0.2 else e.picture for e in examples
    ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    b = len(examples)
    still = rng.random(b) < 0.25
    moves = np.stack(
        [
            np.where(still, 1.0, rng.uniform(0.9, 1.1, b)),
            np.where(still, 0.0, rng.normal(0, 0.06, b)),
            np.where(still, 0.0, rng.uniform(-4, 4, b)),
            np.where(still, 0.0, rng.uniform(-4, 4, b)),
        ],
        1,
    )
    x = _warp(x, moves, np.where(still, 0.0, rng.uniform(0, 1.2, b)), rng)
    x = _blur(x, rng)
    clean = rng.random(b) < 0.25
    gain = np.where(clean[:, None], 1.0, rng.uniform(0.93, 1.07, (b, 3)))
    drift = np.where(clean[:, None], 0.0, rng.uniform(-0.07, 0.07, (b, 3)))
    noise = np.where(clean, 0.0, rng.uniform(0, 0.08, b))
    x = x * _column(gain) + _column(drift)
    x = x + torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)) * _column(noise[:, None])
    return x.clamp_(-1, 1), torch.from_numpy(moves)


def _column(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, :, None, None]


def _warp(x: Tensor, moves: np.ndarray, wobble: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Scale and turn about the middle, then shift; a smooth random field of ``wobble`` pixels on top."""
    b, _, h, w = x.shape
    scale, angle, dx, dy = (torch.from_numpy(column.astype(np.float32)) for column in moves.T)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    ux, uy = dx / (w / 2), dy / (h / 2)
    theta = torch.stack(
        (torch.stack((cos, sin, -cos * ux - sin * uy), 1), torch.stack((-sin, cos, sin * ux - cos * uy), 1)),
        1,
    )
    grid = F.affine_grid(theta, [b, 3, h, w], align_corners=False)
    coarse = torch.from_numpy(rng.standard_normal((b, 2, 6, 6), dtype=np.float32)) * _column(wobble[:, None])
    field = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + field / (w / 2), padding_mode="border", align_corners=False)


def moved(x: float, y: float, move: np.ndarray, canvas: int) -> tuple[float, float]:
    """Where a point (pixels) lies after the affine part of :func:`distort`."""
    scale, angle, dx, dy = move
    half = canvas / 2
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    u, v = x - half, y - half
    return float(cos * u - sin * v + half + dx), float(sin * u + cos * v + half + dy)


def _blur(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Per picture: nothing, a Gaussian of up to 1.1 px, or a detour over 24 to 48 px."""
    parts = []
    size = x.shape[-1]
    for group in x.split(16):  # one strength per group of sixteen
        kind = rng.random()
        if kind < 0.3:
            parts.append(group)
        elif kind < 0.65:
            sigma = float(rng.uniform(0.3, 1.1))
            taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
            taps = (taps / taps.sum()).float()
            padded = F.pad(group, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
            wide = F.conv2d(padded, taps.view(1, 1, 1, 7))
            parts.append(F.conv2d(wide, taps.view(1, 1, 7, 1)).view_as(group))
        else:
            small = F.interpolate(group, size=int(rng.integers(24, 49)), mode="area")
            parts.append(F.interpolate(small, size=size, mode="bicubic", align_corners=False))
    return torch.cat(parts)


@dataclass(frozen=True)
class Targets:
    """What the network should say. Cells: (B, 16, 16) maps.

    ``heat``: Gaussian bumps, 1 at the centre's cell. ``weight``: how much a cell counts for the other
    heads. ``name``, ``colour``: indices (colour -1 where there is none). ``offset``: (B, 2, 16, 16) cells.
    ``size``: log(side / 32). ``background``: (B,).
    """

    heat: Tensor
    weight: Tensor
    name: Tensor
    colour: Tensor
    offset: Tensor
    size: Tensor
    background: Tensor


def targets(examples: list[Example], moves: np.ndarray, config: JudgeConfig) -> Targets:
    """Targets of distorted examples; ``moves`` as :func:`distort` returns them."""
    b, n = len(examples), config.canvas // STRIDE
    heat, weight = np.zeros((b, n, n), np.float32), np.zeros((b, n, n), np.float32)
    name, colour = np.zeros((b, n, n), np.int64), np.full((b, n, n), -1, np.int64)
    offset, size = np.zeros((b, 2, n, n), np.float32), np.zeros((b, n, n), np.float32)
    names = {word: k for k, word in enumerate((*config.names, UNKNOWN))}
    rows, columns = np.mgrid[0:n, 0:n]
    for k, example in enumerate(examples):
        for what, shade, x, y, side in example.labels:
            px, py = moved(x, y, moves[k], config.canvas)
            cx, cy = min(max(px / STRIDE, 0), n - 1), min(max(py / STRIDE, 0), n - 1)
            j, i = round(cx), round(cy)
            bump = np.exp(-((columns - j) ** 2 + (rows - i) ** 2) / 2.0).astype(np.float32)
            heat[k] = np.maximum(heat[k], bump)
            near = (bump > 0.3) & (
                bump > weight[k]
            )  # the centre's cell, its four neighbours and the diagonals
            weight[k][near] = bump[near]
            name[k][near] = names[what]
            colour[k][near] = config.colours.index(shade) if shade is not None else -1
            offset[k, 0][near], offset[k, 1][near] = cx - columns[near], cy - rows[near]
            size[k][near] = np.log(side * moves[k][0] / SIZE_UNIT)
    shades = np.array([config.colours.index(example.background) for example in examples])
    return Targets(*(torch.from_numpy(a) for a in (heat, weight, name, colour, offset, size, shades)))
