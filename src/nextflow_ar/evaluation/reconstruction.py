"""Pictures through the image tokenizer and back, measured: per file, and beside JPEG and WebP at the same size."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.metrics import psnr, ssim
from nextflow_ar.tokenizer.pictures import Fit, PictureError, open_picture, save_picture
from nextflow_ar.types import Codes

_SHEET_SIDE = 512
_SHEET_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One picture. ``psnr`` in dB, ``ssim`` (None below 11 pixels), ``bits_per_pixel`` of its codes, ``scales`` encoded."""

    file: str
    out: str
    width: int
    height: int
    scales: int
    psnr: float
    ssim: float | None
    bits_per_pixel: float


@dataclass(frozen=True)
class Reconstructions:
    """``rows``: the pictures that could be read; ``broken``: file -> why it could not."""

    rows: list[Row]
    broken: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"pictures": [asdict(row) for row in self.rows], "broken": self.broken, "mean": self.mean()}

    def mean(self) -> dict[str, float]:
        """Means over the pictures."""
        if not self.rows:
            return {}
        similar = [row.ssim for row in self.rows if row.ssim is not None]
        return {
            "psnr": round(float(np.mean([row.psnr for row in self.rows])), 2),
            "ssim": round(float(np.mean(similar)), 4) if similar else math.nan,
            "bits_per_pixel": round(float(np.mean([row.bits_per_pixel for row in self.rows])), 4),
        }

    def table(self) -> str:
        """For people."""
        lines = ["  PSNR   SSIM    bpp  scales  size       file"]
        for row in self.rows:
            similar = "     -" if row.ssim is None else f"{row.ssim:6.3f}"
            size = f"{row.width}x{row.height}"
            lines.append(
                f"{row.psnr:6.2f} {similar} {row.bits_per_pixel:6.3f} {row.scales:7d}  {size:10s} {row.file} -> {row.out}"
            )
        if len(self.rows) > 1:
            m = self.mean()
            lines.append(
                f"{m['psnr']:6.2f} {m['ssim']:6.3f} {m['bits_per_pixel']:6.3f}  mean of {len(self.rows)}"
            )
        if self.broken:
            lines.append(f"{len(self.broken)} could not be read:")
            lines += [f"  {why}" for why in self.broken.values()]
        return "\n".join(lines)


def bits_per_pixel(
    tokenizer: ImageTokenizer, codes: Codes, height: int, width: int, scales: int | None = None
) -> float:
    """Bits of an image's codes, without entropy coding, by pixel of a picture of this size."""
    count = codes.schedule.offsets[
        len(codes.schedule) if scales is None else min(scales, len(codes.schedule))
    ]
    return count * math.log2(tokenizer.config.quantizer.codebook_size) / (height * width)


def reconstruct_files(
    tokenizer: ImageTokenizer,
    files: list[Path],
    out: Path,
    *,
    num_scales: int | None = None,
    upto_scale: int | None = None,
    fit: Fit = "pad",
) -> Reconstructions:
    """Encode and decode every file, write the results and ``side_by_side.png`` into ``out``. Broken files are passed over
    and listed. Raises PictureError when ``out`` cannot be written.
    """
    rows: list[Row] = []
    pairs: list[np.ndarray] = []
    broken: dict[str, str] = {}
    used: set[str] = {"side_by_side.png"}
    for path in files:
        try:
            picture = open_picture(path)
            codes = tokenizer.encode(picture, num_scales=num_scales, fit=fit)
        except (PictureError, ValueError) as error:
            told = str(error) if isinstance(error, PictureError) else f"{path}: {error}"
            broken[str(path)] = told
            continue
        assert isinstance(codes, Codes)
        decoded = tokenizer.decode(codes, upto_scale)
        assert isinstance(decoded, Image.Image)
        before, after = _seen(picture, codes), np.asarray(decoded)
        name = path.stem + ".png"
        while name in used:
            name = "_" + name
        used.add(name)
        save_picture(after, out / name)
        if len(pairs) < _SHEET_ROWS:
            pairs.append(np.concatenate([_small(before), _small(after)], axis=1))
        a, b = torch.from_numpy(before.copy())[None], torch.from_numpy(after.copy())[None]
        similar = round(float(ssim(a, b)), 4) if min(before.shape[:2]) >= 11 else None
        height, width = before.shape[:2]
        bits = bits_per_pixel(tokenizer, codes, height, width, upto_scale)
        count = len(codes.schedule)
        quality = round(float(psnr(a, b)), 2)
        rows.append(Row(str(path), str(out / name), width, height, count, quality, similar, round(bits, 4)))
    if pairs:
        widest = max(pair.shape[1] for pair in pairs)
        padded = [np.pad(p, ((0, 0), (0, widest - p.shape[1]), (0, 0)), constant_values=255) for p in pairs]
        save_picture(np.concatenate(padded, axis=0), out / "side_by_side.png")
    return Reconstructions(rows, broken)


def _seen(picture: Image.Image, codes: Codes) -> np.ndarray:
    """The part of a picture that its codes stand for, at its own size."""
    assert codes.frame is not None
    height, width = codes.frame.size
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)), np.uint8)


def _small(pixels: np.ndarray) -> np.ndarray:
    if max(pixels.shape[:2]) <= _SHEET_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    return np.asarray(picture)


def codec_at(pixels: np.ndarray, bits: float, codec: Literal["JPEG", "WEBP"]) -> tuple[np.ndarray, float]:
    """A picture through JPEG or WebP at the highest quality whose whole file has at most ``bits`` bits per pixel; or, where
    even the lowest has more, at the lowest. Returns the picture and the bits per pixel that it took.
    """
    area = pixels.shape[0] * pixels.shape[1]
    low, high = (1, 95) if codec == "JPEG" else (0, 100)
    best = _packed(pixels, codec, low)
    while low <= high:
        middle = (low + high) // 2
        data = _packed(pixels, codec, middle)
        if 8 * len(data) / area <= bits:
            best, low = data, middle + 1
        else:
            high = middle - 1
    return np.asarray(Image.open(io.BytesIO(best)).convert("RGB")), 8 * len(best) / area


def _packed(pixels: np.ndarray, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if codec == "JPEG" else {"method": 6}
    Image.fromarray(pixels).save(buffer, codec, quality=quality, **options)
    return buffer.getvalue()
