"""What comes next, made by processes of their own: for a device that computes faster than one process can make its data."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from nextflow_ar.config import ConfigError
from nextflow_ar.wire import packed

T = TypeVar("T")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save and stop. They may reach every process of a group; only the first one answers them."""
_HELD = 8
"""Finished units that are held unpacked, so that the reader never waits for one to be unpacked."""


class Crew(Generic[T]):
    """Units 0 to ``units`` - 1 of some work, made in turn by ``workers`` processes of one thread each.

    ``begin``: picklable; called once in every process, it returns what makes a unit from its number alone, so that nothing
    differs from making it in place. Units are asked for in rising order; asking for another one begins anew from there.
    """

    def __init__(self, begin: Callable[[], Callable[[int], T]], units: int, workers: int) -> None:
        self._begin, self._units, self._workers = begin, units, workers
        self._next = -1
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._reader: threading.Thread | None = None
        self._ended = threading.Event()
        self._found: queue.Queue[tuple[str, Any]] = queue.Queue(_HELD)

    def get(self, unit: int) -> T:
        """A unit. Raises ConfigError with a process's error, in one line."""
        if unit != self._next:
            self.close()
            self._start(unit)
        kind, value = self._found.get()
        if kind == "failed":
            self.close()
            raise ConfigError(value)
        self._next = unit + 1
        return value

    def _start(self, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Comes before multiprocessing's own farewell, which sends SIGTERM and waits: these would not heed it.
        atexit.register(self.close)
        self._ended = threading.Event()
        self._found = queue.Queue(_HELD)
        with _prepared():
            for worker in range(self._workers):
                mine, theirs = context.Pipe(duplex=False)
                numbers = range(first + worker, self._units, self._workers)
                process = context.Process(target=_work, args=(self._begin, numbers, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(mine)
        self._reader = threading.Thread(
            target=_read, args=(self._pipes, self._units - first, self._found, self._ended), daemon=True
        )
        self._reader.start()

    def close(self) -> None:
        """End the processes; what they made ahead is lost."""
        self._ended.set()
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()  # they heed nothing less
        for process in self._processes:
            process.join()
        if self._reader is not None:
            while self._reader.is_alive():  # it may be waiting for room
                with suppress(queue.Empty):
                    self._found.get_nowait()
                self._reader.join(0.01)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._reader, self._next = [], [], None, -1


@contextmanager
def _prepared() -> Iterator[None]:
    """Within it, a process that is started has one thread and hears nothing of :data:`_STOPS`."""
    # One thread each, in every library: sixteen processes of sixteen threads do a sixth of the work (docs/log.md).
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    # Blocked from birth, since a signal may come while a process still imports; this one gets its own afterwards. The
    # tracker is a process of multiprocessing's, too, whose start would unblock them again: it comes first.
    resource_tracker.ensure_running()
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _read(
    pipes: list[Connection], units: int, found: queue.Queue[tuple[str, Any]], ended: threading.Event
) -> None:
    for number in range(units):
        try:
            kind, value = pickle.loads(pipes[number % len(pipes)].recv_bytes())
        except (EOFError, OSError):
            kind, value = "failed", "a process that makes the data has ended (out of memory?)"
        if ended.is_set():
            return
        found.put((kind, value))
        if kind == "failed":
            return


def _work(begin: Callable[[], Callable[[int], Any]], numbers: range, told: Connection) -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        make = begin()
        for number in numbers:
            told.send_bytes(packed(("made", make(number))))
    except (BrokenPipeError, ConnectionError):
        return
    except Exception as error:  # one line in the first process instead of a traceback here
        with suppress(OSError):
            line = " ".join(str(error).split()) or type(error).__name__
            told.send_bytes(pickle.dumps(("failed", line)))
