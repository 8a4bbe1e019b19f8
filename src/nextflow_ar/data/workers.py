"""Extraction in several processes of this machine: each one thread, each every so-manieth shard, the same shards as one."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextflow_ar.data.extraction import ExtractionConfig, extract
from nextflow_ar.data.sources import open_source
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.video import VideoConfig
from nextflow_ar.model.checkpoint import checkpoint_folder
from nextflow_ar.sequence.vocab import load_text_tokenizer
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Extraction:
    """All that a process needs to take part. ``place``, ``tokenizer``: as open_source and from_pretrained take them.

    ``device``: of the tokenizer; "cuda" gives worker i the GPU i modulo their number. ``model``: a checkpoint whose text
    tokenizer's counts the shards tell ("": none). ``again``: shards to make although they are there.
    """

    place: str
    tokenizer: str
    out: Path
    config: ExtractionConfig
    video: VideoConfig
    device: str = "cpu"
    model: str = ""
    again: tuple[int, ...] = ()

    def counter(self) -> TokenCounter | None:
        """Of the text tokenizer of ``model``. Raises StorageError."""
        if not self.model:
            return None
        return TokenCounter(load_text_tokenizer(checkpoint_folder(self.model) / "text_tokenizer"))

    def run(self, process: int, processes: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Write this process's shards; see :func:`nextflow_ar.data.extraction.extract`."""
        device = self.device
        if device == "cuda" and torch.cuda.device_count() > 1:
            device = f"cuda:{process % torch.cuda.device_count()}"
        with one_thread():
            return extract(
                open_source(self.place, self.video),
                ImageTokenizer.from_pretrained(self.tokenizer, device),
                self.out,
                self.config,
                place=self.place,
                process=process,
                processes=processes,
                counter=self.counter(),
                again=self.again,
                progress=progress,
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """One computing thread within. How many there are may change how sums round, and so a code; here nothing does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def extract_with_workers(
    job: Extraction, workers: int, progress: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Run an extraction in ``workers`` new processes; returns what :func:`extract` does, of all together.

    ``progress``: is told how many rows are written. Workers end with this process, however it ends. Raises StorageError
    when a worker fails; whole shards stay.
    """
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    processes = [
        context.Process(target=_work, args=(job, i, workers, told), daemon=True) for i in range(workers)
    ]
    try:
        _start(processes)
        return _gather(processes, told, progress)
    finally:
        begun = [process for process in processes if process.pid is not None]
        for process in begun:
            process.terminate()
        for process in begun:
            process.join()
        told.close()


def _start(processes: list[Any]) -> None:
    """Ctrl-C reaches every process; the first one ends the others, which do not hear it even while they still import."""
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _gather(processes: list[Any], told: Any, progress: Callable[[int], None]) -> dict[str, Any]:
    rows, broken, finished = [0] * len(processes), {}, 0
    while finished < len(processes):
        try:
            kind, who, value = told.get(timeout=0.5)
        except queue.Empty:
            for i, process in enumerate(processes):
                if process.exitcode not in (None, 0):
                    raise StorageError(
                        f"worker {i} ended with status {process.exitcode} (out of memory?); whole shards stay"
                    ) from None
            continue
        if kind == "failed":
            raise StorageError(f"worker {who}: {value}")
        rows[who] = value["rows"] if kind == "done" else value
        if kind == "done":
            broken, finished = broken | value["broken"], finished + 1
        progress(sum(rows))
    ordered = dict(sorted(broken.items(), key=lambda item: int(item[0])))
    return {"rows": sum(rows), "broken": ordered}


def _work(job: Extraction, process: int, processes: int, told: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        found = job.run(process, processes, lambda shard, rows: told.put(("rows", process, rows)))
        told.put(("done", process, found))
    except Exception as error:  # one line in the first process instead of a traceback here
        told.put(("failed", process, " ".join(str(error).split()) or type(error).__name__))
    told.close()
    told.join_thread()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a kill leaves it no time to end the others."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
