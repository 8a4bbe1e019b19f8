"""The image tokenizer: pictures to multi-scale codes and back (paper section 2)."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image as PILImage
from torch import Tensor, nn

from nextflow_ar.config import ImageTokenizerConfig, from_dict, to_dict
from nextflow_ar.scales import BASE_SIZES, ScaleSchedule, final_of
from nextflow_ar.storage import (
    StorageError,
    find_folder,
    pack_weights,
    push_folder,
    read_checked,
    read_weights,
    write_atomic,
    write_folder,
)
from nextflow_ar.tokenizer.pictures import Fit, place, to_rgb, unplace, upright
from nextflow_ar.tokenizer.pixels import PixelDecoder, PixelEncoder, to_bytes, to_unit
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, Quantized, SelfCorrection
from nextflow_ar.tokenizer.semantic import SemanticDecoder, SemanticEncoder, SemanticHead
from nextflow_ar.types import Codes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
BUNDLED = {"nano": "nano/image_tokenizer", "nano-tokenizer": "nano_tokenizer"}
"""Names that need no download: the tokenizer inside the bundled model, and a later one, which serves photographs and the
wide world better. Their codes differ."""

Picture = PILImage.Image | np.ndarray | Tensor
"""A Pillow image, or (H, W, 3) uint8."""


@dataclass(frozen=True, eq=False)
class CodeFeatures:
    """What codes say, on the final grid: ``semantic`` (B, Cs, h, w) and ``pixel`` (B, Cp, h, w), the two halves of the
    summed code vectors, and ``decoded`` (B, D, h, w), the teacher's features read from the semantic half (None without
    a semantic branch). A diffusion decoder takes all three as condition (paper section 3, "diffusion decoder").
    """

    semantic: Tensor
    pixel: Tensor
    decoded: Tensor | None


class ImageTokenizer(nn.Module):
    """Two encoders, one shared index, two decoders; or the pixel branch alone (``config.semantic`` null).

    :meth:`encode`, :meth:`decode` and :meth:`features` take pictures of any size. Everything below them works on tensors:
    pictures (B, 3, H, W) in -1..1 with sides that are multiples of ``config.downsample``.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        q, semantic = config.quantizer, config.semantic
        if 2 ** len(config.encoder_channels) != config.downsample:
            raise ValueError("downsample is 2 ** len(encoder_channels)")
        widths = (*config.encoder_channels, *config.decoder_channels)
        if any(width % max(1, width // 16) for width in widths):
            raise ValueError(f"channels divide into groups of about 16 (such as 8, 40, 64), got {widths}")
        if semantic is not None and semantic.patch != config.downsample:
            raise ValueError("downsample equals the semantic patch")
        if (semantic is None) != (q.semantic_dim == 0):
            raise ValueError("quantizer.semantic_dim is 0 if and only if there is no semantic branch")
        self.config = config
        self.encoder = PixelEncoder(config.encoder_channels, config.encoder_blocks, q.pixel_dim)
        self.semantic_encoder = self.semantic_head = self.semantic_decoder = None
        if semantic is not None:
            self.semantic_encoder = SemanticEncoder(semantic)
            self.semantic_head = SemanticHead(semantic.hidden, q.semantic_dim)
            self.semantic_decoder = SemanticDecoder(semantic, q.semantic_dim)
        self.quantizer = MultiScaleQuantizer(q)
        seen = q.dim if config.decoder_sees_semantic else q.pixel_dim
        self.decoder = PixelDecoder(config.decoder_channels, config.decoder_blocks, seen)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quantizer.codebook.device

    def encode(
        self,
        images: Picture | Sequence[Picture],
        *,
        num_scales: int | None = None,
        schedule: ScaleSchedule | None = None,
        fit: Fit = "pad",
    ) -> Codes | list[Codes]:
        """Codes of one picture, or of each of several, of any and of mixed sizes.

        ``num_scales``: the level, 1 to 18 (None: the smallest whose canvas of the nearest aspect ratio holds the picture,
        or 18); ``schedule``: this schedule instead. ``fit``: "pad" keeps the whole picture, "crop" fills the canvas;
        :meth:`decode` undoes either. Pictures are turned upright as their EXIF orientation says, and encoded one by one, so
        that no batch can change a code.
        Raises ValueError for an empty or far too narrow picture.
        """
        if isinstance(images, PILImage.Image | np.ndarray | Tensor):
            return self._encode_one(images, num_scales, schedule, fit)
        return [self._encode_one(image, num_scales, schedule, fit) for image in images]

    @torch.inference_mode()
    def _encode_one(
        self, image: Picture, num_scales: int | None, schedule: ScaleSchedule | None, fit: Fit
    ) -> Codes:
        picture = to_picture(image)
        schedule = schedule or self.canvas_for(picture.height, picture.width, num_scales)
        canvas, frame = place(picture, *schedule.image_size(self.config.downsample), fit)
        pixels = to_unit(torch.from_numpy(canvas).to(self.device))[None]
        return Codes.plain(schedule, self.quantize(pixels, schedule).target[0].cpu(), frame)

    def canvas_for(self, height: int, width: int, num_scales: int | None = None) -> ScaleSchedule:
        """Schedule of the nearest aspect ratio; without ``num_scales`` the smallest that holds the picture whole."""
        if num_scales is not None:
            return ScaleSchedule.nearest(height, width, num_scales)
        for count in range(1, len(BASE_SIZES) + 1):
            schedule = ScaleSchedule.nearest(height, width, count)
            h, w = schedule.image_size(self.config.downsample)
            if h >= height and w >= width:
                return schedule
        return ScaleSchedule.nearest(height, width, len(BASE_SIZES))

    @torch.inference_mode()
    def decode(
        self, codes: Codes | Sequence[Codes], upto_scale: int | None = None
    ) -> PILImage.Image | list[PILImage.Image]:
        """Picture of codes, or pictures; fitting is undone. ``upto_scale``: from the first so many scales (a preview)."""
        if not isinstance(codes, Codes):
            return [self._decode_one(each, upto_scale) for each in codes]
        return self._decode_one(codes, upto_scale)

    def _decode_one(self, codes: Codes, upto_scale: int | None) -> PILImage.Image:
        pixels = self.decode_bytes(codes.target[None].to(self.device), codes.schedule, upto_scale)
        return unplace(pixels[0].cpu().numpy(), codes.frame)

    @torch.inference_mode()
    def features(self, codes: Codes | Sequence[Codes], upto_scale: int | None = None) -> CodeFeatures:
        """What codes say, before any pixel is drawn. Several must share one schedule. Raises ValueError otherwise."""
        several = [codes] if isinstance(codes, Codes) else list(codes)
        if len({each.schedule for each in several}) != 1:
            raise ValueError("features of several codes need one and the same schedule")
        indices = torch.stack([each.target for each in several]).to(self.device)
        summed = self.quantizer.accumulate(indices, several[0].schedule, upto_scale)
        semantic, pixel = summed.split(
            (self.config.quantizer.semantic_dim, self.config.quantizer.pixel_dim), 1
        )
        return CodeFeatures(semantic, pixel, self.semantics(summed) if self.semantic_decoder else None)

    def embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """Continuous features before quantisation, semantic channels first, fp32."""
        pixel = self.encoder(pixels).float()
        if self.semantic_encoder is None or self.semantic_head is None:
            return pixel
        return torch.cat([self.semantic_head(self.semantic_encoder(pixels)).float(), pixel], dim=1)

    def render(self, features: Float[Tensor, "b c i j"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures from quantised features, about -1..1."""
        if not self.config.decoder_sees_semantic:
            features = features[:, self.config.quantizer.semantic_dim :]
        return self.decoder(features)

    def semantics(self, features: Float[Tensor, "b c i j"]) -> Float[Tensor, "b d i j"]:
        """The teacher's features as decoded from quantised ones. Raises ValueError without a semantic branch."""
        if self.semantic_decoder is None:
            raise ValueError("this tokenizer has no semantic branch")
        return self.semantic_decoder(features[:, : self.config.quantizer.semantic_dim])

    def schedule_for(self, height: int, width: int) -> ScaleSchedule:
        """Schedule whose final grid covers a picture of exactly this size. Raises ValueError when there is none."""
        return canvas_schedule(self.config, height, width)

    @torch.no_grad()
    def quantize(
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
            self.embed(pixels), schedule, correction=correction, generator=generator
        )

    @torch.no_grad()
    def decode_pixels(
        self, indices: Int[Tensor, "b t"], schedule: ScaleSchedule, upto_scale: int | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Pictures from codes, -1..1, clamped. ``upto_scale``: decode the first so many scales only (a preview)."""
        return self.render(self.quantizer.accumulate(indices, schedule, upto_scale)).clamp(-1, 1)

    def encode_bytes(self, pictures: UInt8[Tensor, "b h w 3"]) -> Quantized:
        """:meth:`quantize` for uint8 pictures."""
        return self.quantize(to_unit(pictures))

    def decode_bytes(
        self, indices: Int[Tensor, "b t"], schedule: ScaleSchedule, upto_scale: int | None = None
    ) -> UInt8[Tensor, "b h w 3"]:
        """:meth:`decode_pixels` to uint8 pictures."""
        return to_bytes(self.decode_pixels(indices, schedule, upto_scale))

    def fingerprint(self) -> str:
        """Hex digest of configuration and all weights that decide codes: what a shard of codes is bound to.

        The pixel decoder does not count: a better one draws the same codes better. Weights count as they are saved (bf16).
        """
        digest = hashlib.sha256(json.dumps(to_dict(self.config.quantizer), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("decoder.", "semantic_decoder.")):
                kept = tensor if name == "quantizer.codebook" else tensor.bfloat16()
                digest.update(name.encode() + kept.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: Path | str, card: str | None = None) -> None:
        """Write a self-contained folder (configuration, weights in bf16, codebook in fp32, checksums), atomically.

        ``card``: text of its README.md.
        """
        write_folder(Path(folder), lambda target: self._fill(target, card))

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, card: str | None = None
    ) -> str:
        """Upload to the Hub repository OWNER/NAME, made if need be; returns its address. Raises StorageError."""
        return push_folder(lambda target: self._fill(target, card), repo_id, private=private, token=token)

    def _fill(self, target: Path, card: str | None) -> None:
        write_atomic(target / CONFIG_FILE, json.dumps(to_dict(self.config), indent=1).encode())
        weights = {k: v if k == "quantizer.codebook" else v.bfloat16() for k, v in self.state_dict().items()}
        write_atomic(target / WEIGHTS_FILE, pack_weights(weights))
        if card is not None:
            write_atomic(target / CARD_FILE, card.encode())

    @classmethod
    def from_pretrained(cls, name: Path | str = "nano", device: torch.device | str = "cpu") -> ImageTokenizer:
        """Load a folder written by :meth:`save_pretrained`, a model's folder, a Hub id, or a bundled one, in fp32.

        Raises StorageError, one line, when it is unknown, a file is missing or damaged, or the weights do not fit.
        """
        folder = _resolve(name)
        tokenizer = cls(tokenizer_config(folder))
        weights = {k: v.float() for k, v in read_weights(folder, WEIGHTS_FILE).items()}
        try:
            tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            raise StorageError(
                f"{folder}: the weights do not fit the configuration: {str(error)[:120]}"
            ) from None
        return tokenizer.to(device).eval().requires_grad_(False)


def canvas_schedule(config: ImageTokenizerConfig, height: int, width: int) -> ScaleSchedule:
    """The one schedule of a canvas of exactly this size, in pixels: what is extracted, read or drawn at this size has it.

    Of a size that two levels have it is that of the default level, else of the one with more scales. Raises ValueError when
    there is none.
    """
    down = config.downsample
    levels = sorted(range(1, len(BASE_SIZES) + 1), key=lambda n: (n != config.num_scales, -n))
    for num_scales in levels if height % down == width % down == 0 else ():
        if final := final_of((height // down, width // down), num_scales):
            return ScaleSchedule.from_final(final, num_scales)
    raise ValueError(f"no scale schedule covers {width}x{height} pixels at downsampling {down}")


def tokenizer_config(name: Path | str) -> ImageTokenizerConfig:
    """Configuration of what :meth:`ImageTokenizer.from_pretrained` would load, without its weights. Raises StorageError."""
    folder = _resolve(name)
    values = json.loads(read_checked(folder, CONFIG_FILE))
    return from_dict(ImageTokenizerConfig, values, str(folder / CONFIG_FILE))


def _resolve(name: Path | str) -> Path:
    if str(name) in BUNDLED:
        return Path(str(importlib.resources.files("nextflow_ar") / "checkpoints" / BUNDLED[str(name)]))
    folder = find_folder(name)
    if folder is None:
        raise StorageError(
            f"{name}: no such checkpoint folder; {', '.join(BUNDLED)}, a folder or a Hub id OWNER/NAME is accepted"
        )
    inner = folder / "image_tokenizer"
    return inner if inner.is_dir() else folder


def to_picture(image: Picture) -> PILImage.Image:
    """Any accepted picture as upright 8-bit RGB. Raises ValueError for an array that is no (H, W, 3) uint8."""
    if isinstance(image, PILImage.Image):
        return to_rgb(upright(image))
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"a picture is (H, W, 3) uint8, got {tuple(array.shape)} {array.dtype}")
    return PILImage.fromarray(np.ascontiguousarray(array))
