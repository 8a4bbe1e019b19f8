"""Codes that an image has to have: what is kept of a picture while the rest of it is drawn anew, at every scale.

Codes are residual: those of a fine grid say what the coarser ones left out. Where a coarse cell that reaches into a kept
area is drawn anew, the old fine codes no longer add up to the old picture. So a kept cell does not repeat its old code; it
takes the one that is nearest to what is still missing there, just as the tokenizer would have chosen it. With an unchanged
history that is its old code, bit for bit.

The first grid's only cell sets the tone of the whole picture. Every mask reaches into it, but drawn anew it seldom suits
what stays around the mask; so it is kept where at least half of the picture is, as the code nearest to that part alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_bytes
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, resize
from nextflow_ar.types import Codes


@dataclass(frozen=True, eq=False)
class Forced:
    """What an image keeps of a picture.

    ``codes``: of the picture. ``keep``: (T,) which of its cells stay. ``features``: (C, h, w) fp32, the picture before
    quantisation, where kept cells answer what is drawn around them; None: they repeat their codes. ``redrawn``: (H, W)
    pixels outside of which the finished picture is the tokenizer's own reconstruction; None: it is what its codes say.
    """

    codes: Codes
    keep: Bool[Tensor, " t"]
    features: Float[Tensor, "c h w"] | None = None
    redrawn: Bool[np.ndarray, "H W"] | None = None

    def __post_init__(self) -> None:
        if self.keep.shape != self.codes.target.shape:
            raise ValueError(
                f"keep has shape {tuple(self.keep.shape)}, the codes {tuple(self.codes.target.shape)}"
            )


class Forcing:
    """:class:`Forced` at work on one image. It depends on that image alone, so on no other of the batch."""

    def __init__(self, forced: Forced, quantizer: MultiScaleQuantizer) -> None:
        self.forced, self.quantizer = forced, quantizer
        self.rest = None if forced.features is None else forced.features[None]
        self.stays = forced.keep[forced.codes.schedule.offsets[-2] :]

    @torch.no_grad()
    def choose(self, k: int, drawn: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Codes of scale ``k`` (0-based): those drawn, and in kept cells those that have to be there. Scale by scale."""
        codes = self.forced.codes
        schedule = codes.schedule
        keep = self.forced.keep[schedule.offsets[k] : schedule.offsets[k + 1]]
        if self.rest is None:
            return torch.where(keep, codes.scale(k), drawn)
        if k == 0 and self.stays.any() and not self.stays.all():
            cells = self.rest.flatten(2)[..., self.stays.to(self.rest.device)].mean(2)
        else:
            cells = resize(self.rest, schedule.grids[k], "area").flatten(2)[0].T
        chosen = torch.where(keep, self.quantizer.nearest(cells).cpu(), drawn)
        self.rest = self.rest - self.quantizer.enlarged(chosen[None].to(self.rest.device), schedule, k)
        return chosen


def kept_cells(redrawn: Bool[np.ndarray, "H W"], schedule: ScaleSchedule) -> Bool[Tensor, " t"]:
    """Which cells of every grid stay: those in whose whole area no pixel is to be redrawn, and the first grid's one where
    half of the last grid's do.
    """
    touched = torch.from_numpy(redrawn)[None, None].float()
    keep = [F.adaptive_max_pool2d(touched, grid).flatten() == 0 for grid in schedule]
    keep[0] = keep[-1].float().mean()[None] >= 0.5
    return torch.cat(keep)


def first_scales(codes: Codes, scales: int) -> Forced:
    """Keep the first so many scales of a picture."""
    return Forced(codes, torch.arange(codes.schedule.num_tokens) < codes.schedule.offsets[scales])


@torch.inference_mode()
def spared(
    tokenizer: ImageTokenizer, codes: Codes, reference: Codes, original: UInt8[np.ndarray, "H W 3"]
) -> PILImage.Image:
    """A changed picture with the original's own pixels wherever its codes say what those of the original say.

    They need not be the same: their sums are, but for less than what the last grid's codes add. Pixels go over from new to
    old within half a cell, on the old one's side.
    """
    schedule, device = codes.schedule, tokenizer.device
    new, old = (
        tokenizer.quantizer.accumulate(c.target[None].to(device), schedule) for c in (codes, reference)
    )
    last = tokenizer.quantizer.enlarged(
        reference.target[None, schedule.offsets[-2] :].to(device), schedule, len(schedule) - 1
    )
    limit = last.square().sum(1).mean()
    changed = ((new - old).square().sum(1, keepdim=True) > limit).float()
    border, cell = tokenizer.config.downsample // 4, tokenizer.config.downsample
    wide = F.max_pool2d(F.interpolate(changed, scale_factor=cell), 2 * border + 1, 1, border)
    share = F.avg_pool2d(wide, 2 * border + 1, 1, border, count_include_pad=False)[0, 0, :, :, None].cpu()
    drawn = to_bytes(tokenizer.render(new).clamp(-1, 1))[0].cpu()
    mixed = drawn.float() * share + torch.from_numpy(original.copy()).float() * (1 - share)
    return PILImage.fromarray(mixed.round().byte().numpy())


@torch.inference_mode()
def composite(tokenizer: ImageTokenizer, forced: Forced, codes: Codes) -> PILImage.Image:
    """The finished picture: where nothing was to be redrawn, the pixels of the old picture's reconstruction.

    A decoder's pixels depend on cells around them (here on all, through attention and normalisation), so kept codes alone
    do not keep pixels: the cells that stay get the old picture's features before decoding, the pixels its own after it.
    """
    schedule, device = codes.schedule, tokenizer.device
    new = tokenizer.quantizer.accumulate(codes.target[None].to(device), schedule)
    if forced.redrawn is None:
        return PILImage.fromarray(to_bytes(tokenizer.render(new).clamp(-1, 1))[0].cpu().numpy())
    old = tokenizer.quantizer.accumulate(forced.codes.target[None].to(device), schedule)
    stays = forced.keep[schedule.offsets[-2] :].view(schedule.final).to(device)
    drawn, kept = (
        to_bytes(tokenizer.render(features).clamp(-1, 1))[0].cpu().numpy()
        for features in (torch.where(stays, old, new), old)
    )
    return PILImage.fromarray(np.where(forced.redrawn[..., None], drawn, kept))
