"""Self-correction of pictures that are encoded together, each by numbers of its own (paper section 3.4).

A training's pictures are dealt out to processes and parts of a step in many ways; what a picture becomes must not follow
from which others are beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, SelfCorrection, resize


def chances(seeds: Tensor, count: int) -> Tensor:
    """(N, count) fp32 numbers from 0 to below 1 that follow from (N,) int64 seeds, on any device: splitmix64, since a
    generator for each of thousands of pictures would take longer than their codes.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # a shift keeps the sign, which is but a bit here

    # 0x9E3779B97F4A7C15 and so on, as numbers with a sign
    x = seeds[:, None] - 0x61C8864680B583EB * torch.arange(1, count + 1, device=seeds.device)
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return shifted(x ^ shifted(x, 31), 40).float() / (1 << 24)


@torch.no_grad()
def corrected_codes(
    quantizer: MultiScaleQuantizer,
    features: Tensor,
    schedule: ScaleSchedule,
    correction: SelfCorrection,
    shares: Tensor,
    seeds: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, T) target and input codes of (N, C, h, w) features as :meth:`MultiScaleQuantizer.quantize` makes them, but those
    of a picture follow from it alone, whatever others are beside it: from its seed (``seeds``: (N,) int64), and with the
    picture's own mean distance to the nearest code as the unit of the temperature. ``shares``: (N,) of cells to sample.
    """
    count, dim = features.shape[:2]
    numbers = chances(seeds, 2 * schedule.num_tokens).view(count, 2, -1)
    targets, inputs = [], []
    with torch.autocast(features.device.type, enabled=False):
        rest = features.float()
        for k, grid in enumerate(schedule):
            cells = resize(rest, grid, "area").flatten(2).transpose(1, 2)
            target = quantizer.nearest(cells.reshape(-1, dim)).view(count, -1)
            here = numbers[:, :, schedule.offsets[k] : schedule.offsets[k + 1]]
            pick, chosen = here[:, 0] < shares[:, None], target
            if pick.any():
                chosen = target.clone()
                chosen[pick] = _sampled(quantizer, cells[pick], correction, pick, here[:, 1][pick])
            rest = rest - quantizer.enlarged(chosen, schedule, k)
            targets.append(target)
            inputs.append(chosen)
    return torch.cat(targets, 1), torch.cat(inputs, 1)


def _sampled(
    quantizer: MultiScaleQuantizer,
    cells: Tensor,
    correction: SelfCorrection,
    pick: Tensor,
    numbers: Tensor,
) -> Tensor:
    """A code for each of (n, C) cells, drawn by (n,) ``numbers`` from the softmax over the ``top_k`` nearest. ``pick``: (N,
    cells) whose they are.
    """
    parts = cells.split(quantizer.together(cells))
    found = [quantizer.distances(part).topk(correction.top_k, dim=1, largest=False) for part in parts]
    near, index = torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])
    least = torch.zeros(pick.shape, device=near.device)
    least[pick] = near[:, 0]
    mean = least.sum(1, keepdim=True) / pick.sum(1, keepdim=True).clamp_min(1)
    unit = (mean.clamp_min(1e-12) * correction.temperature).expand(pick.shape)[pick]
    share = (-(near - near[:, :1]) / unit[:, None]).softmax(1)
    choice = (numbers[:, None] >= share.cumsum(1)).sum(1).clamp_max(correction.top_k - 1)
    return index.gather(1, choice[:, None])[:, 0]
