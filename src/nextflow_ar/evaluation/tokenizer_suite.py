"""What an image tokenizer keeps: of photographs, beside JPEG and WebP at the same size, and of the playground's objects.

``nextflow-ar evaluate tokenizer``. Photographs come from a folder that training must not have seen; scenes are those of
the playground's held-out split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nextflow_ar.data.playground.scenes import render
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.evaluation.judge import Judge
from nextflow_ar.evaluation.playground_tasks import questions, score
from nextflow_ar.evaluation.reconstruction import bits_per_pixel, codec_at
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.metrics import psnr, ssim
from nextflow_ar.tokenizer.pictures import open_picture, place, save_picture
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.types import Codes

Progress = Callable[[str, int, int], None]
CROPS = (256, 512)


def evaluate_tokenizer_suite(
    tokenizer: ImageTokenizer,
    out: Path,
    photos: list[Path],
    *,
    per_type: int = 40,
    judge: Judge | None = None,
    crops: tuple[int | None, ...] = (*CROPS, None),
    progress: Progress = lambda part, done, total: None,
) -> dict[str, Any]:
    """All tables; writes sheets into ``out``. ``photos``: picture files (may be empty). ``per_type``: scenes of each of the
    six task types. ``crops``: sides of the centre crops of photographs; None: whole pictures.
    """
    counts = torch.zeros(18, tokenizer.config.quantizer.codebook_size)
    found: dict[str, Any] = {"codes": tokenizer.config.quantizer.codebook_size}
    found["playground"] = _playground(tokenizer, out, per_type, judge or Judge.load(), counts, progress)
    found["photos"] = {}
    for crop in crops if photos else ():
        name = "whole" if crop is None else f"crop_{crop}"
        found["photos"][name] = _photos(tokenizer, out, photos, crop, name, counts, progress)
    for i in range(48):
        progress("textures", i, 48)
        codes = tokenizer.encode(dead_leaves((7022, i), 128, 128), num_scales=12)
        assert isinstance(codes, Codes)
        _count(counts, codes)
    found["usage"] = _usage(counts)
    return found


def _count(counts: torch.Tensor, codes: Codes) -> None:
    for k in range(len(codes.schedule)):
        counts[k] += torch.bincount(codes.scale(k), minlength=counts.shape[1])


def _usage(counts: torch.Tensor) -> dict[str, Any]:
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    perplexity = (-(share * share.clamp_min(1e-12).log()).sum(1)).exp()
    return {
        "all": round(float((counts.sum(0) > 0).float().mean()), 4),
        "by_scale": [round(float(x), 4) for x in (counts > 0).float().mean(1)],
        "perplexity": [round(float(x), 1) for x in perplexity],
        "tokens": [int(x) for x in counts.sum(1)],
    }


def _playground(
    tokenizer: ImageTokenizer,
    out: Path,
    per_type: int,
    judge: Judge,
    counts: torch.Tensor,
    progress: Progress,
) -> dict[str, Any]:
    asked = questions(per_type, "test")
    pictures = np.stack([render(q.scene) for q in asked])
    schedule = ScaleSchedule.square(8)
    fits = schedule.image_size(tokenizer.config.downsample) == pictures.shape[1:3]
    schedule = schedule if fits else tokenizer.canvas_for(*pictures.shape[1:3])
    found: list[Codes] = []
    for i, picture in enumerate(pictures):
        progress("scenes", i, len(pictures))
        codes = tokenizer.encode(picture, schedule=schedule)
        assert isinstance(codes, Codes)
        _count(counts, codes)
        found.append(codes)
    goal = torch.from_numpy(pictures)
    table: dict[str, list[float]] = {"psnr": [], "ssim": [], "named": [], "exact": []}
    rows = [pictures[::per_type][:12]]
    for k in range(1, len(schedule) + 1):
        progress("scale prefixes", k, len(schedule))
        decoded = np.stack([np.asarray(tokenizer.decode(codes, k)) for codes in found])
        verdicts = judge(decoded)
        table["psnr"].append(round(float(psnr(torch.from_numpy(decoded), goal).mean()), 2))
        table["ssim"].append(round(float(ssim(torch.from_numpy(decoded), goal).mean()), 4))
        exact = [score(q.metadata, v).exact for q, v in zip(asked, verdicts, strict=True)]
        table["exact"].append(round(float(np.mean(exact)), 4))
        table["named"].append(round(_named(asked, verdicts), 4))
        rows.append(decoded[::per_type][:12])
    save_picture(np.concatenate([np.concatenate(list(r), axis=1) for r in rows]), out / "playground.png")
    bits = bits_per_pixel(tokenizer, found[0], *pictures.shape[1:3])
    again = np.stack(
        [_twice(tokenizer, codes, picture) for codes, picture in zip(found, decoded, strict=True)]
    )
    stable = {
        "to_first": round(float(psnr(torch.from_numpy(again), torch.from_numpy(decoded)).mean()), 2),
        "to_original": round(float(psnr(torch.from_numpy(again), goal).mean()), 2),
    }
    return {"again": stable, "scenes": len(asked), "bits_per_pixel": round(bits, 4), "by_scales": table}


def _twice(tokenizer: ImageTokenizer, codes: Codes, decoded: np.ndarray) -> np.ndarray:
    """A reconstruction encoded and decoded once more, on the same schedule."""
    once_more = tokenizer.encode(decoded, schedule=codes.schedule)
    picture = tokenizer.decode(once_more)
    assert isinstance(picture, Image.Image)
    return np.asarray(picture)


def _named(asked: Iterable[Any], verdicts: Iterable[Any]) -> float:
    """Share of the things shown whose name and colour the judge finds, each found thing counted once."""
    right = total = 0
    for question, verdict in zip(asked, verdicts, strict=True):
        left = [thing.key for thing in verdict.things]
        for thing in question.scene.things:
            total += 1
            if thing.key in left:
                left.remove(thing.key)
                right += 1
    return right / max(1, total)


def _photos(
    tokenizer: ImageTokenizer,
    out: Path,
    photos: list[Path],
    crop: int | None,
    name: str,
    counts: torch.Tensor,
    progress: Progress,
) -> dict[str, Any]:
    """Means over photographs: centre crops of ``crop`` pixels, or whole through the nearest schedule of 18 scales, measured
    on that schedule's canvas (``undone``: and at the picture's own size).
    """
    rows: dict[str, list[float]] = {k: [] for k in ("psnr", "ssim", "bits", "undone")}
    codecs: dict[str, dict[str, list[float]]] = {
        c: {"psnr": [], "ssim": [], "bits": []} for c in ("JPEG", "WEBP")
    }
    shown: list[np.ndarray] = []
    prefixes: list[np.ndarray] = []
    for i, path in enumerate(photos):
        progress(name, i, len(photos))
        picture = open_picture(path)
        if crop is not None:
            left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
            picture = picture.crop((left, top, left + crop, top + crop))
            schedule = tokenizer.canvas_for(crop, crop)
        else:
            schedule = tokenizer.canvas_for(picture.height, picture.width, 18)
        canvas, frame = place(picture, *schedule.image_size(tokenizer.config.downsample), "crop")
        with torch.inference_mode():
            indices = tokenizer.quantize(to_unit(torch.from_numpy(canvas))[None], schedule).target
            after = tokenizer.decode_bytes(indices, schedule)[0].numpy()
            if crop == CROPS[0]:  # decoding larger ones after every scale takes a core half an hour
                prefixes.append(_prefix_psnr(tokenizer, indices, schedule, canvas))
        codes = Codes.plain(schedule, indices[0], frame)
        _count(counts, codes)
        height, width = canvas.shape[:2]
        bits = bits_per_pixel(tokenizer, codes, height, width)
        rows["bits"].append(bits)
        _add(rows, canvas, after)
        undone = tokenizer.decode(codes)
        assert isinstance(undone, Image.Image)
        own = picture.size == undone.size
        rows["undone"].append(_quality(np.asarray(picture), np.asarray(undone))[0] if own else float("nan"))
        shown.append(np.concatenate([canvas, after], axis=1))
        for codec, values in codecs.items():
            packed, took = codec_at(canvas, bits, "JPEG" if codec == "JPEG" else "WEBP")
            values["bits"].append(took)
            _add(values, canvas, packed)
    widest, tallest = max(s.shape[1] for s in shown), sum(s.shape[0] for s in shown[:8])
    sheet = np.full((tallest, widest, 3), 255, np.uint8)
    y = 0
    for pair in shown[:8]:
        sheet[y : y + pair.shape[0], : pair.shape[1]] = pair
        y += pair.shape[0]
    save_picture(sheet, out / f"photos_{name}.png")
    return {
        "pictures": len(photos),
        "tokenizer": _means(rows),
        **{codec.lower(): _means(values) for codec, values in codecs.items()},
        "psnr_by_scales": [round(float(x), 2) for x in np.mean(prefixes, axis=0)] if prefixes else [],
    }


def _prefix_psnr(
    tokenizer: ImageTokenizer, indices: torch.Tensor, schedule: ScaleSchedule, canvas: np.ndarray
) -> np.ndarray:
    goal = torch.from_numpy(canvas)[None]
    found = [
        float(psnr(tokenizer.decode_bytes(indices, schedule, k), goal)) for k in range(1, len(schedule) + 1)
    ]
    return np.array(found)


def _quality(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    a, b = (torch.from_numpy(np.array(x))[None] for x in (before, after))
    return float(psnr(a, b)), float(ssim(a, b))


def _add(rows: dict[str, list[float]], before: np.ndarray, after: np.ndarray) -> None:
    quality, similar = _quality(before, after)
    rows["psnr"].append(quality)
    rows["ssim"].append(similar)


def _means(rows: dict[str, list[float]]) -> dict[str, float]:
    return {k: round(float(np.nanmean(v)), 4) for k, v in rows.items() if not np.isnan(v).all()}


def table(found: dict[str, Any]) -> str:
    """The suite's results for people."""
    scenes, usage = found["playground"], found["usage"]
    lines = [
        f"{scenes['scenes']} held-out scenes of the playground, {scenes['bits_per_pixel']:.3f} bits per pixel"
    ]
    lines.append(
        "scales decoded   " + " ".join(f"{k:6d}" for k in range(1, len(scenes["by_scales"]["psnr"]) + 1))
    )
    for key, told in (
        ("psnr", "PSNR"),
        ("ssim", "SSIM"),
        ("named", "things named"),
        ("exact", "scenes exact"),
    ):
        lines.append(
            f"{told:16s} "
            + " ".join(f"{v:6.3f}" if key != "psnr" else f"{v:6.2f}" for v in scenes["by_scales"][key])
        )
    again = scenes["again"]
    lines.append(
        f"passed through twice: {again['to_first']:.2f} dB to the first pass, {again['to_original']:.2f} to the original"
    )
    for name, values in found["photos"].items():
        lines.append(f"\n{values['pictures']} photographs, {name}:  PSNR    SSIM  bits per pixel")
        for codec in ("tokenizer", "jpeg", "webp"):
            v = values[codec]
            undone = f"  ({v['undone']:.2f} dB at the picture's own size)" if "undone" in v else ""
            lines.append(f"  {codec:22s} {v['psnr']:8.2f} {v['ssim']:7.3f} {v['bits']:8.3f}{undone}")
        if values["psnr_by_scales"]:
            lines.append("  by scales decoded: " + " ".join(f"{v:.1f}" for v in values["psnr_by_scales"]))
    lines.append(f"\ncodes used: {usage['all']:.3f} of {found['codes']}")
    for key in ("by_scale", "perplexity", "tokens"):
        lines.append(f"{key:11s} " + " ".join(f"{v}" for v in usage[key]))
    return "\n".join(lines)
