"""Weights in fewer bits, through torchao: an optional package, for inference."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.storage import StorageError

Bits = Literal["int8", "int4", "fp8"]


def quantise(model: NextFlowModel, bits: Bits) -> int:
    """Keep the linear layers of the transformer's stack in fewer bits, in place; returns how many.

    "int8" and "int4" keep weights alone (less to read: text and coarse scales gain); "fp8" multiplies in 8 bits too (large
    grids gain), on GPUs that can. Embeddings, norms and the head stay as they are. Raises StorageError where torchao is
    missing, and ValueError for another name.
    """
    if bits not in get_args(Bits):
        raise ValueError(f"bits is one of {', '.join(get_args(Bits))}, got {bits!r}")
    try:
        from torchao import quantization as ao  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise StorageError(f"{bits} weights need torchao: pip install 'nextflow-ar[lowbit]'") from None
    names = {
        "int8": "Int8WeightOnlyConfig",
        "int4": "Int4WeightOnlyConfig",
        "fp8": "Float8DynamicActivationFloat8WeightConfig",
    }
    config = getattr(ao, names[bits])()
    ao.quantize_(model.backbone.layers, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return sum(isinstance(m, nn.Linear) for m in model.backbone.layers.modules())
