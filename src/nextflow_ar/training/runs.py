"""A run's folder: resolved recipe, JSONL metrics, one atomic checkpoint, sample sheets; and its progress bar."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import statistics
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nextflow_ar.config import ConfigError, load_yaml
from nextflow_ar.storage import StorageError, check_replaceable, first_line, write_atomic, write_stream
from nextflow_ar.training.parallel import World

_LOG = logging.getLogger(__name__)
_CHECKPOINT = "checkpoint.pt"
_WARM, _FAR = 25, 10**9
_CLOSING = 6.0
"""Seconds at the end of a run of so many seconds: the last checkpoint, the export, a sample sheet."""
SHARDED = "checkpoints"
"""Name of the folder of a sharded run's checkpoints."""


class RunFolder:
    """Where one training writes.

    Raises StorageError when the folder is not writable, or holds a run of another recipe (a resume must continue what
    was started; only the keys named in ``may_change`` may differ). ``known``: brings the recipe of an earlier version to
    the present keys; where it fails, the recipes are compared as they are. ``sharded``: whether checkpoints are in parts.
    """

    def __init__(
        self,
        path: Path,
        recipe: dict[str, Any],
        may_change: tuple[str, ...] = ("out",),
        known: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
        sharded: bool = False,
    ) -> None:
        self.path = path
        resolved = path / "recipe.yaml"
        text = yaml.safe_dump(recipe, sort_keys=False)
        whole, parts = (path / _CHECKPOINT).is_file(), any((path / SHARDED).glob("step_*"))
        if (whole or parts) and not resolved.is_file():
            raise StorageError(
                f"{path} holds a checkpoint but not its recipe.yaml: remove it, or name another folder"
            )
        if whole or parts:
            old = load_yaml(resolved)
            with contextlib.suppress(ValueError):
                old = known(old)
            changed = [k for k in {*old, *recipe} - set(may_change) if old.get(k) != recipe.get(k)]
            if changed:
                raise StorageError(
                    f"{path} holds a run of another recipe (differs in {', '.join(sorted(changed))}): "
                    "name another folder with --set out=FOLDER, or remove it"
                )
        if whole if sharded else parts:
            raise StorageError(
                f"{path} holds a run {'without' if sharded else 'with'} the key sharding: name another folder with "
                "--set out=FOLDER, or remove it"
            )
        for name in ("final", "adapter"):  # what the run ends with; not found out after its last step
            check_replaceable(path / name)
        write_atomic(resolved, text.encode())
        for left in path.glob(f".{_CHECKPOINT}.*.tmp"):  # by a run that was killed while it saved
            left.unlink(missing_ok=True)
        self._started = time.time()
        self.resumes = whole or parts
        """Whether there is a checkpoint to go on from."""

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl; "time": seconds, without those between a stop and going on."""
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"time": round(time.time() - self._started, 1), **rounded})
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: metrics cannot be written: {error.strerror}") from None

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after ``step``, and lines that were cut: a run goes on from there, its time too."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept: list[bytes] = []
        spent = 0.0
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                values = json.loads(line)
                if values["step"] <= step and line.endswith(b"\n"):
                    kept.append(line)
                    spent = max(spent, float(values["time"]))
        self._started = time.time() - spent
        write_atomic(path, b"".join(kept))

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically; the old one survives a full disk."""
        write_stream(self.path / _CHECKPOINT, lambda file: _save(state, file))

    def save_together(self, world: World, state: Callable[[], dict[str, Any]]) -> None:
        """The same by the first process alone; all call this, and none goes on before it is done: where one ends earlier,
        torchrun kills the one that writes. Raises StorageError on every one (the first: what it met).
        """
        trouble: Exception | None = None
        if world.rank == 0:
            try:
                self.save(state())
            except Exception as error:  # of whatever kind: the others wait
                trouble = error
        if world.any(trouble is not None):
            (why, *_) = world.gather("" if trouble is None else first_line(trouble, 500))
            raise trouble or StorageError(why)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None at a run's beginning. Raises StorageError when it is damaged."""
        path = self.path / _CHECKPOINT
        if not path.is_file():
            return None
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch writes checksums, and reads without a look at them
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged")
            found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict) or not {"step", "model", "optimizer"} <= found.keys():
                raise ValueError("it is no training's")
            return found
        except Exception as error:
            raise StorageError(f"{path}: the checkpoint cannot be read: {first_line(error)}") from None

    def sheet(self, name: str, rows: list[np.ndarray], zoom: int = 2) -> Path:
        """Write rows of pictures, each (n, H, W, 3) uint8, as one PNG; returns its path."""
        stacked = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        picture = Image.fromarray(stacked)
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomic(self.path / f"{name}.png", buffer.getvalue())
        return self.path / f"{name}.png"


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Any]:
    """A rich progress bar on stderr; yields ``update(completed, note)``. ``shown``: one of several processes shows it.

    A run that is further than its recipe goes, where nothing is left to do, is told of in the log.
    """
    if shown and done > total:
        _LOG.warning(
            "at step %d already, the recipe ends at %d: nothing is trained, nothing taken back", done, total
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), note, console=console, disable=not shown) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def update(completed: int, note: str) -> None:
            bar.update(task, completed=completed, note=note)

        yield update


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved what it takes to go on: one line that says so."""

    def __init__(self, step: int, out: Path) -> None:
        super().__init__(f"stopped and saved at step {step}: the same command goes on ({out})")


@contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether the user (Ctrl-C) or the system (SIGTERM, SIGUSR1) has asked to stop.

    A loop asks between steps, checkpoints and raises Stopped. Only a second Ctrl-C stops at once: the others
    come twice where a cluster signals every process and torchrun passes on its own.
    """
    asked, interrupted = threading.Event(), threading.Event()

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT:
            if interrupted.is_set():
                raise KeyboardInterrupt
            interrupted.set()
        asked.set()

    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main else ()
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield asked.is_set
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _save(state: dict[str, Any], file: IO[bytes]) -> None:
    """``torch.save``; a write that fails is the error that it was, which torch hides behind one of its own."""
    failed: list[OSError] = []

    class Noted:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, cast(IO[bytes], Noted()))
    except Exception:
        if failed:
            raise failed[0] from None
        raise


class Pace:
    """How many steps a run has: ``steps``, or, with ``seconds``, as many as fit into so much time from now on. How long one
    takes is measured over 25, once 25 others have compiled what there is to compile; until then the end is far away. Where
    half of the time is over before that, every further step says again how many fit: few slow ones end in time, too.

    Raises ConfigError for a time with several ``processes``, which would not stop together.
    """

    def __init__(
        self,
        steps: int,
        seconds: float | None = None,
        processes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if seconds is not None and processes > 1:
            raise ConfigError("a number of minutes is for one process: several would not stop together")
        self.steps = steps if seconds is None else _FAR
        self._clock, self._seen, now = clock, 0, clock()
        self._ends = deque([now], maxlen=_WARM + 1)
        self._end = None if seconds is None else now + seconds
        self._half = now + (seconds or 0.0) / 2

    def passed(self, step: int) -> None:
        """Note that a step is over; ``step``: how many there have been in all."""
        if self._end is None or self._seen == 2 * _WARM:
            return
        now = self._clock()
        self._seen += 1
        self._ends.append(now)
        if self._seen == 2 * _WARM:
            each = (now - self._ends[0]) / _WARM
        elif now >= self._half:
            each = statistics.median(b - a for a, b in pairwise(self._ends))
        else:
            return
        left = self._end - _CLOSING - now
        # The first also loaded and compiled, so it says little of the next; an end that was reached is one.
        least = self.steps > step or (self._seen == 1 and left > 0)
        self.steps = step + max(int(least), int(left / max(1e-9, each)))


class Every:
    """True at most once per ``seconds``, and not before the first interval has passed."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._last = seconds, time.time()

    def __call__(self) -> bool:
        """Whether the interval has passed since the last True."""
        if time.time() - self._last < self.seconds:
            return False
        self._last = time.time()
        return True
