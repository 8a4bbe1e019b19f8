"""Choosing tokens from logits: pure functions and the settings that steer them.

Every row draws from a generator of its own, and every operation works row by row, so a row's tokens do not depend on
which other rows share its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerScale = float | tuple[float, ...]
"""One value for all scales, two (a straight line from the first scale to the last), or one for each scale."""
MOST = 100.0
"""Greatest guidance and temperature: far beyond what is of use, and far from where scores stop being numbers."""
COLDEST = 1e-5
"""Temperature below which the best entry is taken: divided by less, scores would in the end not be numbers."""

_LIKELY = 0.05
"""Share of the best word's probability that a word needs to be chosen under guidance."""
_LEAST = 1e-3
"""Probability without the picture below which a word counts as no rarer still."""


class SettingError(ValueError):
    """A sampling setting that makes no sense: one line that says what is accepted."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Every field may differ by scale (:data:`PerScale`); text takes one value, or two of which the
    first counts.

    ``guidance``: 0 to 100, 1 is none; logits are ``u + guidance * (c - u)`` of conditional c and unconditional u.
    ``temperature``: 0 to 100; 0, or next to it, always takes the best. ``top_k``: only so many best entries, 0 for all.
    ``top_p``: only the smallest set of best entries with at least this probability. Raises SettingError for other numbers.
    """

    guidance: PerScale = 1.0
    temperature: PerScale = 1.0
    top_k: PerScale = 0
    top_p: PerScale = 1.0

    def __post_init__(self) -> None:
        for name, low, high, what in (
            ("guidance", 0.0, MOST, f"a number from 0 to {MOST:g}"),
            ("temperature", 0.0, MOST, f"a number from 0 to {MOST:g}"),
            ("top_k", 0.0, float("inf"), "a whole number of at least 0 (0: all)"),
            ("top_p", 1e-9, 1.0, "a number above 0 and at most 1"),
        ):
            for value in values_of(getattr(self, name)):
                whole = name != "top_k" or float(value).is_integer()
                if not (low <= value <= high and value < float("inf") and whole):
                    raise SettingError(f"{name.replace('_', '-')} is {what}, got {value:g}")

    def at(self, scale: int, scales: int) -> tuple[float, float, int, float]:
        """(guidance, temperature, top_k, top_p) at 0-based ``scale`` of ``scales``."""
        g, t, k, p = (at_scale(getattr(self, f.name), scale, scales, f.name) for f in fields(self))
        return g, t, round(k), p

    def check(self, scales: int) -> None:
        """Raises SettingError where a field has another number of values than ``scales`` take; 1: those of a text."""
        self.at(0, scales)

    @property
    def guided(self) -> bool:
        """Whether any scale needs unconditional rows."""
        return any(value != 1.0 for value in values_of(self.guidance))

    def changed(self, **changes: Any) -> SamplingSettings:
        """A copy with the fields that are not None changed."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def values_of(value: PerScale) -> tuple[float, ...]:
    """The numbers of a setting."""
    return value if isinstance(value, tuple) else (value,)


def at_scale(value: PerScale, scale: int, scales: int, name: str = "the setting") -> float:
    """A setting's value at one scale. Raises SettingError when the number of values fits no rule."""
    if not isinstance(value, tuple):
        return float(value)
    if len(value) == 1:
        return float(value[0])
    if len(value) == scales:
        return float(value[scale])
    if len(value) == 2:
        share = scale / max(1, scales - 1)
        return float(value[0] + (value[1] - value[0]) * share)
    several = f", two (first and last scale) or one for each of the {scales} scales"
    words = " for words, which have no scales"
    raise SettingError(
        f"{name.replace('_', '-')} takes one value{several if scales > 1 else words}, got {len(value)}"
    )


def guide(
    conditional: Float[Tensor, "n v"], unconditional: Float[Tensor, "n v"], guidance: float
) -> Float[Tensor, "n v"]:
    """Classifier-free guidance on logits."""
    return unconditional + guidance * (conditional - unconditional)


def guide_words(
    conditional: Float[Tensor, "n v"], unconditional: Float[Tensor, "n v"], guidance: float
) -> Float[Tensor, "n v"]:
    """Guidance on the next word: on log-probabilities, among words that are at all likely (a twentieth of the best).

    What is said of any picture counts less, what this one shows counts more; a word that hardly fits the picture cannot
    win by being rare.
    """
    seen, blind = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    scores = guide(seen, blind.clamp(min=math.log(_LEAST)), guidance)
    return scores.masked_fill(seen < seen.amax(-1, keepdim=True) + math.log(_LIKELY), float("-inf"))


def keep_best(logits: Float[Tensor, "n v"], top_k: int, top_p: float) -> Float[Tensor, "n v"]:
    """Logits with everything outside the ``top_k`` best and the ``top_p`` nucleus at -inf; the best always stays.

    Entries that tie with the last one kept by ``top_k`` are kept as well; the nucleus is cut at exact ranks.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        logits = logits.masked_fill(_beyond(logits, _nucleus(logits, top_p)), float("-inf"))
    return logits


def _nucleus(logits: Float[Tensor, "n v"], top_p: float) -> tuple[Tensor, Tensor]:
    """(n, 1) how many entries of each row are the nucleus, and the least of their values."""
    ordered = _descending(logits)
    sums = ordered.softmax(-1).cumsum(-1)
    last = torch.searchsorted(sums, torch.full_like(sums[..., :1], top_p)).clamp_max(logits.shape[-1] - 1)
    return last + 1, ordered.gather(-1, last)


def _descending(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Every row's values, the greatest first. On a CPU through numpy, which sorts values alone thirty times faster."""
    if logits.device.type != "cpu":
        return logits.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[..., ::-1].copy())


def _beyond(logits: Float[Tensor, "n v"], nucleus: tuple[Tensor, Tensor]) -> Bool[Tensor, "n v"]:
    """Which entries are not among the best that ``nucleus`` counts; equals are ranked as they stand."""
    kept, least = nucleus
    below = logits < least
    shared = (logits.shape[-1] - below.sum(-1) > kept[..., 0]).nonzero()[:, 0]
    if len(shared):  # several entries have the last place's value
        some, value = logits[shared], least[shared]
        equal = some == value
        room = kept[shared] - (some > value).sum(-1, keepdim=True)
        below[shared] |= equal & (equal.cumsum(-1) > room)
    return below


def draw(
    logits: Float[Tensor, "n v"], temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """One entry per row of logits: the first at which the sum of the probabilities, in the order of the entries, exceeds
    one number of ``generator``'s; the best at temperature 0, or next to it (:data:`COLDEST`).

    The filters see the tempered distribution. Numbers are made where the generator lives: a CPU's are the same for every
    device, one of the logits' own device is faster. Consumes ``n`` of them whatever the settings, so that changing one
    scale's settings does not shift the numbers of later scales. Raises FloatingPointError where a row has nothing to
    choose: logits that are no numbers, or all at -inf; with a GPU's own generator, where nothing waits for the GPU, such a
    row gets any entry.
    """
    logits = logits.float()
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float32, device=generator.device)
    if temperature < COLDEST:
        best = logits.argmax(-1)
        _can_choose(logits.gather(-1, best[..., None]) > float("-inf"), generator)
        return best
    sums = keep_best(logits / temperature, top_k, top_p).softmax(-1).cumsum(-1)
    whole = sums[..., -1:]
    _can_choose(whole > 0, generator)
    wanted = torch.minimum(uniform.to(whole.device) * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(sums, wanted, right=True)[..., 0].clamp_max(sums.shape[-1] - 1)


def _can_choose(rows: Bool[Tensor, "n 1"], generator: torch.Generator) -> None:
    """Raises FloatingPointError where it does not hold for all rows: searched for all the same, the entry that is found
    would lie behind the last one, or be one that is ruled out.
    """
    if generator.device.type == "cpu" and not bool(rows.all()):
        raise FloatingPointError("the model's scores are no numbers: nothing can be chosen by them")


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator per row: the same seed gives the same noise on every device and in every batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
