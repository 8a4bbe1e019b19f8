"""What a step is measured by: losses and accuracies by scale and by task, and how fast it went."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.model.nextflow import LossReport
from nextflow_ar.precision import Precision, best_dtype, chosen_dtype
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.layout import IGNORED

Tasks = Sequence[Sequence[str]]
"""For every row of a batch, the tasks of its documents, in order."""
Means = dict[str, tuple[float, int]]
"""By name, a mean and how many tokens it is of."""
_ALL, _IMAGE = "all", "image"
_LOG = logging.getLogger(__name__)


class LossMeter:
    """Collects the reports of one step's batches."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._right: list[Tensor] = []
        self._tasks: list[Tensor] = []
        self._names: list[str] = []

    def add(self, batch: Batch, tasks: Tasks, report: LossReport) -> None:
        """Take in one batch's report. ``tasks``: of its rows."""
        self._names += [n for n in dict.fromkeys(n for row in tasks for n in row) if n not in self._names]
        table = torch.zeros(len(tasks), max(len(row) for row in tasks), dtype=torch.long)
        for i, row in enumerate(tasks):
            table[i, : len(row)] = torch.tensor([self._names.index(name) for name in row])
        places = (batch.targets != IGNORED).nonzero()
        documents = batch.documents[places[:, 0], places[:, 1]]
        self._tasks.append(table.to(documents.device)[places[:, 0], documents])
        self._losses.append(report.losses)
        self._scales.append(report.scales)
        self._right.append(report.right)

    def values(self, gather: Callable[[Means], list[Means]] = lambda mine: [mine]) -> dict[str, float]:
        """``loss``: mean over image tokens (over all, where there are none). ``scale_K``, ``text``: mean loss of scale K's
        tokens, of text tokens; with ``_right``, the share whose best entry is the target. ``TASK_loss`` and ``TASK_right``:
        the same of all that a task teaches. ``gather``: brings every process's means; those of all tokens are returned.
        """
        all_means = gather(dict(self._means()))
        out: dict[str, float] = {}
        for name in dict.fromkeys(name for means in all_means for name in means):
            found = [means[name] for means in all_means if name in means]
            mean = found[0][0]
            if len(found) > 1:
                mean = sum(value * count for value, count in found) / sum(count for _, count in found)
            out[name] = mean
        image, every = out.pop(_IMAGE, None), out.pop(_ALL, float("nan"))
        return {"loss": every if image is None else image} | out

    def _means(self) -> Iterator[tuple[str, tuple[float, int]]]:
        """Name, mean and number of tokens of all that can be told of this process's batches."""
        losses, scales = torch.cat(self._losses).cpu(), torch.cat(self._scales).cpu()
        right, tasks = torch.cat(self._right).float().cpu(), torch.cat(self._tasks).cpu()
        image = scales >= 0
        if len(losses):
            yield _ALL, (float(losses.mean()), len(losses))
        if bool(image.any()):
            yield _IMAGE, (float(losses[image].mean()), int(image.sum()))
        for scale in scales.unique().tolist():
            on, name = scales == scale, "text" if scale < 0 else f"scale_{scale + 1}"
            yield name, (float(losses[on].mean()), int(on.sum()))
            yield f"{name}_right", (float(right[on].mean()), int(on.sum()))
        for number, name in enumerate(self._names):
            on = tasks == number
            if bool(on.any()):
                yield f"{name}_loss", (float(losses[on].mean()), int(on.sum()))
                yield f"{name}_right", (float(right[on].mean()), int(on.sum()))


class Speedometer:
    """Work per second since it was last read; only the time inside steps counts, not that of sheets and checkpoints.

    ``peak``: TFLOP/s of one device, or None. ``processes``: how many do what this one does.
    """

    def __init__(self, peak: float | None, processes: int = 1) -> None:
        self.peak, self.processes = peak, processes
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._flops, self._tokens, self._documents = 0.0, 0, 0, 0

    def add(self, seconds: float, flops: float, tokens: float, documents: float) -> None:
        """Work of one step of this process. ``flops``: of the model, forward and backward, padding left out."""
        self._seconds += seconds
        self._flops += flops
        self._tokens += tokens
        self._documents += documents

    def read(self) -> dict[str, float]:
        """Documents and tokens per second of all processes, TFLOP/s of one, and its share of the peak."""
        seconds = max(self._seconds, 1e-9)
        rate = self._flops / seconds / 1e12
        out = {
            "documents_per_s": round(self._documents * self.processes / seconds, 2),
            "tokens_per_s": round(self._tokens * self.processes / seconds, 1),
            "tflops_per_s": rate,
        }
        if self.peak:
            out["utilisation"] = rate / self.peak
        self._clear()
        return out


def measured_peak(device: torch.device, seconds: float = 0.5, dtype: torch.dtype | None = None) -> float:
    """TFLOP/s of products on this device in ``dtype`` (None: :func:`best_dtype`), the best of repeated runs for about
    ``seconds``.
    """
    side = 1024 if device.type == "cpu" else 8192
    a = torch.ones(side, side, dtype=dtype or best_dtype(device), device=device)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best / 1e12


def peak_of(
    asked: float | Literal["measured"] | None, device: torch.device, products: Precision = "auto"
) -> float | None:
    """The recipe's ``peak`` in TFLOP/s; what is measured is what ``products`` are computed in."""
    return measured_peak(device, dtype=chosen_dtype(device, products)) if asked == "measured" else asked


class Board:
    """TensorBoard's event files in a run's folder; what they told of steps from ``step`` on is void. A board that cannot be
    written is left out, which a warning tells. Raises ConfigError when the package is not there.

    They are written in place: torch's writer has a thread, whose errors are tracebacks.
    """

    def __init__(self, folder: Path, step: int = 1) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # pyright: ignore[reportMissingImports]
            from tensorboard.summary.writer.record_writer import (  # pyright: ignore[reportMissingImports]
                RecordWriter,
            )
        except ImportError:
            raise ConfigError(
                "tensorboard: true needs the package: pip install 'nextflow-ar[train]'"
            ) from None
        events: Any = event_pb2  # its names are made when it is imported
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._place = folder / "tensorboard"
        second, part = divmod(time.time_ns(), 10**9)  # files are read in the order of their names
        name = f"events.out.tfevents.{second:010d}.{part:09d}.{socket.gethostname()}.{os.getpid()}"
        self._writer: Any = None
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((self._place / name).open("wb"))
            self._write(step, file_version="brain.Event:2")
            self._write(step, session_log=events.SessionLog(status=events.SessionLog.START))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers among ``values``; the last word of a name is its group, so that likes stand together."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    group = name.rpartition("_")[2] if name.endswith(("_loss", "_right")) else "run"
                    told = self._summary.Value(tag=f"{group}/{name}", simple_value=value)
                    self._write(step, summary=self._summary(value=[told]))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _write(self, step: int, **what: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **what)
        self._writer.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        _LOG.warning(
            "%s: cannot be written: %s; the run goes on without it", self._place, error.strerror or error
        )
        self.close()

    def close(self) -> None:
        """End the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # every line has been written, or it is known that none can be
                writer.close()
