"""Work done by processes: in order, from any unit on, errors in one line, and a process that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


def _large(sleep: float) -> Callable[[int], np.ndarray]:
    time.sleep(sleep)
    return lambda unit: np.full(1 << 16, unit)  # more than a pipe holds


_STOPPED = """
import os, signal, threading, time
from functools import partial
from nextflow_ar.training.crew import Crew
from tests.training.test_crew import _large

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if __name__ == "__main__":
    for number in STOPS:
        signal.signal(number, lambda number, _: print(number, flush=True))
    def all_hear():
        for number in STOPS:
            os.killpg(0, number)
            time.sleep(0.1)
    early = threading.Timer(0.2, all_hear)  # while the processes still import
    early.start()
    crew = Crew(partial(_large, 0.5), 10**6, 2)
    crew.get(0)
    early.join()
    all_hear()
    right = [int(crew.get(unit)[7]) == unit for unit in range(1, 60)]
    print(all(right), *(process.pid for process in crew._processes), flush=True)
"""


def test_only_the_first_process_hears_a_request_to_stop() -> None:
    """Clusters tell every process of a group; and a run that ends without close() leaves none behind, nor waits."""
    command = [sys.executable, "-c", _STOPPED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, start_new_session=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *heard, told = done.stdout.splitlines()
    asked = [int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert sorted(int(number) for number in heard) == sorted(2 * asked)
    right, *pids = told.split()
    assert right == "True" and len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


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
