"""The one thread that owns the engine's rounds. Everybody else hands it orders and hears of them.

An order waits in its client's room; rooms are served in turn, so that one client's many pictures do not keep another's
single one waiting. Orders, cancellations and the end are obeyed between two steps, so a cancelled order's place is free
with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from nextflow_ar.app.serving.errors import Broken, Draining
from nextflow_ar.app.serving.metrics import Metrics
from nextflow_ar.app.serving.orders import Failed, Finished, News, Order, Thought
from nextflow_ar.generation.engine import ContextError, Engine, Failure, QueueFull, Rounds
from nextflow_ar.generation.engines import Engines
from nextflow_ar.generation.jobs import Job
from nextflow_ar.types import Done, Event, ScaleReady, TextDelta

log = logging.getLogger("nextflow_ar.serving")


class Stream:
    """News of the orders of one request, to be read in the event loop that handed them in."""

    def __init__(self, worker: Worker, orders: Sequence[Order], client: str) -> None:
        self.worker, self.orders, self.client = worker, orders, client
        self.loop = asyncio.get_running_loop()
        self.left = len(orders)
        self.rows: list[_Row] = []
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, News]]:
        """(order, news) until all orders are done. Raises what an order failed of."""
        while self.left:
            index, news = await self._news.get()
            if isinstance(news, Failed):
                raise news.error
            if isinstance(news, Finished):
                self.left -= 1
            yield index, news

    def left_rows(self) -> list[_Row]:
        """The rows, from now on nobody's: with them go their caches, which no collector of cycles has to find then."""
        rows, self.rows = self.rows, []
        return rows

    def cancel(self) -> None:
        """Drop what is not done yet. Does nothing when all is."""
        if self.left:
            self.left = 0
            self.worker.cancel(self)

    def tell(self, news: Sequence[tuple[int, News]]) -> None:
        """From the worker's thread: pass news on."""
        with contextlib.suppress(RuntimeError):  # the loop may be gone: then nobody reads
            self.loop.call_soon_threadsafe(self._put, news)

    def _put(self, news: Sequence[tuple[int, News]]) -> None:
        for each in news:
            self._news.put_nowait(each)


@dataclass(eq=False)
class _Row:
    """An order on its way. ``job``: what the engine works at, the thought first; ``drawing``: what follows it."""

    number: int
    index: int
    order: Order
    stream: Stream
    job: Job
    text: list[str] = field(default_factory=list)
    thinking: bool = False
    width: int = 1


class Worker:
    """Takes orders from event loops and works at them in a thread of its own.

    ``most_open``: orders in work or waiting, at most. ``rounds``: what works at them; the engine itself, where None is
    given, else processes of their own, while ``engine`` only checks what is asked.
    """

    def __init__(
        self, engine: Engine, most_open: int, metrics: Metrics, rounds: Rounds | Engines | None = None
    ) -> None:
        self.engine, self.most_open, self.metrics = engine, most_open, metrics
        self.draining = False
        self.steps = 0
        self.rounds = rounds or Rounds(engine)
        self._rooms: OrderedDict[str, deque[_Row]] = OrderedDict()
        self._rows: dict[int, _Row] = {}
        self._inbox: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._open = 0
        self._gap = 1.0  # seconds between two finished orders, lately
        self._last_done = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="nextflow-ar-engine", daemon=True)

    # What other threads call.

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Orders in work or waiting."""
        return self._open

    @property
    def working(self) -> int:
        """Orders in work."""
        return len(self._rows)

    @property
    def retry_after(self) -> int:
        """Seconds after which some place may be free: one to sixty."""
        return max(1, min(60, round(self._open * self._gap / 4)))

    def prepare(self, order: Order) -> Job:
        """The engine's job for an order's first request. Raises ContextError; takes some milliseconds for long documents,
        and may be called in any thread.
        """
        number = next(self._numbers)
        job = self.engine.job(number, order.request)
        return job if order.thought is None else self.engine.job(number, order.thought)

    def submit(self, orders: Sequence[Order], jobs: Sequence[Job], client: str) -> Stream:
        """Take orders on, all of them or none; ``jobs`` as :meth:`prepare` gave them. Called in an event loop.

        Raises QueueFull, Draining, or Broken where the thread is dead.
        """
        if not self.alive:
            raise Broken("the engine's thread is not running")
        stream = Stream(self, orders, client)
        for index, (order, job) in enumerate(zip(orders, jobs, strict=True)):
            thinking = order.thought is not None
            width = 2 if thinking else job.width
            stream.rows.append(_Row(job.number, index, order, stream, job, thinking=thinking, width=width))
        with self._lock:
            if self.draining:
                raise Draining
            if self._open + len(orders) > self.most_open:
                raise QueueFull(
                    f"{self._open} pictures and texts are in work or waiting, {self.most_open} at most: try again later"
                )
            self._open += len(orders)
            self._inbox.put(("rows", stream.rows))  # under the lock: nothing comes behind the end
        return stream

    def cancel(self, stream: Stream) -> None:
        """Drop a stream's orders, between this step and the next."""
        self._inbox.put(("cancel", stream))

    async def drain(self, grace: float) -> None:
        """Take nothing new on; let what is there finish for ``grace`` seconds, then let it fail with Draining."""
        with self._lock:
            self.draining = True
        end = time.monotonic() + grace
        while self._open and self.alive and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._open:
            log.warning("work is cut off", extra={"open": self._open})
            self._inbox.put(("fail", Draining()))

    def close(self) -> None:
        """End the thread; what is left fails."""
        with self._lock:
            self.draining = True
            self._inbox.put(("end", None))
        if self.alive:
            self._thread.join(timeout=30)
        self.rounds.close()

    # The thread.

    def _run(self) -> None:
        while True:
            if not self._obey():
                return
            self._admit()
            if self.rounds.busy:
                self._step()

    def _obey(self) -> bool:
        """Do what was asked since the last step; waits while there is nothing to do. False: the end."""
        while True:
            try:
                what, given = self._inbox.get(block=not (self.rounds.busy or self._rooms))
            except queue.Empty:
                return True
            if what == "rows":
                assert isinstance(given, list)
                for row in given:
                    self._rooms.setdefault(row.stream.client, deque()).append(row)
            elif what == "cancel":
                assert isinstance(given, Stream)
                self._drop(given)
            elif what == "fail":
                assert isinstance(given, BaseException)
                self._fail_all(given)
            else:
                self._fail_all(Draining())
                return False

    def _drop(self, stream: Stream) -> None:
        room = self._rooms.get(stream.client, deque())
        for row in stream.left_rows():
            if self._rows.pop(row.number, None) is not None:
                self.rounds.cancel(row.number)
            elif row in room:
                room.remove(row)
            else:
                continue
            self.metrics.cancelled.inc()
            self._closed(1)
        if not room:
            self._rooms.pop(stream.client, None)

    def _admit(self) -> None:
        """Let orders in while there is place, one from each room in turn."""
        taken = sum(row.width for row in self._rows.values())
        while self._rooms:
            client, room = next(iter(self._rooms.items()))
            if self._rows and taken + room[0].width > self.rounds.max_rows:
                return
            row = room.popleft()
            self._rooms.pop(client)
            if room:
                self._rooms[client] = room  # behind the others
            self._rows[row.number] = row
            taken += row.width
            self.rounds.take(row.job)

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            events = list(self.rounds.step())
        except Exception:
            log.exception("a step of the engine failed")
            self.metrics.failures.inc()
            self._fail_working(Broken("the engine failed"))
            return
        if not events and isinstance(self.rounds, Engines):
            return  # it only waited
        self.steps += 1
        told: dict[Stream, list[tuple[int, News]]] = {}
        for event in events:
            row = self._rows.get(event.row)
            if row is not None:
                news = self._heard_or_failed(row, event)
                if news is not None:
                    told.setdefault(row.stream, []).append((row.index, news))
        for stream, news in told.items():
            stream.tell(news)
        self.metrics.step_seconds.observe(time.perf_counter() - began)

    def _heard_or_failed(self, row: _Row, event: Event | Failure) -> News | None:
        try:
            return self._heard(row, event)
        except Exception as error:
            log.exception("an order failed")
            self.metrics.failures.inc()
            self.rounds.cancel(row.number)
            if self._rows.pop(row.number, None) is not None:
                row.stream.rows.remove(row)
                self._closed(1)
            return Failed(error)

    def _heard(self, row: _Row, event: Event | Failure) -> News | None:
        """What the client hears of an event."""
        if isinstance(event, Failure):
            raise Broken("the engine failed") from event.error
        if row.thinking:
            if isinstance(event, TextDelta):
                row.text.append(event.text)
            return self._thought(row, event.written) if isinstance(event, Done) else None
        if isinstance(event, Done):
            self._finished(row)
            return Finished(event.reason, event.written)
        if isinstance(event, ScaleReady) and event.scale not in row.order.previews:
            return None
        return event

    def _thought(self, row: _Row, tokens: int) -> News:
        """A thought of so many tokens is written: go on with what follows it."""
        text = "".join(row.text)
        row.thinking = False
        assert row.order.then is not None
        try:
            row.job = self.engine.job(row.number, row.order.then(text))
        except ContextError:  # so long a thought leaves no place for the picture
            row.job, text = self.engine.job(row.number, row.order.request), ""
        self.rounds.take(row.job)
        return Thought(text, tokens)

    def _finished(self, row: _Row) -> None:
        self._rows.pop(row.number)
        row.stream.rows.remove(row)
        now = time.monotonic()
        self._gap += 0.1 * (min(now - self._last_done, 10.0) - self._gap)
        self._last_done = now
        self._closed(1)

    def _fail_working(self, error: BaseException) -> None:
        """All orders in work fail, and the engine starts from nothing."""
        self.rounds.clear()
        rows, self._rows = list(self._rows.values()), {}
        for row in rows:
            row.stream.tell([(row.index, Failed(error))])
            row.stream.rows.remove(row)
        self._closed(len(rows))

    def _fail_all(self, error: BaseException) -> None:
        self._fail_working(error)
        rows = [row for room in self._rooms.values() for row in room]
        self._rooms.clear()
        for row in rows:
            row.stream.tell([(row.index, Failed(error))])
            row.stream.rows.remove(row)
        self._closed(len(rows))

    def _closed(self, orders: int) -> None:
        """So many orders are no longer open."""
        with self._lock:
            self._open -= orders
