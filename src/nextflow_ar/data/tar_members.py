"""Files of a WebDataset shard, key by key, and whether that was all of it."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path


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
