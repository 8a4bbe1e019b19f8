"""The precision in which a device computes fastest: bf16 where its processor multiplies in it, fp32 elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]
"""What a recipe may ask for; "auto" is what :func:`best_dtype` finds."""

_CPU_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""Private to torch: absent in some versions, then bf16 is not taken."""


@lru_cache
def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with instructions for its products; fp32 on all others.

    A CPU with AVX2 alone takes some twenty times as long for a matrix product in bf16 as in fp32, and fifty times for a
    convolution (benchmarks/precision.py).
    """
    if device.type != "cpu":
        return torch.bfloat16
    fast = any(getattr(torch.cpu, name, lambda: False)() for name in _CPU_CHECKS)
    return torch.bfloat16 if fast else torch.float32


def chosen_dtype(device: torch.device, asked: Precision = "auto") -> torch.dtype:
    """What is computed in where a recipe asks for ``asked``."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(asked) or best_dtype(device)


def precision_name(device: torch.device, asked: Precision = "auto") -> str:
    """:func:`chosen_dtype` in short, for people: "bf16" or "fp32"."""
    return "bf16" if chosen_dtype(device, asked) == torch.bfloat16 else "fp32"


def mixed_precision(device: torch.device, asked: Precision = "auto", on: bool = True) -> torch.autocast:
    """Autocast to :func:`chosen_dtype`; does nothing where that is fp32, or with ``on`` False."""
    on = on and chosen_dtype(device, asked) != torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=on)
