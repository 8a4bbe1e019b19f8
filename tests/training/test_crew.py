"""Work done by processes: in order, from any unit on, errors in one line, and a process that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from nextflow_ar.config import ConfigError
from nextflow_ar.training.crew import Crew


def _squares(offset: int) -> Callable[[int], dict[str, object]]:
    def make(unit: int) -> dict[str, object]:
        if unit == 7:
            raise ValueError("unit 7\ncannot be made")
        if unit == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        seen = torch.arange(unit, unit + 4).view(2, 2).T  # not contiguous
        return {
            "sum": unit * unit + offset,
            "seen": seen,
            "pixels": np.full(3, unit),
            "threads": torch.get_num_threads(),
        }

    return make


def test_units_come_in_order_and_again_from_any() -> None:
    crew = Crew(partial(_squares, 10), 20, 3)
    for unit in (0, 1, 2, 3, 9, 10, 4, 5, 6):
        found = crew.get(unit)
        assert found["sum"] == unit * unit + 10 and found["threads"] == 1
        assert torch.equal(found["seen"], torch.tensor([[unit, unit + 2], [unit + 1, unit + 3]]))
        assert found["seen"].is_floating_point() is False and found["pixels"].tolist() == [unit] * 3
        found["seen"].add_(1)  # may be written to
    with pytest.raises(ConfigError, match=r"^unit 7 cannot be made$"):
        crew.get(7)
    with pytest.raises(ConfigError, match="has ended"):
        crew.get(11)
    crew.close()
    crew.close()
