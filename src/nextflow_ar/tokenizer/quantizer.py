"""Multi-scale residual quantisation over a dual codebook with one shared index (paper section 2.3; TokenFlow).

A feature map (B, C, H, W), semantic channels first, is written as a sum over scales: at scale k the residual is
area-reduced to the grid (h_k, w_k), every cell takes the nearest code under ``weight * |semantic|^2 + |pixel|^2``, the
codes are bicubically enlarged to the final grid and subtracted. Everything here runs in fp32 whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow_ar.config import QuantizerConfig
from nextflow_ar.scales import BASE_SIZES, Grid, ScaleSchedule
from nextflow_ar.tokenizer.highest import highest

Trace = list[tuple[int, Tensor, Tensor]]
"""What a pass assigned: (scale, cells (n, C), codes (n,)) per scale."""

_DISTANCE_BUDGET = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Most entries of a (cells, codes) distance matrix held at once: 64 MiB in fp32, 1 GiB on a GPU."""


@dataclass(frozen=True)
class SelfCorrection:
    """Sampling of input codes while encoding (paper section 3.4).

    ``share``: of the cells of every scale, how many are sampled (paper: 0.6). ``top_k``: among that many nearest codes.
    ``temperature``: of the softmax over negative distances, in units of the mean distance to the nearest code.
    """

    share: float
    top_k: int
    temperature: float


@dataclass(frozen=True, eq=False)
class Quantized:
    """Result of a residual pass: ``features`` (B, C, H, W) fp32, ``target`` and ``input`` (B, T) int64.

    ``prefix_errors``: (S,) mean squared distance between the features and the sum after each scale.
    """

    features: Tensor
    target: Tensor
    input: Tensor
    prefix_errors: Tensor


@lru_cache(maxsize=256)
def resize_matrix(source: int, target: int, mode: str) -> Tensor:
    """(target, source) fp32 matrix of one-dimensional "area" or "bicubic" resizing; rows sum to 1."""
    with torch.inference_mode(False):  # it is kept, and training may use it after generation did
        eye = torch.eye(source)[:, None, :, None]  # (source, 1, source, 1)
        if mode == "area":
            out = F.interpolate(eye, size=(target, 1), mode="area")
        else:
            out = F.interpolate(eye, size=(target, 1), mode="bicubic", align_corners=False)
        return out[:, 0, :, 0].T.contiguous()


@lru_cache(maxsize=1024)
def _placed(source: int, target: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """:func:`resize_matrix` where it is used: a copy from the host would wait for the device, and cannot be recorded."""
    with torch.inference_mode(False):
        return resize_matrix(source, target, mode).to(device, dtype)


def resize(x: Float[Tensor, "b c h w"], size: Grid, mode: str) -> Float[Tensor, "b c i j"]:
    """Separable resizing by :func:`resize_matrix`; the identity when the size is already right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    rows = _placed(x.shape[-2], size[0], mode, x.device, x.dtype)
    columns = _placed(x.shape[-1], size[1], mode, x.device, x.dtype)
    return rows @ x @ columns.T


def kept_features(
    new: Float[Tensor, "b c h w"], old: Float[Tensor, "b c h w"], same: Bool[Tensor, "b i j"], border: int = 1
) -> Float[Tensor, "b c h w"]:
    """Features of changed pictures with those of the ``old`` ones wherever, ``border`` cells around, no pixel changed.

    An encoder's features change a little all over a picture when a part of it does, and residual codes of the last grids
    change altogether: without this, next to none of them stays what it was. ``same``: which pixels did not change.
    """
    touched = F.adaptive_max_pool2d((~same)[:, None].float(), new.shape[-2:])
    touched = F.max_pool2d(touched, 2 * border + 1, 1, border)
    return torch.where(touched > 0, new, old.to(new.dtype))


class Refiner(nn.Module):
    """VAR's convolutions behind the enlargement of each scale: ``(1 - share) * x + share * conv(x)``.

    Four convolutions are spread over the scales. NextFlow and TokenFlow leave them out; kept to measure what they do.
    """

    def __init__(self, dim: int, share: float, count: int = 4) -> None:
        super().__init__()
        self.share = share
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count))

    def forward(self, x: Float[Tensor, "b c h w"], k: int, scales: int) -> Float[Tensor, "b c h w"]:
        """Refine the enlarged grid of scale ``k`` (0-based) of ``scales``."""
        number = round(k / max(1, scales - 1) * (len(self.convolutions) - 1))
        return x * (1 - self.share) + self.convolutions[number](x) * self.share


class MultiScaleQuantizer(nn.Module):
    """The dual codebook and its residual chain.

    ``codebook``: (K, C) fp32, semantic half first. It is moved by exponential moving averages of what each code is
    assigned (:meth:`learn`), or, after :meth:`learn_by_gradient`, by an optimiser.
    """

    codebook: Tensor
    metric: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    scale_counts: Tensor

    def __init__(self, config: QuantizerConfig, num_scales: int = len(BASE_SIZES)) -> None:
        super().__init__()
        self.config = config
        size, dim = config.codebook_size, config.dim
        self.register_buffer("codebook", torch.zeros(size, dim))
        self.refiner = Refiner(dim, config.refine) if config.refine > 0 else None
        weights = [config.semantic_weight**0.5] * config.semantic_dim + [1.0] * config.pixel_dim
        self.register_buffer("metric", torch.tensor(weights), persistent=False)
        self.register_buffer("ema_count", torch.zeros(size), persistent=False)
        self.register_buffer("ema_sum", torch.zeros(size, dim), persistent=False)
        self.register_buffer("scale_counts", torch.zeros(num_scales, size), persistent=False)
        self.ema_weight = 0.0
        """Weight of all batches in the moving averages; what is missing to 1 is that of the zeros they began with."""
        self._trained = False

    def keep_trained(self) -> None:
        """Say that the codebook is a trained one: :meth:`learn` moves it from where it is, instead of making one anew."""
        self._trained = True

    def learn_by_gradient(self) -> None:
        """Make the codebook a parameter: an optimiser moves it, :meth:`learn` only counts and revives."""
        if not isinstance(self.codebook, nn.Parameter):
            codebook = self._buffers.pop("codebook")
            self.register_parameter("codebook", nn.Parameter(codebook))  # pyright: ignore[reportArgumentType]

    def _keys(self, x: Tensor) -> Tensor:
        """Vectors in the space where the shared distance is Euclidean."""
        if self.config.normalize:
            halves = (self.config.semantic_dim, self.config.pixel_dim)
            x = torch.cat([F.normalize(half, dim=-1) for half in x.split(halves, dim=-1)], dim=-1)
        return x * self.metric

    def distances(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        """Shared squared distance of vectors to every code. The whole matrix: callers chunk."""
        keys, codes = self._keys(x.float()), self._keys(self.codebook)
        return keys.square().sum(1, keepdim=True) - 2.0 * keys @ codes.T + codes.square().sum(1)

    def together(self, x: Tensor) -> int:
        """Vectors whose distances to every code are held at once."""
        return max(1, _DISTANCE_BUDGET.get(x.device.type, 1 << 24) // self.codebook.shape[0])

    def nearest(self, x: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        """Index of the nearest code of each vector; memory stays below a fixed budget for any codebook."""
        codes = self._keys(self.codebook)
        half_norms = 0.5 * codes.square().sum(1)
        step = self.together(x)
        chunks = [highest(self._keys(part) @ codes.T - half_norms)[1] for part in x.float().split(step)]
        return torch.cat(chunks)

    def sample_nearest(
        self, x: Float[Tensor, "n c"], correction: SelfCorrection, generator: torch.Generator | None
    ) -> Int[Tensor, " n"]:
        """A code per vector, drawn from the softmax over the ``top_k`` nearest."""
        out = []
        for part in x.float().split(self.together(x)):
            near, index = self.distances(part).topk(correction.top_k, dim=1, largest=False)
            unit = near[:, :1].mean().clamp_min(1e-12) * correction.temperature
            choice = torch.multinomial((-(near - near[:, :1]) / unit).softmax(1), 1, generator=generator)
            out.append(index.gather(1, choice)[:, 0])
        return torch.cat(out)

    def lookup(self, indices: Int[Tensor, "*n"]) -> Float[Tensor, "*n c"]:
        """Code vectors."""
        return F.embedding(indices, self.codebook)

    def enlarged(self, indices: Tensor, schedule: ScaleSchedule, k: int) -> Tensor:
        """Codes (B, h_k * w_k) of scale ``k`` (0-based) as their part of the sum on the final grid, (B, C, H, W)."""
        vectors = self.lookup(indices).transpose(1, 2).unflatten(2, schedule.grids[k])
        out = resize(vectors, schedule.final, "bicubic")
        return out if self.refiner is None else self.refiner(out, k, len(schedule))

    @torch.no_grad()
    def quantize(
        self,
        features: Float[Tensor, "b c h w"],
        schedule: ScaleSchedule,
        *,
        mask: Bool[Tensor, "b s"] | None = None,
        skip: bool = False,
        correction: SelfCorrection | None = None,
        corrected: Bool[Tensor, " b"] | None = None,
        generator: torch.Generator | None = None,
        trace: Trace | None = None,
    ) -> Quantized:
        """Residual pass over all scales.

        ``mask``: which scales of each row enter ``features`` (scale dropout in training); None: all. ``skip``: a scale that
        does not is left out of the residual chain as well, so that later scales make up for it.
        ``correction``: sample input codes, of the rows that ``corrected`` names (None: all); the sampled code is what is
        subtracted, so later targets answer it.
        ``trace``: collects (scale, cells (n, C), codes (n,)) for :meth:`learn`.
        """
        with torch.autocast(features.device.type, enabled=False):
            rest = features.detach().float()
            total = torch.zeros_like(rest)
            targets, inputs, errors = [], [], []
            for k, grid in enumerate(schedule):
                reduced = resize(rest, grid, "area")
                cells = reduced.flatten(2).transpose(1, 2).reshape(-1, reduced.shape[1])
                target = self.nearest(cells)
                chosen = target
                if correction is not None and correction.share > 0:
                    pick = (
                        torch.rand(len(target), generator=generator, device=target.device) < correction.share
                    )
                    if corrected is not None:
                        pick &= corrected.repeat_interleave(grid[0] * grid[1])
                    if pick.any():
                        chosen = target.clone()
                        chosen[pick] = self.sample_nearest(cells[pick], correction, generator)
                if trace is not None:
                    trace.append((k, cells, target))
                shape = (rest.shape[0], grid[0] * grid[1])
                step = self.enlarged(chosen.view(shape), schedule, k)
                kept = step if mask is None else step * mask[:, k, None, None, None]
                rest = rest - (kept if skip else step)
                errors.append(rest.square().mean())
                total = total + kept
                targets.append(target.view(shape))
                inputs.append(chosen.view(shape))
        return Quantized(total, torch.cat(targets, 1), torch.cat(inputs, 1), torch.stack(errors))

    def accumulate(
        self,
        indices: Int[Tensor, "b t"],
        schedule: ScaleSchedule,
        upto_scale: int | None = None,
        mask: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Sum of the codes' vectors over scales, on the final grid. Gradients reach the codebook if it is a parameter.

        ``upto_scale``: only the first so many scales; ``mask``: only these scales of each row.
        """
        total = self.codebook.new_zeros(indices.shape[0], self.config.dim, *schedule.final)
        with torch.autocast(total.device.type, enabled=False):
            for k in range(len(schedule) if upto_scale is None else min(upto_scale, len(schedule))):
                part = indices[:, schedule.offsets[k] : schedule.offsets[k + 1]]
                step = self.enlarged(part, schedule, k)
                total = total + (step if mask is None else step * mask[:, k, None, None, None])
        return total

    @torch.no_grad()
    def copied(
        self,
        reference: Int[Tensor, "b t"],
        codes: Int[Tensor, "b u"],
        schedule: ScaleSchedule,
        first: int,
        end: int,
    ) -> Int[Tensor, "b v"]:
        """The codes that would make a picture that begins with ``codes`` the picture ``reference``: at scales ``first`` to
        ``end - 1`` (0-based), what is nearest to what is still missing there.

        ``codes`` holds at least the scales before ``end - 1``. With the same history, these are the reference's own codes
        wherever its last grids' residuals say nothing else.
        """
        rest, out = self.accumulate(reference, schedule), []
        with torch.autocast(rest.device.type, enabled=False):
            for k in range(end):
                if k >= first:
                    cells = resize(rest, schedule.grids[k], "area").flatten(2).transpose(1, 2)
                    out.append(self.nearest(cells.flatten(0, 1)).view(cells.shape[:2]))
                if k + 1 < end:
                    part = codes[:, schedule.offsets[k] : schedule.offsets[k + 1]]
                    rest = rest - self.enlarged(part, schedule, k)
        return torch.cat(out, 1)

    @torch.no_grad()
    def learn(
        self,
        trace: Trace,
        *,
        decay: float,
        revive_below: float,
        generator: torch.Generator | None = None,
        add: Callable[[Tensor], Tensor] | None = None,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> int:
        """Move the codebook towards what it was assigned, and revive dead codes; returns how many were revived.

        ``decay``: of the moving averages. ``revive_below``: a code whose moving count per step falls under this is
        put onto a random cell of this batch; cells of every scale are equally likely, so coarse scales get their codes.
        Moving counts begin at zero: in the first steps, it is the mean so far that is compared.
        With several processes, ``add`` sums a tensor over them and ``share`` takes the first one's: statistics are those
        of all batches together, and every process ends with the same codebook.
        """
        add, share = add or _same, share or _same
        counts = torch.zeros_like(self.scale_counts)  # of all scales: processes may be at different schedules
        for k, _, index in trace:  # a sum of ones, since counting by bincount waits for the device
            counts[k].index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
        counts = add(counts)
        seen = counts.sum(1) > 0
        self.scale_counts[seen] = self.scale_counts[seen] * decay + counts[seen] * (1 - decay)
        cells = torch.cat([cells for _, cells, _ in trace])
        index = torch.cat([index for _, _, index in trace])
        if self._trained and self.ema_weight == 0:
            self._begin_trained(counts.sum(0).mean())
        self.ema_weight = self.ema_weight * decay + (1 - decay)
        self.ema_count.mul_(decay).add_(counts.sum(0), alpha=1 - decay)
        summed = add(torch.zeros_like(self.ema_sum).index_add_(0, index, cells))
        self.ema_sum.mul_(decay).add_(summed, alpha=1 - decay)
        if not isinstance(self.codebook, nn.Parameter):
            alive = self.ema_count > 1e-6
            self.codebook[alive] = self.ema_sum[alive] / self.ema_count[alive, None]
        dead = (self.ema_count < revive_below * self.ema_weight).nonzero()[:, 0]
        if len(dead):
            weights = torch.cat([torch.full((len(c),), 1.0 / len(c)) for _, c, _ in trace])
            chosen = torch.multinomial(
                weights, len(dead), replacement=len(dead) > len(cells), generator=generator
            )
            self.codebook[dead] = share(cells[chosen.to(cells.device)])
            self.ema_sum[dead] = self.codebook[dead]
            self.ema_count[dead] = 1.0
        return len(dead)

    def _begin_trained(self, average: Float[Tensor, ""]) -> None:
        """Moving averages of a trained codebook, which are not saved with it. ``average``: this step's count per code."""
        # Every code counts as the average one, so a batch moves the average code by 1 - decay; and not below a revived
        # one, so that none is dead at once.
        self.ema_count.copy_(average.clamp_min(1.0).expand_as(self.ema_count))
        self.ema_sum.copy_(self.codebook * self.ema_count[:, None])
        self.ema_weight = 1.0

    def uncertainty(
        self,
        features: Float[Tensor, "b c h w"],
        codes: Int[Tensor, "b t"],
        schedule: ScaleSchedule,
        temperature: float = 1.0,
        cells: int = 256,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Entropy term: mean entropy of each cell's soft choice of a code, minus the entropy of the mean choice (nats).

        Low when cells choose clearly and, together, choose all codes. ``cells``: at most so many per scale, picked at
        random. Gradients reach the features; ``temperature`` is in units of the mean distance to the nearest code.
        """
        with torch.autocast(features.device.type, enabled=False):
            rest, picked = features.float(), []
            for k, grid in enumerate(schedule):
                reduced = resize(rest, grid, "area").flatten(2).transpose(1, 2).flatten(0, 1)
                order = torch.randperm(len(reduced), generator=generator)[:cells].to(reduced.device)
                picked.append(reduced[order])
                part = codes[:, schedule.offsets[k] : schedule.offsets[k + 1]]
                rest = rest - self.enlarged(part, schedule, k).detach()
            distances = self.distances(torch.cat(picked))
            unit = distances.detach().min(1).values.mean().clamp_min(1e-12) * temperature
            choice = (-distances / unit).softmax(1)
            return _entropy(choice).mean() - _entropy(choice.mean(0))

    def usage(self) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """Per scale, from the moving counts: share of codes in use, and perplexity of the code distribution."""
        share = self.scale_counts / self.scale_counts.sum(1, keepdim=True).clamp_min(1e-9)
        perplexity = _entropy(share).exp()
        return (share > 0.01 / self.config.codebook_size).float().mean(1), perplexity


def _same(x: Tensor) -> Tensor:
    return x


def _entropy(share: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    return -(share * share.clamp_min(1e-12).log()).sum(-1)
