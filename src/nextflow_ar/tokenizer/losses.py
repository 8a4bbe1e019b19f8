"""What a reconstruction is judged by in training, beside its pixels: structure, a perceptual distance and a PatchGAN."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of pictures (B, 3, H, W) in -1..1 as one number; gradients reach the first."""


@lru_cache(maxsize=64)
def _window_matrix(side: int) -> Tensor:
    """(side - 10, side): every row an 11-tap Gaussian of deviation 1.5, each one place further."""
    with torch.inference_mode(False):  # it is kept, and training may use it after generation did
        taps = (-(torch.arange(11.0) - 5).square() / (2 * 1.5**2)).exp()
        out = torch.zeros(side - 10, side)
        for i in range(side - 10):
            out[i, i : i + 11] = taps / taps.sum()
        return out


def structure_distance(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """1 - SSIM of pictures in -1..1, with the windows and constants of :func:`metrics.ssim`; differentiable.

    The blur is two matrix products per picture, which on CPUs cost a fraction of a depthwise convolution. Sides are at
    least 11.
    """
    with torch.autocast(a.device.type, enabled=False):
        x, y = a.float(), b.float()
        rows, columns = (_window_matrix(side).to(x) for side in x.shape[2:])
        stacked = torch.stack([x, y, x * x, y * y, x * y])
        mx, my, xx, yy, xy = (rows @ stacked.contiguous() @ columns.T).unbind(0)
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        # Means are about 0 here and about 1 where SSIM is defined on 0..2: moving both by 1 changes the mean's term only.
        ux, uy = mx + 1, my + 1
        luminance = (2 * ux * uy + c1) / (ux * ux + uy * uy + c1)
        contrast = (2 * (xy - mx * my) + c2) / ((xx - mx * mx) + (yy - my * my) + c2)
        return 1 - (luminance * contrast).mean()


def feature_distance(extractor: Callable[[Tensor], Tensor]) -> Perceptual:
    """Mean over cells of 1 - cosine between an extractor's feature maps: by default the frozen teacher's."""

    def distance(out: Tensor, goal: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = extractor(goal)
        return (1 - F.cosine_similarity(extractor(out).float(), wanted.float(), dim=1)).mean()

    return distance


def lpips_distance(net: str = "vgg") -> Perceptual:
    """LPIPS, where the user has the package ``lpips`` (it needs torchvision). Raises ImportError, one line."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("perceptual: lpips needs the package lpips: pip install lpips") from None
    model = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)

    def distance(out: Tensor, goal: Tensor) -> Tensor:
        return model.to(out.device)(out.float(), goal.float()).mean()

    return distance


def semantic_distance(
    read: Float[Tensor, "b d h w"], goal: Float[Tensor, "b d h w"], kind: Literal["cosine", "l2"]
) -> Float[Tensor, ""]:
    """Distillation loss of the semantic decoder: 1 - cosine (TokenFlow's code), or the mean square (its paper)."""
    read, goal = read.float(), goal.float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(read, goal, dim=1)).mean()
    return F.mse_loss(read, goal)


class PatchDiscriminator(nn.Module):
    """PatchGAN: a score for every overlapping patch (70 pixels wide with three layers).

    Group normalisation instead of the usual batch statistics, so that small and unequal batches do no harm.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            wider = min(channels * 2**i, channels * 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1),
                nn.GroupNorm(max(1, wider // 16), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 i j"]:
        """Scores; high means real. Sides are at least 32."""
        return self.layers(pixels)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """The discriminator's hinge loss from its scores."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Float[Tensor, ""]:
    """The generator's hinge loss from the scores of what it made."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Float[Tensor, ""]:
    """Factor that gives both losses gradients of equal norm at the decoder's last weight (VQGAN, equation 7).

    At most 10,000; detached.
    """
    ours = torch.autograd.grad(reconstruction, last, retain_graph=True)[0]
    theirs = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, 1e4).detach()
