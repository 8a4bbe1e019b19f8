"""Values that go from one process to another as bytes."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


class _Packer(pickle.Pickler):
    """Tensors as arrays: torch's own way takes a file for each."""

    def reducer_override(self, obj: Any) -> Any:
        """See :class:`pickle.Pickler`."""
        if isinstance(obj, torch.Tensor) and obj.device.type == "cpu" and obj.dtype != torch.bfloat16:
            return torch.from_numpy, (obj.detach().contiguous().numpy(),)
        return NotImplemented


def packed(value: Any) -> memoryview:
    """Bytes that ``pickle.loads`` makes the value of again. Raises what pickle raises for what cannot be written."""
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(value)
    return buffer.getbuffer()
