"""How near a reconstruction is to its picture: PSNR, SSIM, and a Fréchet distance over a named extractor's features."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def psnr(a: UInt8[Tensor, "b h w 3"], b: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each picture of a uint8 batch, from its mean squared error (at most 78 dB)."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-3)
    return 10 * torch.log10(255.0**2 / error)


def ssim(a: UInt8[Tensor, "b h w 3"], b: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, mean over channels and places: 11x11 Gaussian window of deviation 1.5,
    K1 = 0.01, K2 = 0.03, windows inside the picture only (Wang et al. 2004). Sides are at least 11.
    """
    x, y = (t.movedim(-1, 1).double() for t in (a, b))
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs sides of at least 11 pixels, got {x.shape[3]}x{x.shape[2]}")
    offsets = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    window = (-offsets.square() / (2 * 1.5**2)).exp()
    window = window / window.sum()

    def blur(t: Tensor) -> Tensor:
        flat = t.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return flat.view(t.shape[0], t.shape[1], *flat.shape[2:])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.flatten(1).mean(1).float()


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Fréchet distance of two sets of feature vectors, each taken as a Gaussian (FID's formula, for any extractor)."""
    a, b = a.double(), b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    # With a covariance as ra' ra, tr (ca cb)^(1/2) is the sum of the singular values of ra rb': no eigenvalues, which
    # fail to converge where there are fewer vectors than dimensions.
    ra, rb = (torch.linalg.qr((x - x.mean(0)) / max(1, len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    cross = torch.linalg.svdvals(ra @ rb.T).sum()
    return float((means + ra.square().sum() + rb.square().sum() - 2 * cross).clamp_min(0))
