"""What an edit leaves alone: PSNR outside the changed area, against the image tokenizer's round trip."""

from __future__ import annotations

import math

import numpy as np

from nextflow_ar.data.playground.canvases import Box, base_of

_MOST = 99.0
"""PSNR of equal pictures, in dB."""
_MARGIN = 1 / 16
"""Of the base: pixels around the area that are not counted, since a decoder's pixels see their neighbours."""
_LEAST = 0.03
"""Share of the picture that has to lie outside for it to be measured."""


def outside(shape: tuple[int, int], box: Box) -> np.ndarray:
    """(H, W) bool: what lies outside of a box (top, left, bottom, right) and its margin."""
    margin = round(base_of(shape) * _MARGIN)
    mask = np.ones(shape, bool)
    top, left, bottom, right = box
    mask[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = False
    return mask


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """PSNR in dB of two pictures (H, W, 3) uint8 where ``mask`` holds, at most 99."""
    error = float(((a[mask].astype(np.float64) - b[mask]) ** 2).mean())
    return _MOST if error == 0 else min(_MOST, 10 * math.log10(255**2 / error))


def behind(source: np.ndarray, trip: np.ndarray, drawn: np.ndarray, box: Box) -> float | None:
    """By how many dB an edited picture falls behind the round trip of its source outside the changed box; below 0 where
    it is nearer to the source. None where (nearly) everything may change; 99 for a picture of another size.
    """
    mask = outside((source.shape[0], source.shape[1]), box)
    if mask.mean() < _LEAST:
        return None
    if drawn.shape != source.shape:
        return _MOST
    return round(psnr(source, trip, mask) - psnr(source, drawn, mask), 2)
