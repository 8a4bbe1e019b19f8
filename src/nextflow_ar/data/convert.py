"""Any readable source as JSONL with pictures beside it, as parquet with pictures inside, or as WebDataset shards.

Rows are written in the full form and pictures as the bytes they have, so that nothing is lost on the way and back. A file
appears when it is whole. With a limit of size the output is several numbered files, and a conversion that was stopped goes
on with the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nextflow_ar.data.picture_folder import FolderSource
from nextflow_ar.data.rows import PicturePart, Row, RowError, TextPart
from nextflow_ar.data.sources import Source, SourceError, spans_of
from nextflow_ar.data.video import VideoSource
from nextflow_ar.storage import StorageError, write_atomic
from nextflow_ar.tokenizer.pictures import PictureError

_GROUP_BYTES = 64_000_000  # of pictures in one row group of a parquet file


class _Writer(Protocol):
    """One output file. ``add`` gets a row in the full form, whose pictures are (bytes, suffix)."""

    def add(self, number: int, segments: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Converted:
    """``files`` in order; ``rows`` written by this call; ``broken``: rows left out by number, and why."""

    files: list[Path]
    rows: int
    broken: dict[str, str]


def convert(
    source: Source,
    out: Path,
    *,
    most_bytes: int | None = None,
    place: Path | str = "",
    progress: Callable[[int], None] = lambda rows: None,
) -> Converted:
    """Write all rows of a source to ``out``, whose suffix says how: .jsonl, .parquet or .tar.

    ``most_bytes``: a file is finished when its texts and pictures reach so much; the files are then OUT-000000.tar and so
    on. ``place``: where the source is, as ``open_source`` takes it, so that a stopped conversion goes on with the same one
    only; it does so while the rows that are written are still the source's first ones.
    Raises SourceError for another suffix and where there is no row to write, StorageError when the output exists, cannot
    be written, or lies within the source's folder.
    """
    kind = _WRITERS.get(out.suffix.lower())
    if kind is None:
        raise SourceError(f"{out}: data is written as {', '.join(_WRITERS)}")
    _apart(out, place, source)
    video = asdict(source.config) if isinstance(source, VideoSource) else None
    journal = _Journal(out, {"place": _whole(place), "most_bytes": most_bytes, "video": video}, source)
    written, broken = 0, dict(journal.broken)
    rows = enumerate(source.rows(journal.next_row), start=journal.next_row)
    pending = next(rows, None)
    if pending is None and not journal.files:
        raise SourceError(f"{place or out}: no rows to write")
    while pending is not None or not journal.files:
        number = len(journal.files)
        name = out if most_bytes is None else out.with_name(f"{out.stem}-{number:06d}{out.suffix}")
        with _finished(name) as temporary:
            writer, size, end = kind(temporary, out), 0, journal.next_row
            while pending is not None and (most_bytes is None or size < most_bytes):
                end, row = pending
                added = _add(writer, end, row, broken)
                size, written = size + added, written + (added > 0)
                progress(written)
                pending, end = next(rows, None), end + 1
            writer.close()
            if not written and pending is None and not journal.files:  # nothing is left of the file
                raise SourceError(
                    f"{place or out}: no row could be written, {len(broken)} left out: {next(iter(broken.values()))}"
                )
        journal.done(name, end, broken)
    journal.finish()
    return Converted(journal.files, written, broken)


def _apart(out: Path, place: Path | str, source: Source) -> None:
    """Raises StorageError where what is written would be read as rows of the source at ``place``."""
    folder = None if not place or str(place).startswith("hf://") else Path(place).resolve()
    if folder is None or not folder.is_dir():
        return
    held = out.resolve().parent
    deep = isinstance(source, FolderSource | VideoSource)  # read with all that lies below
    if held == folder or (deep and held.is_relative_to(folder)):
        raise StorageError(
            f"{out} lies in the source, {place}, and would be read with it: name another folder"
        )


def _add(writer: _Writer, number: int, row: Row | RowError, broken: dict[str, str]) -> int:
    """Add a row to a file; returns its bytes, 0 for a row that is left out."""
    if isinstance(row, RowError):
        broken[str(number)] = str(row)
        return 0
    try:
        segments = [_segment(part) for part in row.parts]
    except (PictureError, OSError) as error:
        broken[str(number)] = str(error) if row.where in str(error) else f"{row.where}: {error}"
        return 0
    writer.add(number, segments)
    return sum(len(s["text"].encode()) if "text" in s else len(s["image"][0]) for s in segments) + 100


def _segment(part: TextPart | PicturePart) -> dict[str, Any]:
    common = {"role": part.role, "supervised": part.supervised}
    if isinstance(part, TextPart):
        return {"text": part.text} | common
    return {"image": part.picture.content()} | common


class _Jsonl:
    """Lines, and beside the file a folder of pictures named by their content: one that many rows have is there once."""

    def __init__(self, temporary: Path, out: Path) -> None:
        self.file = temporary.open("w", encoding="utf-8")
        self.pictures = out.with_name(out.stem + "_pictures")

    def add(self, number: int, segments: list[dict[str, Any]]) -> None:
        told = [{**s, "image": self._kept(*s["image"])} if "image" in s else s for s in segments]
        self.file.write(json.dumps({"segments": told}, ensure_ascii=False) + "\n")

    def _kept(self, data: bytes, suffix: str) -> str:
        digest = hashlib.sha256(data).hexdigest()[:32]
        path = self.pictures / digest[:2] / f"{digest}.{suffix}"
        if not path.is_file():
            write_atomic(path, data)
        return path.relative_to(self.pictures.parent).as_posix()

    def close(self) -> None:
        self.file.close()


class _Parquet:
    """One column of segments, pictures as Hugging Face stores them: a struct of bytes and path."""

    def __init__(self, temporary: Path, out: Path) -> None:
        try:
            import pyarrow as pa  # pyright: ignore[reportMissingImports]
            import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SourceError("parquet files need pyarrow: pip install 'nextflow-ar[train]'") from None
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = [("text", pa.string()), ("image", image), ("role", pa.string()), ("supervised", pa.bool_())]
        self.pa, self.schema = pa, pa.schema([("segments", pa.list_(pa.struct(fields)))])
        self.file = pq.ParquetWriter(temporary, self.schema, compression="zstd")
        self.rows: list[dict[str, Any]] = []
        self.size = 0

    def add(self, number: int, segments: list[dict[str, Any]]) -> None:
        told = []
        for i, segment in enumerate(segments):
            if "image" in segment:
                data, suffix = segment["image"]
                segment = {**segment, "image": {"bytes": data, "path": f"{number:09d}.{i}.{suffix}"}}
                self.size += len(data)
            told.append(segment)
        self.rows.append({"segments": told})
        if self.size >= _GROUP_BYTES or len(self.rows) == 1000:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.file.write_table(self.pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows, self.size = [], 0

    def close(self) -> None:
        self._flush()
        self.file.close()


class _Tar:
    """WebDataset: a row's files have one key, its number; segments name their pictures."""

    def __init__(self, temporary: Path, out: Path) -> None:
        self.tar = tarfile.open(temporary, "w")  # noqa: SIM115

    def add(self, number: int, segments: list[dict[str, Any]]) -> None:
        told, files = [], []
        for i, segment in enumerate(segments):
            if "image" in segment:
                data, suffix = segment["image"]
                files.append((f"{number:09d}.{i}.{suffix}", data))
                segment = {**segment, "image": str(i)}
            told.append(segment)
        document = json.dumps({"segments": told}, ensure_ascii=False).encode()
        for name, data in [(f"{number:09d}.json", document), *files]:
            member = tarfile.TarInfo(name)  # without time and owner: equal rows give equal files
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        self.tar.close()


_WRITERS: dict[str, Callable[[Path, Path], _Writer]] = {".jsonl": _Jsonl, ".parquet": _Parquet, ".tar": _Tar}


def _whole(place: Path | str) -> str:
    """A place that means the same in every working directory."""
    if not place or str(place).startswith("hf://"):
        return str(place).rstrip("/")
    return str(Path(place).resolve())


class _Journal:
    """Which files of a conversion into several are whole, how far in the source they reach, and what of it they hold."""

    def __init__(self, out: Path, setting: dict[str, Any], source: Source) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.progress.json")
        self.setting, self.several, self.source = setting, setting["most_bytes"] is not None, source
        self.files: list[Path] = []
        self.broken: dict[str, str] = {}
        self.next_row = 0
        # of every file: the row behind its last, and the digest of its rows
        self.held: list[tuple[int, str]] = []
        first = out.with_name(f"{out.stem}-000000{out.suffix}") if self.several else out
        if self.path.is_file():
            self._go_on()
        elif first.exists():
            raise StorageError(f"{first} exists already: name another file, or remove it")

    def _go_on(self) -> None:
        """Take over what a stopped conversion wrote. Raises StorageError where this one would not go on with it."""
        anew = f"remove {self.path} and the files beside it, or name another file"
        try:
            known = json.loads(self.path.read_bytes())
            setting, self.broken = (
                dict(known["setting"]),
                {str(int(n)): str(w) for n, w in known["broken"].items()},
            )
            self.held = [(int(stop), str(items)) for stop, items in known.get("held", [])]
            self.files = [self.out.with_name(Path(name).name) for name in known["files"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise StorageError(f"{self.path}: damaged ({type(error).__name__}: {reason}): {anew}") from None
        if "video" not in setting:
            raise StorageError(
                f"{self.out}: an earlier version stopped there, whose list does not say of what: {anew}"
            )
        if setting != self.setting:
            raise StorageError(
                f"{self.out}: a conversion of another source or size was stopped there: {anew}"
            )
        gone = next((name for name in self.files if not name.is_file()), None)
        if gone is not None or len(self.held) != len(self.files):
            raise StorageError(f"{gone or self.path}: gone since the conversion was stopped: {anew}")
        for name, (stop, items) in zip(self.files, self.held, strict=True):
            if items != self._items(stop):
                raise StorageError(f"{name}: its source has changed since it was written: {anew}")
            self.next_row = stop

    def _items(self, stop: int) -> str:
        """Digest of what the source's rows from the next one to ``stop`` are of; "" where it cannot tell."""
        found = spans_of(self.source, self.next_row, stop)
        return "" if found is None else hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def done(self, name: Path, next_row: int, broken: dict[str, str]) -> None:
        """Another file is whole, which holds the rows from the next one to ``next_row``."""
        self.files.append(name)
        if self.several:
            self.held.append((next_row, self._items(next_row)))
            known = {"setting": self.setting, "files": [file.name for file in self.files], "held": self.held}
            write_atomic(self.path, json.dumps(known | {"broken": broken}).encode())
        self.next_row = next_row

    def finish(self) -> None:
        """Nothing is left to go on with."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _finished(name: Path) -> Iterator[Path]:
    """A place to write a file at; it takes its name when it is whole, and is removed when it is not."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, name)
    except OSError as error:
        raise StorageError(f"{name}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
