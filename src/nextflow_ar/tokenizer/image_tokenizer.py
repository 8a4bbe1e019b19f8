"""The image tokenizer: pictures to multi-scale codes and back (paper section 2.3)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from nextflow_ar.config import ImageTokenizerConfig, from_dict, to_dict
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import (
    StorageError,
    pack_weights,
    read_checked,
    read_weights,
    write_atomic,
    write_folder,
)
from nextflow_ar.tokenizer.pixels import PixelDecoder, PixelEncoder, to_bytes, to_unit
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, Quantized, SelfCorrection
from nextflow_ar.tokenizer.semantic import SemanticDecoder, SemanticEncoder, SemanticHead

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ImageTokenizer(nn.Module):
    """Two encoders, one shared index, two decoders.

    Pictures are (B, 3, H, W) in -1..1 with sides that are multiples of ``config.downsample``.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        q, hidden = config.quantizer, config.semantic.hidden
        if (
            2 ** len(config.encoder_channels) != config.downsample
            or config.semantic.patch != config.downsample
        ):
            raise ValueError("downsample is 2 ** len(encoder_channels) and equals the semantic patch")
        self.config = config
        self.encoder = PixelEncoder(config.encoder_channels, config.encoder_blocks, q.pixel_dim)
        self.semantic_encoder = SemanticEncoder(config.semantic)
        self.semantic_head = SemanticHead(hidden, q.semantic_dim)
        self.quantizer = MultiScaleQuantizer(q, config.num_scales)
        self.semantic_decoder = SemanticDecoder(config.semantic, q.semantic_dim)
        seen = q.dim if config.decoder_sees_semantic else q.pixel_dim
        self.decoder = PixelDecoder(config.decoder_channels, config.decoder_blocks, seen)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """Continuous features before quantisation, semantic channels first, fp32."""
        semantic = self.semantic_head(self.semantic_encoder(pixels))
        return torch.cat([semantic.float(), self.encoder(pixels).float()], dim=1)

    def render(self, features: Float[Tensor, "b c i j"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures from quantised features, about -1..1."""
        if not self.config.decoder_sees_semantic:
            features = features[:, self.config.quantizer.semantic_dim :]
        return self.decoder(features)

    def semantics(self, features: Float[Tensor, "b c i j"]) -> Float[Tensor, "b d i j"]:
        """The teacher's features as decoded from quantised ones."""
        return self.semantic_decoder(features[:, : self.config.quantizer.semantic_dim])

    def schedule_for(self, height: int, width: int) -> ScaleSchedule:
        """Schedule whose final grid covers a picture of exactly this size. Raises ValueError when there is none."""
        f = self.config.downsample
        for num_scales in range(self.config.num_scales, 0, -1):
            schedule = ScaleSchedule.nearest(height, width, num_scales)
            if schedule.image_size(f) == (height, width):
                return schedule
        raise ValueError(f"no scale schedule covers {width}x{height} pixels at downsampling {f}")

    @torch.no_grad()
    def encode(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        schedule: ScaleSchedule | None = None,
        *,
        correction: SelfCorrection | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Codes of pictures; ``input`` differs from ``target`` where self-correction sampled."""
        schedule = schedule or self.schedule_for(pixels.shape[2], pixels.shape[3])
        return self.quantizer.quantize(
            self.features(pixels), schedule, correction=correction, generator=generator
        )

    @torch.no_grad()
    def decode(
        self, indices: Int[Tensor, "b t"], schedule: ScaleSchedule, upto_scale: int | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Pictures from codes, -1..1, clamped. ``upto_scale``: decode the first so many scales only (a preview)."""
        return self.render(self.quantizer.accumulate(indices, schedule, upto_scale)).clamp(-1, 1)

    def encode_bytes(self, pictures: UInt8[Tensor, "b h w 3"]) -> Quantized:
        """:meth:`encode` for uint8 pictures."""
        return self.encode(to_unit(pictures))

    def decode_bytes(
        self, indices: Int[Tensor, "b t"], schedule: ScaleSchedule, upto_scale: int | None = None
    ) -> UInt8[Tensor, "b h w 3"]:
        """:meth:`decode` to uint8 pictures."""
        return to_bytes(self.decode(indices, schedule, upto_scale))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a self-contained folder (configuration, bf16-rounded fp32-loadable weights, checksums), atomically."""

        def fill(target: Path) -> None:
            write_atomic(target / CONFIG_FILE, json.dumps(to_dict(self.config), indent=1).encode())
            weights = {
                k: v if k == "quantizer.codebook" else v.bfloat16() for k, v in self.state_dict().items()
            }
            write_atomic(target / WEIGHTS_FILE, pack_weights(weights))

        write_folder(Path(folder), fill)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> ImageTokenizer:
        """Load a folder written by :meth:`save_pretrained`, in fp32, ready for inference.

        Raises StorageError when a file is missing, damaged or does not fit.
        """
        folder = Path(folder)
        values = json.loads(read_checked(folder, CONFIG_FILE))
        tokenizer = cls(from_dict(ImageTokenizerConfig, values, str(folder / CONFIG_FILE)))
        weights = {k: v.float() for k, v in read_weights(folder, WEIGHTS_FILE).items()}
        try:
            tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            raise StorageError(
                f"{folder}: the weights do not fit the configuration: {str(error)[:120]}"
            ) from None
        return tokenizer.eval().requires_grad_(False)
