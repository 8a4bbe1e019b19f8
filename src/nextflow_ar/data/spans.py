"""What rows of a source are of, so that a later run can tell whether they still are; and files' words."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Span = tuple[str | int, ...]
"""A file's name and which of its rows (first, behind the last), or checksums of what is told in text."""


def named(path: Path, files: list[Path]) -> str:
    """What a file is called among several; one alone may be called anything."""
    return path.name if len(files) > 1 else ""


def checksum(lines: Iterable[bytes]) -> int:
    """Of lines without what ends them: the last line of a file may get its end later."""
    found = 0
    for line in lines:
        found = zlib.crc32(line.strip() + b"\n", found)
    return found


def overlapping(files: Iterable[tuple[str, int]], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Of files with numbers of rows, those that rows ``start`` to ``stop`` lie in: which of theirs."""
    at = 0
    for name, count in files:
        if at >= stop:
            return
        low, high = max(start, at), min(stop, at + count)
        if low < high:
            yield name, low - at, high - at
        at += count


def file_spans(
    files: list[Path],
    count: Callable[[Path], int],
    told: Callable[[Path, int, int], int],
    start: int,
    stop: int,
) -> list[Span]:
    """Of rows ``start`` to ``stop`` of files one after the other: name, which of its rows, checksum of their words.

    ``count``: rows of a file; ``told``: that checksum.
    """
    by_name = {str(path): path for path in files}
    counts = ((name, count(path)) for name, path in by_name.items())
    return [
        (named(by_name[name], files), low, high, told(by_name[name], low, high))
        for name, low, high in overlapping(counts, start, stop)
    ]


def words(data: bytes) -> str | None:
    """A file's text, or None where it is no UTF-8: other encodings would be learned with holes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
