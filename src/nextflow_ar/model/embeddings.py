"""What the transformer is fed: text, code vectors enlarged to the next grid, scale and scale-length embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextflow_ar.config import ModelConfig
from nextflow_ar.scales import BASE_SIZES, Grid, ScaleSchedule
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, resize

_LINEAR = 1024
"""Codes of a picture up to which its blocks come from its code vectors by one matrix: a few operations instead of a
hundred, which is what a GPU waits for in training. Larger matrices would cost more than they save."""


@lru_cache(maxsize=512)
def enlarging(
    schedule: ScaleSchedule,
    blocks: tuple[int, ...],
    accumulated: tuple[bool, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "m t"]:
    """What turns all code vectors of a picture, as rows, into what its ``blocks`` are fed (:meth:`ScaleInputs.block`)."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        out = []
        for k, summed in zip(blocks, accumulated, strict=True):
            target = schedule.final if k + 1 == len(schedule) else schedule.grids[k + 1]
            part = torch.zeros(target[0] * target[1], schedule.num_tokens)
            for j in range(0 if summed else k, k + 1):
                size = schedule.sizes[j]
                cells = torch.eye(size).view(size, 1, *schedule.grids[j])
                if summed:
                    cells = resize(cells, schedule.final, "bicubic")
                cells = resize(cells, target, "area" if summed else "bicubic")
                part[:, schedule.offsets[j] : schedule.offsets[j + 1]] = cells.flatten(1).T
            out.append(part)
        return torch.cat(out).to(device, dtype)


def sinusoid(values: Int[Tensor, "*n"], dim: int) -> Float[Tensor, "*n d"]:
    """Sine and cosine of ``values`` at geometric wavelengths."""
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(dim // 2, device=values.device) / (dim // 2))
    angles = values[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def learned_places(config: ModelConfig) -> int:
    """Rows of the table of learned positions: none; one for every number that a cell of a grid can have ("learned"); or one
    for every cell of every square grid that is ever fed, so of all scales but the first ("learned_1d").
    """
    if config.positions == "learned_1d":
        return sum(side * side for side in BASE_SIZES[1 : config.max_scales])
    return BASE_SIZES[-1] ** 2 if config.positions == "learned" else 0


@lru_cache(maxsize=512)
def stretching(base: int, side: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "side base"]:
    """What turns ``base`` values along a line, by its cells' middles, into ``side`` values of the same line, linearly."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        cells = torch.eye(base)[None]
        lines = nn.functional.interpolate(cells, side, mode="linear", align_corners=False)
        return lines[0].T.contiguous().to(device, dtype)


class ScaleInputs(nn.Module):
    """Codes of an image to the inputs of its blocks (paper section 2.2, residual features).

    ``codes``: (K, C) embedding, started from the tokenizer's codebook. The connector maps C to the hidden size.

    With ``copies``, a picture that is drawn behind another one of its size (its reference) is told in every cell which code
    would bring it nearer to that one: it is fed that code's vector, and may point at the code by one gated term in the
    hidden state (:meth:`pointed`). Which code that is, the image tokenizer's quantiser says (:meth:`ask`).
    """

    code_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.accumulated = config.scale_input == "accumulated"
        self.whole = "accumulated" in (config.scale_input, config.closing_input)
        self.code_embed = nn.Embedding(config.codes, config.code_dim)
        self.register_buffer("code_scale", torch.ones(()))
        self.connector = nn.Sequential(
            nn.Linear(config.code_dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )
        self.scale_embed = nn.Embedding(config.max_scales + 1, config.hidden)
        self.length_embed = nn.Linear(config.hidden, config.hidden, bias=False)
        self.place_embed = None
        if config.positions != "rope":
            self.place_embed = nn.Embedding(learned_places(config), config.hidden)
        self.by_scale = config.positions == "learned_1d"
        self.copy_connector = self.copy_gate = None
        if config.copies:
            self.copy_connector = nn.Linear(config.code_dim, config.hidden, bias=False)
            self.copy_gate = nn.Linear(config.hidden, 1)
        self._quantizer: tuple[MultiScaleQuantizer, ...] = ()

    def ask(self, quantizer: MultiScaleQuantizer) -> None:
        """Let ``quantizer``, the image tokenizer's, say which codes would copy; it stays the tokenizer's."""
        self._quantizer = (quantizer,)

    @torch.no_grad()
    def copied(
        self,
        reference: Int[Tensor, "n t"],
        codes: Int[Tensor, "n u"],
        schedule: ScaleSchedule,
        first: int,
        end: int,
        *,
        alone: bool = True,
    ) -> Int[Tensor, "n v"]:
        """Which codes would copy, at scales ``first`` to ``end - 1`` (0-based); -1 in rows whose ``reference`` is -1.
        ``alone``: every row by itself, so that it depends on no other.

        Raises RuntimeError before :meth:`ask`.
        """
        if not self._quantizer:
            raise RuntimeError("a model with copies has to be given the image tokenizer's quantiser first")
        quantizer, known = self._quantizer[0], reference.clamp_min(0)
        size = 1 if alone else len(codes)
        rows = zip(known.split(size), codes.split(size), strict=True)
        found = torch.cat([quantizer.copied(r, c, schedule, first, end) for r, c in rows])
        return torch.where(reference[:, :1] >= 0, found, -1)

    def told(self, copied: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """What the places are fed beside their own inputs that predict where ``copied`` would copy."""
        assert self.copy_connector is not None
        vectors = self.code_embed(copied.clamp_min(0)) * self.code_scale
        return self.copy_connector(vectors) * (copied >= 0)[..., None]

    def pointed(
        self, hidden: Float[Tensor, "*n d"], copied: Int[Tensor, "*n"], head: Float[Tensor, "k d"]
    ) -> Float[Tensor, "*n d"]:
        """What is added to hidden states, so that their score of the code that would copy rises by what the gate says.
        ``head``: the head's rows of the codes, which learn nothing by this.
        """
        assert self.copy_gate is not None
        rows = head.detach()[copied.clamp_min(0)]
        rows = rows / rows.square().sum(-1, keepdim=True).clamp_min(1e-6)
        return (self.copy_gate(hidden) * rows * (copied >= 0)[..., None]).to(hidden.dtype)

    @torch.no_grad()
    def start_from(self, codebook: Float[Tensor, "k c"]) -> None:
        """Take the tokenizer's codebook as embedding; vectors are brought to unit deviation on their way in."""
        self.code_embed.weight.copy_(codebook)
        self.code_scale.fill_(1.0 / float(codebook.std().clamp_min(1e-6)))

    def block(
        self, codes: Int[Tensor, "n t"], schedule: ScaleSchedule, k: int, total: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Vectors fed to the block that follows scale ``k`` (0-based) of ``codes``: grid k's codes, enlarged.

        ``codes`` holds at least scales 0..k. With accumulated input, the sum over scales 0..k, reduced to the grid; the
        block after the last scale has an option of its own.
        """
        closing = k + 1 == len(schedule)
        target = schedule.final if closing else schedule.grids[k + 1]
        if not (self.whole if closing else self.accumulated):
            return resize(self._vectors(codes, schedule, k), target, "bicubic")
        summed = sum(
            resize(self._vectors(codes, schedule, j), schedule.final, "bicubic") for j in range(k + 1)
        )
        assert isinstance(summed, Tensor)
        return resize(summed, target, "area")

    def _vectors(self, codes: Tensor, schedule: ScaleSchedule, k: int) -> Tensor:
        part = codes[:, schedule.offsets[k] : schedule.offsets[k + 1]]
        return self.code_embed(part).transpose(1, 2).unflatten(2, schedule.grids[k]) * self.code_scale

    def vectors(
        self, codes: Int[Tensor, "n t"], schedule: ScaleSchedule, scales: int, closed: bool
    ) -> Float[Tensor, "n m c"]:
        """What the blocks of the first ``scales`` scales after ``<boi>`` are fed, before the connector; the closing block
        too if ``closed``, or that block alone (``scales`` 0).
        """
        blocks = [*range(scales - 1), *([len(schedule) - 1] if closed else [])]
        if not blocks:
            return self.code_embed.weight.new_zeros(codes.shape[0], 0, self.code_embed.embedding_dim)
        if schedule.num_tokens <= _LINEAR and codes.shape[1] == schedule.num_tokens:
            last = len(schedule) - 1
            summed = tuple(self.whole if k == last else self.accumulated for k in blocks)
            weight = self.code_embed.weight
            rows = self.code_embed(codes) * self.code_scale
            matrix = enlarging(schedule, tuple(blocks), summed, weight.device, rows.dtype)
            return matrix @ rows
        return torch.cat([self.block(codes, schedule, k).flatten(2).transpose(1, 2) for k in blocks], dim=1)

    def places(self, schedule: ScaleSchedule, blocks: Sequence[int]) -> Float[Tensor, "m d"]:
        """Learned positions of the cells of the ``blocks`` that follow these scales (0-based), one block after the other.

        Of "learned_1d", a scale's rows are the cells of its square grid; a grid of another shape is given what lies between
        them: a place in the picture means the same in all shapes. The closing block stands where the last grid does.
        """
        assert self.place_embed is not None
        device, last = self.place_embed.weight.device, len(schedule) - 1
        scales = [min(k + 1, last) for k in blocks]
        grids = [schedule.grids[scale] for scale in scales]
        if not self.by_scale:
            return self.place_embed(torch.cat([torch.arange(h * w, device=device) for h, w in grids]))
        sides = [BASE_SIZES[scale] for scale in scales]
        starts = [sum(side * side for side in BASE_SIZES[1:scale]) for scale in scales]
        rows = [
            torch.arange(start, start + side * side, device=device)
            for start, side in zip(starts, sides, strict=True)
        ]
        tables = self.place_embed(torch.cat(rows)).split([side * side for side in sides])
        return torch.cat([_stretched(*each) for each in zip(tables, sides, grids, strict=True)])

    def tags(self, scales: Int[Tensor, "b l"], lengths: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Scale and scale-length embeddings of every place of an image; zero elsewhere."""
        on = (scales >= 0)[..., None]
        scale = self.scale_embed(scales.clamp_min(0))
        counts = torch.arange(self.scale_embed.num_embeddings + 1, device=lengths.device)
        table = self.length_embed(
            sinusoid(counts, self.scale_embed.embedding_dim).to(self.length_embed.weight.dtype)
        )
        # not by an index, whose gradient is summed in any order by several threads
        return (scale + nn.functional.embedding(lengths, table)) * on


def _stretched(table: Float[Tensor, "n d"], side: int, grid: Grid) -> Float[Tensor, "m d"]:
    """A square grid's rows as those of another grid over the same picture."""
    if grid == (side, side):
        return table
    down, across = (stretching(side, n, table.device, table.dtype) for n in grid)
    rows = (down @ table.view(side, -1)).view(grid[0], side, -1)
    return (across @ rows).flatten(0, 1)
