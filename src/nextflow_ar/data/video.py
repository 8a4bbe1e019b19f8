"""Video as rows: up to five frames of a clip with texts between them, chosen by motion (paper section 3, interleaved data).

A clip is a video file or a folder of numbered frames. It is looked at a fixed number of times a second; a frame in which
nothing moved since the one before, or only the camera did, is dropped. A file that is longer than one row's frames becomes
several rows, counted from its header, so that row numbers stay fixed. What a clip shows, and what happens between frames,
comes from a table in the folder or a file beside the clip (docs/data.md).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from pydantic import ConfigDict

from nextflow_ar.data.clips import Clip, frame_files
from nextflow_ar.data.motion import MotionConfig, compare, load_cv2, shrink
from nextflow_ar.data.rows import LeftOut, Part, PicturePart, PictureRef, Row, RowError, TextPart
from nextflow_ar.data.sources import Span, overlapping
from nextflow_ar.tokenizer.pictures import PictureError, open_picture


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
        if not (self.frames >= self.least >= 1 and self.rate > 0):
            raise ValueError("a row has at least `least` >= 1 and at most `frames` frames, at a rate above 0")


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


class VideoSource:
    """Clips in a fixed order, as rows."""

    seeks = True

    def __init__(self, clips: list[Clip | RowError], config: VideoConfig) -> None:
        self.clips, self.config = clips, config
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
        given = start
        try:
            timed = _timed(clip, self.config)
            last = min(_looks_in(clip, self.config), count * frames)
            for look in _looks(clip, self.config, start * frames):
                looks.append(look)
                if (look[0] + 1) % frames == 0 or look[0] + 1 == last:
                    yield self._row(clip, looks, given, count, timed)
                    given, looks = given + 1, []
                if look[0] + 1 == last:
                    return
        except (RowError, PictureError) as error:
            problem = str(error)
        else:
            problem = f"{clip.where}: the video ends before its header says so"
        for _ in range(given, count):  # every row keeps its number
            yield RowError(problem if clip.where in problem else f"{clip.where}: {problem}")

    def _row(
        self, clip: Clip, looks: list[Look], number: int, count: int, timed: list[tuple[float, str]]
    ) -> Row | RowError:
        where = clip.where if count == 1 else f"{clip.where}: part {number + 1}"
        kept, still, camera = _moving(looks, self.config)
        if len(kept) < self.config.least:
            return LeftOut(
                f"{where}: {len(kept)} of {len(looks)} frames kept ({still} still, {camera} moved by the camera alone)"
            )
        step = 1.0 / self.config.rate
        before = (looks[0][0] - 1) * step + 1e-6
        parts: list[Part] = [TextPart(clip.caption, "user", False)] if clip.caption else []
        for i, (look, picture) in enumerate(kept):
            told = [text for at, text in timed if before < at <= look * step + 1e-6]
            before = look * step + 1e-6
            if told:
                parts.append(TextPart(" ".join(told), "assistant", True))
            given = (
                i == 0 and not parts
            )  # nothing says what to draw: the first frame is where the clip starts
            parts.append(PicturePart(picture, "user" if given else "assistant", not given))
        if not any(part.supervised for part in parts):
            return LeftOut(f"{where}: a single frame without a text teaches nothing")
        return Row(tuple(parts), where)


def _named(clip: Clip | RowError) -> str:
    """A clip wherever its data set lies."""
    return "" if isinstance(clip, RowError) else "/".join(clip.path.parts[-2:])


def _moving(looks: list[Look], config: VideoConfig) -> tuple[list[tuple[int, PictureRef]], int, int]:
    """The looks that are kept, and how many were dropped as still and as the camera's motion."""
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
    return kept, dropped["still"], dropped["camera"]


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
    frames, fps = _header(clip)
    return int((frames - 1) / fps * config.rate + 1e-6) + 1


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
            ref = PictureRef(f"{clip.where}: {path.name}", path=path)
            yield number, ref, np.asarray(open_picture(path))
        return
    cv2 = load_cv2()
    capture, (_, fps) = _capture(clip), _header(clip)
    try:
        number, index = first, 0
        while capture.grab():
            if index >= round(number * fps / config.rate):
                found, frame = capture.retrieve()
                if not found:
                    return
                pixels = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                while index >= round(
                    number * fps / config.rate
                ):  # more than once where looks are more frequent
                    yield number, FrameRef(f"{clip.where}: frame {index}", pixels=pixels), pixels
                    number += 1
            index += 1
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


def _header(clip: Clip) -> tuple[int, float]:
    """(frames, frames per second) of a file; counted when its header does not say."""
    cv2 = load_cv2()
    capture = _capture(clip)
    try:
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        if frames <= 0:
            frames = 0
            while capture.grab():
                frames += 1
    finally:
        capture.release()
    if frames < 1:
        raise RowError(f"{clip.where}: the video has no frames")
    return frames, fps if np.isfinite(fps) and fps > 0 else 25.0
