"""Files of a WebDataset shard, key by key, the values of their rows, and whether that was all of it."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from nextflow_ar.data.layouts import VIDEO_SUFFIXES, names_picture
from nextflow_ar.data.rows import RowError
from nextflow_ar.data.spans import words


def goes_on(path: Path, end: int) -> bool:
    """Whether anything but zeros stands behind where a tar was read to: tarfile takes a broken header for its end."""
    with path.open("rb") as file:
        file.seek(end)
        return any(any(block) for block in iter(lambda: file.read(1 << 20), b""))


def damage(path: Path, error: Exception) -> str:
    """What is wrong with a tar that cannot be read, in one line: tarfile's own has one for every kind of compression."""
    told = " ".join(str(error).split())
    if not told.startswith("file could not be opened"):
        return told
    return "not a tar file" if path.stat().st_size else "the file is empty"


def by_key(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The files of every key, by suffix, one key after the other."""
    key, found = "", {}
    for member in shard:
        shard.members.clear()  # it would remember every header  # pyright: ignore[reportAttributeAccessIssue]
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):  # macOS puts "._0001.jpg" with notes of its own before every file
            continue
        stem, _, suffix = name.partition(".")
        current = f"{folder}/{stem}" if folder else stem
        if current != key:
            if found:
                yield key, found
            key, found = current, {}
        found[suffix.lower()] = member
    if found:
        yield key, found


def content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What is in a file of a tar."""
    file = shard.extractfile(member)
    return file.read() if file else b""


def shard_values(members: dict[str, bytes], where: str) -> dict[str, Any]:
    """The values of a row from its files by suffix. Raises RowError."""
    values: dict[str, Any] = {}
    for suffix, data in members.items():
        if suffix == "json":
            try:
                values |= json.loads(data)
            except (ValueError, TypeError, RecursionError) as error:
                raise RowError(f"{where}: not valid JSON ({error})") from None
    pictures: dict[str, tuple[str, bytes]] = {}
    for suffix, data in members.items():
        if suffix in ("txt", "caption"):
            if (text := words(data)) is None:
                raise RowError(f"{where}: its .{suffix} is not UTF-8")
            values["caption"] = text if values.get("caption") is None else values["caption"]
        elif "." + suffix.rpartition(".")[2] in PILImage.registered_extensions():
            name, dot, _ = suffix.rpartition(".")
            name = name if dot else "image"  # "0001.source.png" is the key "source"
            if name in pictures and not _is_picture(suffix):
                continue
            if name in pictures and _is_picture(pictures[name][0]):
                raise RowError(
                    f"{where}: .{pictures[name][0]} and .{suffix} are two pictures of one name: keep one, or name them by "
                    "their keys (such as .source.png and .target.png)"
                )
            pictures[name] = (suffix, data)
        elif "." + suffix in VIDEO_SUFFIXES:
            values.setdefault(suffix, data)  # nothing reads it, which is to be told
    found = {name: data for name, (_, data) in pictures.items()}
    return _filled(values, found) if "segments" in values else values | found


def _is_picture(suffix: str) -> bool:
    """Whether it is that of pictures first of all: Pillow names those of documents, films and arrays, too."""
    name = f"x.{suffix.rpartition('.')[2]}"
    return name == "x.gif" or (names_picture(name) and Path(name).suffix not in VIDEO_SUFFIXES)


def _filled(values: dict[str, Any], pictures: dict[str, bytes]) -> dict[str, Any]:
    """Segments of a shard's row name the pictures beside it: ``{"image": "0"}`` is ``0001.0.png``."""
    segments = values["segments"]
    if not isinstance(segments, list):
        return values
    filled = [
        {**part, "image": pictures[part["image"]]}
        if isinstance(part, dict) and isinstance(part.get("image"), str) and part["image"] in pictures
        else part
        for part in segments
    ]
    return {**values, "segments": filled}


def told_by_key(path: Path) -> list[int]:
    """Of every row of a shard a checksum of its files' names and sizes and of what is told in words; up to where it is
    damaged.
    """
    found: list[int] = []
    try:
        with tarfile.open(path) as shard:
            for key, members in by_key(shard):
                one = zlib.crc32(repr([key, *((k, m.size) for k, m in members.items())]).encode())
                for suffix in sorted(members.keys() & {"json", "txt", "caption"}):
                    one = zlib.crc32(content(shard, members[suffix]), one)
                found.append(one)
    except (tarfile.TarError, EOFError, OSError):
        pass
    return found
