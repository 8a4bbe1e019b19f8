"""Another image tokenizer under a model that has learnt one: what the old codes meant is carried over to the new ones, by
pictures that both tokenizers encode.

The transformer keeps its weights. Without this every new code would begin as noise to it (``codes: anew``), although two
tokenizers of one downsampling see much the same in a cell.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image as PILImage
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.data.playground.canvases import canvas_sizes
from nextflow_ar.data.playground.curriculum import GROUPED, episode
from nextflow_ar.model.embeddings import enlarging
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import fit_picture

_LOG = logging.getLogger(__name__)
_AT_ONCE = 64
_RATE = 0.02
_PICTURES = 2000


def carry_from(base: Path, model: NextFlowModel, new: ImageTokenizer, seed: int) -> None:
    """:func:`carry_codes` from the image tokenizer in checkpoint ``base``, which ``model`` comes from."""
    old = ImageTokenizer.from_pretrained(base / "image_tokenizer", new.device)
    side, _ = ScaleSchedule.square(new.config.num_scales).image_size(new.config.downsample)
    carry_codes(model, old, new, playground_pictures(_PICTURES, seed, side), seed=seed)


def playground_pictures(count: int, seed: int, side: int = 64) -> UInt8[np.ndarray, "n side side 3"]:
    """``count`` square pictures of the wide world's drawing tasks, drawn at 64 px and scaled to ``side``."""
    tasks = tuple(GROUPED["draw"])
    found: list[np.ndarray] = []
    for index in range(count):
        task = tasks[index % len(tasks)]
        (picture,) = episode(task, index, seed, "train", canvas_sizes(8)[0]).pictures
        found.append(fit_picture(PILImage.fromarray(picture.render()), side, side))
    return np.stack(found)


def _encoded(tokenizer: ImageTokenizer, pictures: Tensor) -> Int[Tensor, "n t"]:
    """Codes on the CPU, where the model is that they are carried to."""
    parts = pictures.to(tokenizer.device).split(_AT_ONCE)
    return torch.cat([tokenizer.encode_bytes(part).target.cpu() for part in parts])


def shared_cells(
    old: Int[Tensor, "n t"], new: Int[Tensor, "n t"], schedule: ScaleSchedule, sizes: tuple[int, int]
) -> Float[Tensor, "k_new k_old"]:
    """Of every new code, the share of each old code among the cells where it stands; every scale counts alike, and a new
    code that was never seen stands for the old codes as they come.
    """
    weight = torch.cat([torch.full((size,), 1.0 / size) for size in schedule.sizes]).to(old.device)
    pairs = torch.zeros(sizes[0] * sizes[1], device=old.device)
    pairs.index_add_(0, (new * sizes[1] + old).flatten(), weight.expand(old.shape).flatten())
    table = pairs.view(sizes)
    table = torch.where(table.sum(1, keepdim=True) > 0, table, table.sum(0))
    return table / table.sum(1, keepdim=True)


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (min(count, 4 * _AT_ONCE),), generator=random)


def carry_codes(
    model: NextFlowModel,
    old: ImageTokenizer,
    new: ImageTokenizer,
    pictures: UInt8[np.ndarray, "n h w 3"],
    *,
    steps: int = 300,
    seed: int = 0,
) -> float:
    """Give ``model``, trained with ``old``'s codes, embeddings and head rows for ``new``'s; in place.

    A new code's row of the head is the mean of the old codes' that stand where it stands. Its embedding begins as the same
    mean and is fitted, in ``steps`` steps, so that what the blocks of a picture are fed comes out as with the old codes.
    Returns the share of those inputs' variance that the new codes explain. Raises ConfigError where the two tokenizers do
    not go together.
    """
    first, second = old.config, new.config
    if first.downsample != second.downsample or first.quantizer.dim != second.quantizer.dim:
        raise ConfigError(
            f"codes: carried needs tokenizers of one downsampling and one size of code vectors: the old one has "
            f"{first.downsample} and {first.quantizer.dim}, the new one {second.downsample} and {second.quantizer.dim}"
        )
    schedule = new.schedule_for(*pictures.shape[1:3])
    if old.schedule_for(*pictures.shape[1:3]) != schedule:
        raise ConfigError("codes: carried needs tokenizers that lay a picture out in the same scales")
    images = torch.from_numpy(pictures)
    with torch.inference_mode():
        a, b = _encoded(old, images), _encoded(new, images)
    a, b = a.clone(), b.clone()
    inputs, text = model.scale_inputs, model.config.text_vocab
    shares = shared_cells(a, b, schedule, (second.quantizer.codebook_size, first.quantizer.codebook_size))
    last = len(schedule) - 1
    summed = tuple(inputs.whole if k == last else inputs.accumulated for k in range(last + 1))
    matrix = enlarging(schedule, tuple(range(last + 1)), summed, torch.device("cpu"), torch.float32)
    vectors = inputs.code_embed.weight.detach().float() * inputs.code_scale
    table = (shares @ vectors).requires_grad_()
    optimizer = torch.optim.Adam([table], _RATE)
    for step, some in enumerate(_batches(len(a), steps, seed)):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
        error = matrix @ (table[b[some]] - vectors[a[some]])
        error.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        table = table.detach()
        wanted = matrix @ vectors[a]
        left = (matrix @ table[b] - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()
        inputs.code_embed.weight.copy_(table / inputs.code_scale)
        model.head.weight[text:] = (shares @ model.head.weight[text:].float()).to(model.head.weight)
    _LOG.info("codes carried over by %d pictures: %.3f of their inputs explained", len(a), 1 - float(left))
    return 1 - float(left)
