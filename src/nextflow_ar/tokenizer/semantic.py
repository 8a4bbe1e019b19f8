"""Semantic branch: SigLIP2's vision tower as teacher and student, and the decoder of the teacher's features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

if TYPE_CHECKING:
    from nextflow_ar.config import SemanticConfig


class SemanticEncoder(nn.Module):
    """A ``Siglip2VisionModel`` over whole pictures. Teacher and student are both of this class.

    Both read the same pixels: -1..1, which is SigLIP's own normalisation (mean 0.5, deviation 0.5).
    """

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.tower = Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_patches=config.position_grid**2,
                patch_size=config.patch,
                vision_use_head=False,
                attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
            )
        )

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d i j"]:
        """Last hidden state as a map with one cell per patch. Sides must be multiples of the patch."""
        b, _, height, width = pixels.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        patches = pixels.reshape(b, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, p * p * 3)
        shapes = torch.tensor([[h, w]], device=pixels.device).expand(b, 2)
        mask = torch.ones(b, h * w, dtype=torch.int32, device=pixels.device)
        out = self.tower(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        ).last_hidden_state
        return out.transpose(1, 2).reshape(b, -1, h, w)


def grid_embedding(h: int, w: int, dim: int, device: torch.device) -> Float[Tensor, "n d"]:
    """Two-dimensional sine and cosine embedding of cell centres in 0..1, so that any grid shares one range."""
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 6, dim // 4, device=device)
    rows = (torch.arange(h, device=device) + 0.5)[:, None] / h * frequencies
    columns = (torch.arange(w, device=device) + 0.5)[:, None] / w * frequencies
    rows, columns = rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], -1).reshape(h * w, -1)


class SemanticDecoder(nn.Module):
    """Small transformer from quantised semantic codes back to the teacher's features."""

    def __init__(self, config: SemanticConfig, dim: int) -> None:
        super().__init__()
        self.inward = nn.Linear(dim, config.hidden)
        layer = nn.TransformerEncoderLayer(
            config.hidden,
            config.heads,
            config.intermediate,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.decoder_layers, enable_nested_tensor=False)
        self.outward = nn.Linear(config.hidden, config.hidden)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Features of the teacher's width on the same grid."""
        b, _, h, w = features.shape
        x = self.inward(features.flatten(2).transpose(1, 2))
        x = x + grid_embedding(h, w, x.shape[-1], x.device).to(x.dtype)
        return self.outward(self.layers(x)).transpose(1, 2).reshape(b, -1, h, w)


class SemanticHead(nn.Module):
    """Linear-Tanh-Linear from the student's features to the semantic half of a code vector."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Project every cell."""
        return self.layers(features.movedim(1, -1)).movedim(-1, 1)
