"""One call of the pipeline at work in the background, so that a page can show its events while they come."""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, Protocol, TypeVar

from nextflow_ar.types import Event

T = TypeVar("T")
Follow = Callable[[Event], None]
logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """Raised inside the pipeline when nobody follows any more. Not an Exception, so that nothing on the way keeps it."""


class Work(Generic[T]):
    """``call(on_event)`` in a thread of its own. Iterating yields lists of the events that have come since the last list;
    after that, :attr:`result` is what the call returned.

    Leaving the ``with`` block early stops the call at its next event. Raises what the call raised.
    """

    def __init__(self, call: Callable[[Follow], T]) -> None:
        self._call, self._events = call, queue.SimpleQueue[Event | None]()
        self._stop = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Work[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def __iter__(self) -> Iterator[list[Event]]:
        event = self._events.get()
        while event is not None:
            found = [event]
            while not self._events.empty() and (event := self._events.get()) is not None:
                found.append(event)
            yield found
            event = None if event is None else self._events.get()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def result(self) -> T:
        """What the call returned; only after the last event."""
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._call(self._follow))
        except BaseException as error:
            self._error = error
        finally:
            self._events.put(None)

    def _follow(self, event: Event) -> None:
        if self._stop.is_set():
            raise Stopped
        self._events.put(event)


class Page(Protocol):
    """What a page shows of a call."""

    def take(self, events: list[Event]) -> None:
        """Show these too."""

    def html(self) -> str:
        """As it is now."""
        ...


def watched(call: Callable[[Follow], T], page: Page, *rest: object) -> Generator[list[object], None, T]:
    """Values of (page, *rest) after every step of ``call``; returns what it returned."""
    with Work(call) as work:
        for events in work:
            page.take(events)
            yield [page.html(), *rest]
        return work.result


def line_for(error: Exception) -> str:
    """One line for the page. Errors of this project say what is accepted; others are logged whole."""
    text = re.sub(
        r"(?<![\w.])(/[^\s/:]+)+/([^\s/:]+)", r"\2", " ".join(str(error).split())
    )  # no folders of the server's
    if type(error).__module__.startswith("nextflow_ar."):
        return text
    logger.error("a request of the page failed", exc_info=error)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
