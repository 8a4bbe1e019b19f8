"""Several engines, each in a process of its own, that work at requests as one :class:`Rounds` does.

Small models spend much of a step in Python, where threads wait for each other; processes do not. A request is worked at by
one of them, the least busy when it comes, and its result is the same in any.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from nextflow_ar.generation.base import best_dtype
from nextflow_ar.generation.engine import Engine, Failure, Figures, Rounds
from nextflow_ar.generation.jobs import Job
from nextflow_ar.generation.tidying import Tidy, settle_in
from nextflow_ar.model.checkpoint import load_bundle
from nextflow_ar.types import Done, Event
from nextflow_ar.wire import packed

PATIENCE, START, END = 0.005, 300.0, 5.0
"""Seconds that a step waits for news, that an engine may take to load, and to end."""


class EnginesError(RuntimeError):
    """An engine cannot start, or failed: one line."""


@dataclass(frozen=True)
class Home:
    """What an engine is made of. ``folder``: of the checkpoint. ``rows``, ``kept_bytes``: see :class:`Engine`.
    ``threads``: processors that it computes with.
    """

    folder: Path
    device: str = "cpu"
    rows: int = 64
    kept_bytes: int = 0
    threads: int = 1


class Engines:
    """``count`` engines of one ``home``. Called by one thread, but for ``busy`` and ``figures``.

    Raises EnginesError where one of them cannot start; those that did are ended then.
    """

    def __init__(self, home: Home, count: int) -> None:
        self.home, self.count = home, count
        self._lanes: list[_Lane] = []
        try:
            self._lanes += [_Lane(home) for _ in range(count)]
            for lane in self._lanes:
                lane.wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def max_rows(self) -> int:
        """Sequences in work at once, of all engines."""
        return self.home.rows * len(self._lanes)

    @property
    def figures(self) -> Figures:
        """What the engines counted."""
        return sum((lane.figures for lane in self._lanes), Figures())

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return any(lane.widths for lane in self._lanes)

    def take(self, job: Job) -> None:
        """Give a job that :meth:`Engine.job` made to the engine with the least to do."""
        for number, lane in enumerate(self._lanes):
            if not lane.widths and not lane.process.is_alive():  # died while it had nothing to do
                lane.end()
                self._lanes[number] = _Lane(self.home)
        lane = min(self._lanes, key=lambda lane: (not lane.ready, sum(lane.widths.values())))
        lane.widths[job.number] = job.width
        lane.tell("take", (job.number, job.request))

    def cancel(self, number: int) -> bool:
        """Drop a request; its part of the cache is free with its engine's next step. Returns whether it was there."""
        for lane in self._lanes:
            if lane.widths.pop(number, None) is not None:
                lane.tell("cancel", number)
                return True
        return False

    def clear(self) -> None:
        """Drop all requests; what engines still say of them is not heard."""
        for lane in self._lanes:
            lane.widths.clear()
            lane.round += 1
            lane.tell("clear", lane.round)

    def step(self) -> Iterator[Event | Failure]:
        """What is new, waiting a moment for it. What an engine worked at when it failed is lost; one that died begins
        anew.
        """
        pipes = {lane.pipe: lane for lane in self._lanes}
        for pipe in wait(list(pipes), timeout=PATIENCE):
            lane = pipes[pipe]  # type: ignore[index]
            try:
                for event in lane.heard():
                    if isinstance(event, Done | Failure):
                        lane.widths.pop(event.row, None)
                    yield event
            except EnginesError as error:
                yield from self._lost(lane, error)
            except (EOFError, OSError):
                lane.end()
                self._lanes[self._lanes.index(lane)] = _Lane(self.home)
                yield from self._lost(lane, EnginesError("an engine's process died, another one begins"))

    def _lost(self, lane: _Lane, error: EnginesError) -> Iterator[Failure]:
        """All that an engine worked at, and what was passed on to it since."""
        numbers = list(lane.widths)
        lane.widths.clear()
        lane.round += 1
        lane.tell("clear", lane.round)
        yield from (Failure(number, error) for number in numbers)

    def close(self) -> None:
        """End the processes."""
        for lane in self._lanes:
            lane.tell("end", None)
        for lane in self._lanes:
            lane.end()


@dataclass(eq=False)
class _Lane:
    """One process, and what it works at: ``widths`` by number. ``round``: what it was told to begin anew by."""

    home: Home
    ready: bool = False
    round: int = 0
    widths: dict[int, int] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, self.home), name="nextflow-ar-engine", daemon=True
        )
        self.process.start()
        theirs.close()  # with the process dies the only other end

    def tell(self, what: str, given: Any) -> None:
        """Pass something on; nothing where the process is dead, which the next step finds."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(packed((what, given)))

    def wait_until_ready(self) -> None:
        """Raises EnginesError."""
        try:
            if not self.pipe.poll(START):
                raise EnginesError(f"an engine did not start within {START:g} seconds")
            list(self.heard())
        except EOFError:
            raise EnginesError("an engine's process died while it started") from None

    def heard(self) -> Iterator[Event]:
        """Events of the next message. Raises EnginesError for a failure, EOFError or OSError where the process is dead."""
        what, round_, given, figures = pickle.loads(self.pipe.recv_bytes())
        if what == "broken":
            raise EnginesError(given)
        self.ready, self.figures = True, figures
        if what == "failed" and round_ == self.round:
            line, trace = given
            error = EnginesError(line)
            error.add_note(trace)  # for the first process's log: this one has none
            raise error
        if what == "events" and round_ == self.round:
            yield from (event for event in given if event.row in self.widths)

    def end(self) -> None:
        """End the process, which was told to."""
        self.process.join(END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _work(pipe: Connection, home: Home) -> None:
    """The process: rounds of one engine. Ends when it is told to, or when the one that began it is gone."""
    for name in (signal.SIGINT, signal.SIGTERM):  # which reach a whole group: the first process decides
        signal.signal(name, signal.SIG_IGN)
    try:
        torch.set_num_threads(home.threads)
        place = torch.device(home.device)
        bundle = load_bundle(home.folder, place, best_dtype(place))
        rounds = Rounds(Engine(bundle, home.rows, home.kept_bytes))
        settle_in()
    except Exception as error:
        pipe.send_bytes(packed(("broken", 0, str(error).partition("\n")[0][:300], Figures())))
        return
    with contextlib.suppress(EOFError, OSError):
        _rounds(pipe, rounds)


def _rounds(pipe: Connection, rounds: Rounds) -> None:
    asked: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    # Read at once, whatever this process is at: else both could wait for the other to read.
    threading.Thread(target=_read, args=(pipe, asked), daemon=True).start()
    number, tidy = 0, Tidy()

    def tell(what: str, given: Any = None) -> None:
        pipe.send_bytes(packed((what, number, given, rounds.figures)))

    tell("ready")
    while True:
        try:
            while not rounds.busy or not asked.empty():
                what, given = asked.get()
                if what == "end":
                    return
                if what == "take":
                    rounds.take(rounds.engine.job(*given))
                elif what == "cancel":
                    rounds.cancel(given)
                else:
                    number = given
                    rounds.clear()
            events = list(rounds.step())
        except Exception as error:
            rounds.clear()
            line = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            tell("failed", (line, traceback.format_exc()))
        else:
            tell("events", events)
            if any(isinstance(event, Done | Failure) for event in events):
                tidy()


def _read(pipe: Connection, asked: queue.SimpleQueue[tuple[str, Any]]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked.put(pickle.loads(pipe.recv_bytes()))
    asked.put(("end", None))
