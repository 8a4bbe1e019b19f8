"""Matrix products whose results do not depend on what else is in the batch.

Libraries choose a kernel by the number of rows, and some kernels sum in another order: the same row then comes out a
rounding apart, and a sampled code may flip. Which products of a model do so is measured on the machine at hand; those
are computed sequence by sequence.
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


class BySequence(nn.Linear):
    """A linear layer that multiplies the sequences of a batch one by one."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, L, K) to (B, L, N)."""
        if input.ndim < 3 or input.shape[0] == 1:
            return F.linear(input, self.weight, self.bias)
        return torch.stack([F.linear(one, self.weight, self.bias) for one in input])


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
        return torch.stack([F.linear(one, weight) for one in hidden]).float()
    flat = hidden.flatten(0, 1)
    if len(flat) < LEAST_ROWS:
        flat = torch.cat([flat, flat.new_zeros(LEAST_ROWS - len(flat), flat.shape[1])])
    return F.linear(flat, weight)[: rows * n].view(rows, n, -1).float()
