"""Matrix products whose results do not depend on what else is in the batch.

Libraries choose a kernel by the number of rows, and some kernels sum in another order: the same row then comes out a
rounding apart, and a sampled code may flip. Which products of a model do so is measured on the machine at hand; those
are computed sequence by sequence, or as many sequences at once as measurably give the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_ROWS = 16
"""Products of fewer rows are padded up by the caller: nearly all libraries have kernels of their own for them."""
_PROBES = (16, 24, 36, 48, 64, 72, 100, 128, 200, 256, 384, 512)
_MOST = 1024
_TOGETHER, _PLACES, _WORK = 64, 2048, 2e10
"""What is tried together: so many sequences, of so many places in all, for so many multiplications of one shape."""


class BySequence(nn.Linear):
    """A linear layer whose sequences come out as if they were multiplied one by one."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, L, K) to (B, L, N)."""
        if input.ndim < 3 or input.shape[0] == 1:
            return F.linear(input, self.weight, self.bias)
        return by_sequence(input, self.weight, self.bias)


def by_sequence(
    x: Float[Tensor, "b l k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "b l n"]:
    """``F.linear`` of every sequence by itself, to the bit; those that can be are multiplied together."""
    rows, length, columns = x.shape
    sizes = grouped(rows, together(columns, weight.shape[0], x.dtype, length, torch.get_num_threads()))
    found, at = [], 0
    for size in sizes:
        part = x[at : at + size].reshape(-1, columns)
        if at + size > rows:  # the last group is filled up
            part = torch.cat([part, part.new_zeros((at + size - rows) * length, columns)])
        found.append(F.linear(part, weight, bias))
        at += size
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole[: rows * length].view(rows, length, -1)


@lru_cache(maxsize=4096)
def grouped(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``rows`` sequences as groups of admissible ``sizes``, few of them; the last may have to be filled up."""
    found: list[int] = []
    while (left := rows - sum(found)) > 0:
        fit = max(size for size in sizes if size <= left)
        above = [size for size in sizes if left < size <= 2 * left]
        found.append(min(above) if above and left > 2 * fit else fit)
    return tuple(found)


@lru_cache(maxsize=4096)
def together(columns: int, outputs: int, dtype: torch.dtype, length: int, threads: int) -> tuple[int, ...]:
    """How many sequences of ``length`` can be multiplied at once with an (outputs, columns) matrix and come out as one by
    one, to the bit; 1 is always among them. ``threads``: kernels are chosen by their number too.

    Tried on a product whose terms cancel, so that what is left of it is rounding alone: another order of summing shows in
    every place.
    """
    most = min(_TOGETHER, _PLACES // length)
    while most > 1 and most * (most + 1) / 2 * length * columns * outputs > _WORK:
        most -= 1
    if most < 2:
        return (1,)
    with torch.inference_mode(False), torch.no_grad():
        x, weight = _cancelling(most * length, columns, outputs, dtype)
        alone = torch.cat([F.linear(one, weight) for one in x.split(length)])
        return (
            1,
            *(
                count
                for count in range(2, most + 1)
                if torch.equal(F.linear(x[: count * length], weight), alone[: count * length])
            ),
        )


def _cancelling(rows: int, columns: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, columns) and (outputs, columns) whose products would be next to nothing in exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    half = columns // 2
    order = torch.randperm(columns, generator=generator)
    one, other = order[:half], order[half : 2 * half]
    x[:, other], weight[:, other] = x[:, one], -weight[:, one]
    x[:, order[0]] += 0.01 * torch.randn(rows, generator=generator)
    return x.to(dtype), weight.to(dtype)


@lru_cache(maxsize=256)
def varies(columns: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether CPU products with an (outputs, columns) matrix round differently for different numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(_MOST, columns, generator=generator).to(dtype)
        weight = torch.randn(min(outputs, 1024), columns, generator=generator).to(dtype)
        whole = F.linear(x, weight)
        return any(not torch.equal(F.linear(x[:rows], weight), whole[:rows]) for rows in _PROBES)


def keep_steady(model: nn.Module) -> int:
    """Let every linear layer of ``model`` whose products vary work sequence by sequence; returns how many do.

    For inference on CPUs: training gains nothing from it, and GPUs are not probed.
    """
    found = 0
    for module in model.modules():
        plain = type(module) is nn.Linear and module.weight.device.type == "cpu"
        if plain and varies(module.in_features, module.out_features, module.weight.dtype):
            module.__class__ = BySequence
            found += 1
    return found


def steady_scores(hidden: Float[Tensor, "r n d"], weight: Float[Tensor, "v d"]) -> Float[Tensor, "r n v"]:
    """fp32 ``hidden @ weight.T``, the same for a row in any batch."""
    rows, n, _ = hidden.shape
    if weight.device.type == "cpu" and varies(weight.shape[1], weight.shape[0], weight.dtype):
        return by_sequence(hidden, weight).float()
    flat = hidden.flatten(0, 1)
    if len(flat) < LEAST_ROWS:
        flat = torch.cat([flat, flat.new_zeros(LEAST_ROWS - len(flat), flat.shape[1])])
    return F.linear(flat, weight)[: rows * n].view(rows, n, -1).float()
