"""Pixel branch: CNN encoder and decoder with attention on the coarsest grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = max(1, channels // 16)
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class GridAttention(nn.Module):
    """Self-attention over all cells of the grid, heads of about 64 channels (at least one head)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Heads of 64 channels, or the next wider ones that divide them.
        self.heads = next(h for h in range(max(1, channels // 64), 0, -1) if channels % h == 0)
        self.norm = nn.GroupNorm(max(1, channels // 16), channels, eps=1e-5)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        b, c, h, w = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels), GridAttention(channels), ResidualBlock(channels))


class PixelEncoder(nn.Module):
    """(B, 3, H, W) in -1..1 to (B, dim, H/f, W/f) with f = 2 ** len(channels).

    ``channels``: per resolution, the first already at half the picture's (a 2x2 space-to-depth comes first).
    """

    def __init__(self, channels: tuple[int, ...], blocks: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, channels[0], 3, padding=1)]
        for i, width in enumerate(channels):
            layers += [ResidualBlock(width) for _ in range(blocks)]
            if i + 1 < len(channels):
                layers.append(nn.Conv2d(width, channels[i + 1], 3, stride=2, padding=1))
        layers.append(_middle(channels[-1]))
        layers += [
            nn.GroupNorm(max(1, channels[-1] // 16), channels[-1]),
            nn.SiLU(),
            nn.Conv2d(channels[-1], dim, 1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """Encode."""
        return self.layers(pixels)


class PixelDecoder(nn.Module):
    """(B, dim, h, w) to (B, 3, h*f, w*f), about -1..1 (not clamped). Mirrors :class:`PixelEncoder`."""

    def __init__(self, channels: tuple[int, ...], blocks: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(dim, channels[-1], 3, padding=1), _middle(channels[-1])]
        for i in range(len(channels) - 1, -1, -1):
            layers += [ResidualBlock(channels[i]) for _ in range(blocks)]
            if i > 0:
                layers += [nn.Conv2d(channels[i], 4 * channels[i - 1], 1), nn.PixelShuffle(2)]
        layers += [nn.GroupNorm(max(1, channels[0] // 16), channels[0]), nn.SiLU()]
        layers += [nn.Conv2d(channels[0], 12, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    @property
    def last_weight(self) -> Tensor:
        """Kernel of the last convolution: where the adversarial loss is weighed."""
        convolution = self.layers[-2]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 i j"]:
        """Decode."""
        return self.layers(features)


def deeper(
    state: dict[str, torch.Tensor], levels: int, old: int, new: int, between: int = 2
) -> dict[str, torch.Tensor]:
    """Weights of a :class:`PixelDecoder` of ``old`` residual blocks per level, renamed for one of ``new`` blocks.

    The blocks in between are not among them: they start as the identity, so the deeper decoder draws the same pictures.
    ``between``: layers from one level to the next, 2 in a decoder, 1 in a :class:`PixelEncoder`.
    """

    def places(blocks: int) -> list[list[int]]:
        """Layer numbers: what comes before the levels, each level's blocks and its upsampling, what comes after."""
        found, at = [[0, 1]], 2
        for level in range(levels):
            found.append(list(range(at, at + blocks)))
            at += blocks
            rest = between if level + 1 < levels else 4
            found.append(list(range(at, at + rest)))
            at += rest
        return found

    numbers = {
        before: after
        for one, two in zip(places(old), places(new), strict=True)
        for before, after in zip(one, two, strict=False)
    }
    out = {}
    for name, value in state.items():
        _, number, rest = name.split(".", 2)
        out[f"layers.{numbers[int(number)]}.{rest}"] = value
    return out


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (..., H, W, 3) as fp32 (..., 3, H, W) in -1..1."""
    return pixels.movedim(-1, -3).float().div(127.5).sub(1.0)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) in -1..1 (clamped) as uint8 pictures (..., H, W, 3)."""
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
