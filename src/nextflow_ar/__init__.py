"""NextFlow-AR: text and images in one autoregressive transformer, images predicted scale by scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Document

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline
    from nextflow_ar.model.nextflow import NextFlowModel
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

__all__ = ["Document", "ImageTokenizer", "NextFlowModel", "NextFlowPipeline", "ScaleSchedule"]
_HOMES = {
    "NextFlowPipeline": "nextflow_ar.generation.pipeline",
    "NextFlowModel": "nextflow_ar.model.nextflow",
    "ImageTokenizer": "nextflow_ar.tokenizer.image_tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import the heavy classes when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
