"""Semantic branch: SigLIP2's vision tower as teacher and student, and the decoder of the teacher's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.utils import logging as transformers_logging

from nextflow_ar.config import SemanticConfig
from nextflow_ar.storage import StorageError


def vision_config(config: SemanticConfig, *, pooled: bool = False) -> Siglip2VisionConfig:
    """Transformers' configuration of the tower. ``pooled``: with the head that makes one vector of a picture."""
    return Siglip2VisionConfig(
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_patches=config.position_grid**2,
        patch_size=config.patch,
        vision_use_head=pooled,  # pyright: ignore[reportCallIssue]
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )


def contrastive_model(config: SemanticConfig, entries: int, length: int, layers: int) -> Siglip2Model:
    """A whole SigLIP2 of our size, from nothing: vision tower, text tower of ``layers`` layers over ``entries`` tokens and
    up to ``length`` places, and the sigmoid loss's scale and bias (10 and -10 at the start, as in SigLIP).
    """
    with quiet_transformers():
        return _contrastive_model(config, entries, length, layers)


def _contrastive_model(config: SemanticConfig, entries: int, length: int, layers: int) -> Siglip2Model:
    text = Siglip2TextConfig(
        vocab_size=entries,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=config.heads,
        max_position_embeddings=length,
        projection_size=config.hidden,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    vision = vision_config(config, pooled=True)
    model = Siglip2Model(Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict()))
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(10.0).log())
        model.logit_bias.fill_(-10.0)
    return model


def sigmoid_loss(logits: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """SigLIP's loss: every (picture, text) of a batch is a yes-or-no question of its own; pairs lie on the diagonal."""
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits.float()).sum(1).mean()


def patches_of(pixels: Float[Tensor, "b 3 h w"], patch: int) -> Float[Tensor, "b n p"]:
    """Flat patches in the order that SigLIP2 reads: row by row, and within each (row, column, channel)."""
    b, _, height, width = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"a picture's sides must be multiples of the patch {patch}, got {width}x{height}")
    cells = pixels.reshape(b, 3, height // patch, patch, width // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(b, -1, patch * patch * 3)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no notes from transformers; what was set before comes back."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_tower(name: str | Path) -> tuple[Siglip2VisionModel, Siglip2VisionConfig, dict[str, Any]]:
    found = AutoConfig.from_pretrained(name)
    found = getattr(found, "vision_config", found)
    if not isinstance(found, Siglip2VisionConfig):
        raise StorageError(f"{name}: a {found.model_type} is no SigLIP2 NaFlex vision tower")
    found.vision_use_head = False  # pyright: ignore[reportAttributeAccessIssue]
    loaded: Any = Siglip2VisionModel.from_pretrained(
        name, config=found, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    tower, report = loaded
    return tower, found, report


class SemanticEncoder(nn.Module):
    """A ``Siglip2VisionModel`` over whole pictures of any aspect ratio. Teacher and student are both of this class.

    Both read the same pixels: -1..1, which is SigLIP's own normalisation (mean 0.5, deviation 0.5 of 0..1).
    """

    def __init__(self, config: SemanticConfig, tower: Siglip2VisionModel | None = None) -> None:
        super().__init__()
        self.patch = config.patch
        self.tower = tower or Siglip2VisionModel(vision_config(config))

    @classmethod
    def from_pretrained(cls, name: str | Path, decoder_layers: int) -> tuple[SemanticEncoder, SemanticConfig]:
        """The frozen vision tower of a SigLIP2 NaFlex checkpoint as transformers saves it, and its configuration.

        ``name``: a folder, or a Hub id such as ``google/siglip2-so400m-patch16-naflex``. ``decoder_layers`` goes into the
        configuration. Raises StorageError, one line, when it is missing, damaged or of another kind.
        """
        try:
            with quiet_transformers():  # the text tower and the head are left out on purpose
                tower, found, report = _load_tower(name)
        except StorageError:
            raise
        except Exception as error:  # safetensors and the Hub raise kinds of their own
            raise StorageError(f"{name}: no SigLIP2 to load: {' '.join(str(error).split())[:140]}") from None
        if missing := sorted(report["missing_keys"]):
            raise StorageError(f"{name}: the vision tower lacks {missing[0]}")
        config = SemanticConfig(
            patch=int(found.patch_size),  # pyright: ignore[reportArgumentType]
            hidden=found.hidden_size,
            layers=found.num_hidden_layers,
            heads=found.num_attention_heads,
            intermediate=found.intermediate_size,
            position_grid=round(found.num_patches**0.5),
            decoder_layers=decoder_layers,
        )
        return cls(config, tower).eval().requires_grad_(False), config

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d i j"]:
        """Last hidden state as a map with one cell per patch. Sides must be multiples of the patch."""
        b, _, height, width = pixels.shape
        h, w = height // self.patch, width // self.patch
        patches = patches_of(pixels, self.patch)
        shapes = torch.tensor([[h, w]], device=pixels.device).expand(b, 2)
        mask = torch.ones(b, h * w, dtype=torch.int32, device=pixels.device)
        out = self.tower(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        ).last_hidden_state
        return out.transpose(1, 2).reshape(b, -1, h, w)

    def many(self, pictures: Sequence[Float[Tensor, "3 h w"]]) -> list[Float[Tensor, "d i j"]]:
        """Pictures of different sizes in one padded batch (NaFlex); the same maps as one by one."""
        grids = [(x.shape[1] // self.patch, x.shape[2] // self.patch) for x in pictures]
        flat = [patches_of(x[None], self.patch)[0] for x in pictures]
        patches = nn.utils.rnn.pad_sequence(flat, batch_first=True)
        sizes = torch.tensor([len(x) for x in flat], device=patches.device)
        mask = torch.arange(patches.shape[1], device=patches.device) < sizes[:, None]
        out = self.tower(
            pixel_values=patches,
            pixel_attention_mask=mask.int(),
            spatial_shapes=torch.tensor(grids, device=patches.device),
        ).last_hidden_state
        return [x[: h * w].T.reshape(-1, h, w) for x, (h, w) in zip(out, grids, strict=True)]


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
