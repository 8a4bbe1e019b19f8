"""Video as rows: up to five frames of a clip with texts between them, chosen by motion (paper section 3, interleaved data).

A clip is a video file or a folder of numbered frames. It is looked at a fixed number of times a second; a frame in which
nothing moved since the one before, or only the camera did, is dropped. A file that is longer than one row's frames becomes
several rows, counted from its header, so that row numbers stay fixed. What a clip shows, and what happens between frames,
comes from a table in the folder or a file beside the clip (docs/data.md).
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage
from pydantic import ConfigDict

from nextflow_ar.data.clips import Clip, frame_files
from nextflow_ar.data.layouts import told_unreadable
from nextflow_ar.data.motion import MotionConfig, compare, load_cv2, shrink
from nextflow_ar.data.rows import LeftOut, Part, PicturePart, PictureRef, Row, RowError, TextPart, printable
from nextflow_ar.data.spans import Span, overlapping
from nextflow_ar.tokenizer.pictures import PictureError, open_picture

_MOST_LOOKS = 1000  # a second
_SLACK = 0.002  # seconds; containers round times, WebM's to a thousandth


@dataclass(frozen=True)
class VideoConfig:
    """How clips become rows.

    ``frames``: most frames of a row (paper: 5 at 512 px, 3 at 1024 px). ``rate``: looks per second (paper: 0.5). ``least``:
    a row of fewer kept frames is left out. ``filter``: drop frames without motion of their own.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    frames: int = 5
    rate: float = 0.5
    least: int = 2
    filter: bool = True
    motion: MotionConfig = field(default_factory=MotionConfig)

    def __post_init__(self) -> None:
        if not (self.frames >= self.least >= 1 and 0 < self.rate <= _MOST_LOOKS):
            raise ValueError(
                "a row has at least `least` >= 1 and at most `frames` frames, at a rate above 0 and up to "
                f"{_MOST_LOOKS} a second"
            )


@dataclass(frozen=True, eq=False)
class FrameRef(PictureRef):
    """A decoded frame of a video file, (H, W, 3) uint8."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))

    def open(self) -> PILImage.Image:
        """See :class:`PictureRef`."""
        return PILImage.fromarray(self.pixels)

    def size(self) -> tuple[int, int]:
        """See :class:`PictureRef`."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def content(self) -> tuple[bytes, str]:
        """See :class:`PictureRef`; a frame has no file of its own and is told as PNG."""
        buffer = io.BytesIO()
        self.open().save(buffer, "PNG")
        return buffer.getvalue(), "png"


Look = tuple[int, PictureRef, np.ndarray]
"""A look at a clip: its number, the frame as a picture, and as (H, W, 3) uint8."""


class _Kept(NamedTuple):
    """Of the looks of a row: those that are kept, and how many were dropped as still and as the camera's motion."""

    looks: list[tuple[int, PictureRef]]
    still: int
    camera: int


class VideoSource:
    """Clips in a fixed order, as rows. ``unread``: files beside them that look like clips of kinds that are not read."""

    seeks = True

    def __init__(
        self, clips: list[Clip | RowError], config: VideoConfig, unread: Sequence[Path] = ()
    ) -> None:
        self.clips, self.config = clips, config
        self.notes = [told_unreadable(list(unread))] if unread else []
        self._windows: dict[int, int] = {}

    def count(self) -> int:
        """See :class:`Source`."""
        return sum(self._count(i) for i in range(len(self.clips)))

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`; clips before ``start`` are not decoded."""
        for i, clip in enumerate(self.clips):
            count = self._count(i)
            if start >= count:
                start -= count
                continue
            if isinstance(clip, RowError):
                yield clip
            else:
                yield from self._clip_rows(clip, count, start)
            start = 0

    def spans(self, start: int, stop: int) -> list[Span]:
        """See :func:`~nextflow_ar.data.sources.spans_of`."""
        named = ((_named(clip), self._count(i)) for i, clip in enumerate(self.clips))
        return list(overlapping(named, start, stop))

    def _count(self, i: int) -> int:
        """How many rows a clip gives; a broken one gives its error."""
        if i not in self._windows:
            clip, frames = self.clips[i], self.config.frames
            try:
                looks = 0 if isinstance(clip, RowError) else _looks_in(clip, self.config)
            except RowError:
                looks = 0
            more = looks % frames >= self.config.least
            self._windows[i] = max(1, looks // frames + more)
        return self._windows[i]

    def _clip_rows(self, clip: Clip, count: int, start: int) -> Iterator[Row | RowError]:
        frames = self.config.frames
        looks: list[Look] = []
        given, told = start, start * frames - 1  # the look up to which texts are in the rows before
        try:
            timed = _timed(clip, self.config)
            last = min(_looks_in(clip, self.config), count * frames)
            first = start - 1 if self._reaches_over(start, timed) else start
            for look in _looks(clip, self.config, first * frames):
                looks.append(look)
                if (look[0] + 1) % frames and look[0] + 1 != last:
                    continue
                kept = _moving(looks, self.config)
                if look[0] >= start * frames:
                    where = clip.where if count == 1 else f"{clip.where}: part {given + 1}"
                    given += 1
                    yield self._row(clip, where, kept, told, timed)
                told, looks = kept.looks[-1][0], []
                if look[0] + 1 == last:
                    return
        except (RowError, PictureError) as error:
            problem = str(error)
        else:
            problem = f"{clip.where}: the video ends before its header says so"
        for _ in range(given, count):  # every row keeps its number
            yield RowError(problem if clip.where in problem else f"{clip.where}: {problem}")

    def _reaches_over(self, start: int, timed: list[tuple[float, str]]) -> bool:
        """Whether the row before row ``start`` has texts behind its first look: which of them it keeps, and which the row
        gets, hangs on what moves there. Its first look is always kept, so that nothing reaches further.
        """
        if start == 0 or not self.config.filter:
            return False
        frames, step = self.config.frames, 1.0 / self.config.rate
        first, last = ((start - 1) * frames * step, (start * frames - 1) * step)
        return any(first + 1e-6 < at <= last + 1e-6 for at, _ in timed)

    def _row(
        self, clip: Clip, where: str, kept: _Kept, told: int, timed: list[tuple[float, str]]
    ) -> Row | RowError:
        """A row of the looks that are kept; ``told``: the look up to which texts are in the rows before."""
        looks, still, camera = kept
        if len(looks) < self.config.least:
            return LeftOut(
                f"{where}: {len(looks)} of {len(looks) + still + camera} frames kept ({still} still, {camera} moved by "
                "the camera alone)"
            )
        step = 1.0 / self.config.rate
        before = told * step + 1e-6
        parts: list[Part] = [TextPart(clip.caption, "user", False)] if clip.caption else []
        for i, (look, picture) in enumerate(looks):
            now = [text for at, text in timed if before < at <= look * step + 1e-6]
            before = look * step + 1e-6
            if now:
                parts.append(TextPart(" ".join(now), "assistant", True))
            given = (
                i == 0 and not parts
            )  # nothing says what to draw: the first frame is where the clip starts
            parts.append(PicturePart(picture, "user" if given else "assistant", not given))
        if not any(part.supervised for part in parts):
            return LeftOut(f"{where}: a single frame without a text teaches nothing")
        return Row(tuple(parts), where)


def _named(clip: Clip | RowError) -> str:
    """A clip wherever its data set lies, and a checksum of what is told of it."""
    if isinstance(clip, RowError):
        return ""
    name = "/".join(Path(os.path.abspath(clip.path)).parts[-2:])
    if clip.caption is None and not clip.texts and clip.fps is None:
        return name  # as before there were checksums
    told = json.dumps([clip.caption, clip.texts, clip.fps])
    return f"{name} {zlib.crc32(told.encode()):08x}"


def _moving(looks: list[Look], config: VideoConfig) -> _Kept:
    """Drop the looks in which nothing moved; the first one is kept."""
    kept: list[tuple[int, PictureRef]] = []
    dropped = {"still": 0, "camera": 0}
    before: np.ndarray | None = None
    for number, picture, pixels in looks:
        grey = shrink(pixels, config.motion) if config.filter else pixels
        if config.filter and before is not None and before.shape == grey.shape:
            change = compare(before, grey, config.motion).change
            if change != "moving":
                dropped[change] += 1
                # slow motion adds up before a still camera; a moving one is followed from view to view
                before = grey if change == "camera" else before
                continue
        before = grey
        kept.append((number, picture))
    return _Kept(kept, dropped["still"], dropped["camera"])


def _timed(clip: Clip, config: VideoConfig) -> list[tuple[float, str]]:
    """Texts with their seconds. Raises RowError when untimed texts are not one a look."""
    untimed = [text for at, text in clip.texts if at is None]
    if untimed and len(untimed) != len(clip.texts):
        raise RowError(f"{clip.where}: either all texts have a time or none")
    if untimed:
        looks = _looks_in(clip, config)
        if len(untimed) != looks:
            raise RowError(
                f"{clip.where}: {len(untimed)} texts for {looks} frames at {config.rate:g} per second: give one a frame, "
                "or give each its time"
            )
        return [(i / config.rate, text) for i, text in enumerate(untimed)]
    return [(at, text) for at, text in clip.texts if at is not None]


def _looks_in(clip: Clip, config: VideoConfig) -> int:
    """How many looks a clip has, from its header or its folder. Raises RowError."""
    if clip.path.is_dir():
        return len(_chosen(clip, config))
    return int(_header(clip).seconds * config.rate + 1e-6) + 1


def _chosen(clip: Clip, config: VideoConfig) -> list[Path]:
    files = frame_files(clip.path)
    if not files:
        raise RowError(f"{clip.where}: no numbered frames in {clip.path}")
    if clip.fps is None:
        return files
    wanted = int((len(files) - 1) / clip.fps * config.rate + 1e-6) + 1
    return [files[min(len(files) - 1, round(i * clip.fps / config.rate))] for i in range(wanted)]


def _looks(clip: Clip, config: VideoConfig, first: int) -> Iterator[Look]:
    """The looks from number ``first`` on. Raises RowError and PictureError."""
    if clip.path.is_dir():
        for number, path in enumerate(_chosen(clip, config)[first:], start=first):
            ref = PictureRef(printable(f"{clip.where}: {path.name}"), path=path)
            yield number, ref, np.asarray(open_picture(path))
        return
    yield from _film_looks(clip, config, first)


class _Clock:
    """When a film's frames are shown: by number as long as they come at the rate of its header, else by their own times."""

    def __init__(self, fps: float, rate: float) -> None:
        self.fps, self.rate = fps, rate
        self.index, self.steady = -1, True
        self.at, self.gap, self.start = (
            0.0,
            0.0,
            0.0,
        )  # seconds since the first frame; the longest pause so far

    def tick(self, stamp: float) -> None:
        """Another frame; ``stamp``: its time in the container, 0 or in disorder where that tells none."""
        self.index += 1
        if self.index == 0:
            self.start = stamp if math.isfinite(stamp) else 0.0
            return
        at = stamp - self.start
        if not self.at < at < math.inf:
            at = self.at + 1 / self.fps
        self.gap, self.at = max(self.gap, at - self.at), at
        self.steady = self.steady and abs(at * self.fps - self.index) <= 0.5

    def passed(self, number: int) -> bool:
        """Whether the frame comes after a look, so that this sees the one before."""
        if self.steady:
            return self.index > round(number * self.fps / self.rate)
        return self.at > number / self.rate + _SLACK

    def reaches(self, number: int, frames: int) -> bool:
        """Whether the frame, the last one, is still shown at a look; ``frames``: how many a whole film has."""
        if self.steady:
            return self.index >= round(number * self.fps / self.rate)
        return self.index + 1 >= frames or number / self.rate <= self.at + self.gap


def _film_looks(clip: Clip, config: VideoConfig, first: int) -> Iterator[Look]:
    """:func:`_looks` of a file: each sees the frame that is on the screen then."""
    cv2 = load_cv2()
    capture, header = _capture(clip), _header(clip)
    clock, number, shown = _Clock(header.fps, config.rate), first, None

    def look(index: int) -> Look:
        pixels = cv2.cvtColor(shown, cv2.COLOR_BGR2RGB)
        return number, FrameRef(f"{clip.where}: frame {index}", pixels=pixels), pixels

    try:
        while capture.grab():
            clock.tick(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            while clock.passed(number):  # more than once where looks are more frequent
                if shown is None:
                    return
                yield look(clock.index - 1)
                number += 1
            found, frame = capture.retrieve()
            shown = frame if found else None
        while shown is not None and clock.reaches(number, header.frames):
            yield look(clock.index)
            number += 1
    finally:
        capture.release()


def _capture(clip: Clip) -> Any:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # it would tell of damaged files on stderr
    cv2 = load_cv2()
    if not clip.path.is_file():
        raise RowError(f"{clip.where}: no such file")
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(str(clip.path))
    finally:
        cv2.utils.logging.setLogLevel(before)
    if not capture.isOpened():
        raise RowError(f"{clip.where}: damaged or no video")
    return capture


class _Header(NamedTuple):
    """``frames``: how many there are; ``fps``: of them a second; ``seconds``: from the first one to the last."""

    frames: int
    fps: float
    seconds: float


def _header(clip: Clip) -> _Header:
    """What the header of a file says; where it does not, its frames are counted. Raises RowError."""
    cv2 = load_cv2()
    capture = _capture(clip)
    try:
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        fps = fps if math.isfinite(fps) and fps > 0 else 25.0
        if frames > 0:
            return _Header(frames, fps, (frames - 1) / fps)
        clock = _Clock(fps, 1.0)
        while capture.grab():
            clock.tick(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    finally:
        capture.release()
    if clock.index < 0:
        raise RowError(f"{clip.where}: the video has no frames")
    return _Header(clock.index + 1, fps, clock.index / fps if clock.steady else clock.at)
