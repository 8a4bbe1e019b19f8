"""Where rows come from: folders with captions, JSONL, JSON, parquet, WebDataset shards, video, Hugging Face data sets.

Every source is a fixed list of items in a fixed order, so that "row 1,234" means the same in every run: ``rows(start)``
goes on from any place. A broken item is a RowError in its place, never the end of the source.
"""

from __future__ import annotations

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image as PILImage

from nextflow_ar.data.layouts import (
    HUB_NOTES,
    VIDEO_SUFFIXES,
    LayoutError,
    coco_rows,
    image_folder,
    short,
    unreadable,
)
from nextflow_ar.data.parquet_rows import group_rows, told_in
from nextflow_ar.data.rows import Row, RowError, parse_row
from nextflow_ar.data.spans import Span, checksum, file_spans
from nextflow_ar.data.tar_members import by_key, content, damage, goes_on, shard_values, told_by_key
from nextflow_ar.tokenizer.pictures import files_below

if TYPE_CHECKING:
    from nextflow_ar.data.video import VideoConfig

TABLES = ("metadata.jsonl", "captions.jsonl", "manifest.jsonl")


class SourceError(ValueError):
    """A source cannot be read at all: one line that says why and what is accepted."""


class Source(Protocol):
    """Rows in a fixed order. One that starts anywhere at little cost says so by an attribute ``seeks = True``; one beside
    which there is what might be meant as rows has a line for each in ``notes``.
    """

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """Row ``start`` and all that follow; a broken one is its error."""
        ...

    def count(self) -> int:
        """How many rows there are, without opening a picture. Raises SourceError where that is not known beforehand."""
        ...


def spans_of(source: Source, start: int, stop: int) -> list[Span] | None:
    """What rows ``start`` to ``stop`` are of, so that another run can tell whether they still are; no picture is opened.
    None where the source cannot tell.
    """
    told = getattr(source, "spans", None)
    return None if told is None else told(start, stop)


def open_source(place: Path | str, video: VideoConfig | None = None) -> Source:
    """The source at a path, by what is there; or ``hf://OWNER/NAME[@CONFIG][/SPLIT]``. ``video``: how clips become rows.

    Raises SourceError.
    """
    if str(place).startswith("hf://"):
        from nextflow_ar.data.hub_rows import HubSource

        return HubSource(str(place).removeprefix("hf://"))
    if not str(place).strip():
        raise SourceError("the place of the data is empty: name a file, a folder or hf://OWNER/NAME")
    path = Path(place)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    _no_codes(path)
    kind = KINDS.get(path.suffix.lower()) if path.is_file() else None
    if kind is not None:
        return kind([path])
    if path.is_dir():
        _no_csv(path)
        found = _of_folder(path)
        if found is not None:
            return found
    from nextflow_ar.data.clips import find_clips
    from nextflow_ar.data.video import VideoConfig, VideoSource

    clips = find_clips(path)
    if clips is not None:
        listed = path.is_file() or any((path / name).is_file() for name in TABLES)
        return VideoSource(clips, video or VideoConfig(), [] if listed else unreadable(files_below(path)))
    if path.is_file():
        raise SourceError(
            f"{path}: {', '.join(KINDS)} and video files, folders and hf://OWNER/NAME are accepted"
        )
    from nextflow_ar.data.picture_folder import FolderSource

    return FolderSource(path)


def _of_folder(folder: Path) -> Source | None:
    """The files of rows in a folder, where there are any. Raises SourceError where they are of several kinds."""
    notes = (*TABLES, *HUB_NOTES, *(["state.json"] if any(folder.glob("*.arrow")) else []))
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in notes and p.name[0] != "."]
    clips = {p.stem for p in files if p.suffix.lower() in VIDEO_SUFFIXES}
    rows = [
        p for p in files if p.suffix.lower() != ".jsonl" or p.stem not in clips
    ]  # a clip's notes are no rows
    found = {suffix: [p for p in rows if p.suffix.lower() == suffix] for suffix in KINDS}
    kinds = [suffix for suffix, shards in found.items() if shards and suffix != ".json"]
    if len(kinds) > 1 and kinds != [".tar", ".parquet"]:  # img2dataset's tables lie beside its shards
        raise SourceError(
            f"{folder} holds {' and '.join(kinds)} files, of which one kind is read: name a file, or part them"
        )
    several = [name for name in TABLES if _lists(folder / name)] + [found[kind][0].name for kind in kinds[:1]]
    if len(several) > 1:
        raise SourceError(
            f"{folder} holds {' and '.join(several)}, rows of several kinds of which one is read: name a file, or part them"
        )
    if kinds:
        source = KINDS[kinds[0]](found[kinds[0]])
        source.notes = [
            f"{what} is no row of {folder}, whose {kinds[0]} files are read" for what in _others(files)
        ]
        return source
    return JsonSource(found[".json"]) if found[".json"] and _only_rows(folder) else None


def _lists(table: Path) -> bool:
    """Whether a table is there and its first line names a picture or clip: others tell of shards, or of the whole."""
    if not table.is_file():
        return False
    with table.open("rb") as file, suppress(ValueError, RecursionError):
        first = json.loads(next((line for line in file if line.strip()), b""))
        return isinstance(first, dict) and bool(first.keys() & {"file_name", "file", "image", "video"})
    return False


def _others(files: list[Path]) -> list[str]:
    """A clip among the files, or a picture that has its caption beside it, as a message names it; none where none is."""
    PILImage.init()
    names = {p.name for p in files}
    clips = [p.name for p in files if p.suffix.lower() in VIDEO_SUFFIXES - {".gif"}]
    pictures = [p for p in files if p.suffix.lower() in PILImage.EXTENSION]
    captioned = [p.name for p in pictures if f"{p.stem}.txt" in names or f"{p.stem}.caption" in names]
    return [*clips[:1], *(f"{name} with a caption" for name in captioned[:1])]


def _no_codes(path: Path) -> None:
    """Raises SourceError for a folder of shards that :func:`~nextflow_ar.data.extraction.extract` wrote, or one of them."""
    tables = path.suffix.lower() == ".parquet" if path.is_file() else any(path.glob("*.parquet"))
    if not tables and not (path / "manifest.json").is_file():
        return
    from nextflow_ar.data.code_shards import is_extraction, is_shard

    if is_extraction(path) or (path.is_file() and is_shard(path)):
        raise SourceError(
            f"{path}: codes of an extraction, no rows: train from their folder (kind: shards), or nextflow-ar data check it"
        )


def _no_csv(folder: Path) -> None:
    """Raises SourceError for a table of pictures as image folders of Hugging Face may have it, too."""
    table = folder / "metadata.csv"
    if not table.is_file() or any((folder / name).is_file() for name in TABLES):
        return
    with table.open("rb") as file:
        if b"file_name" in file.readline():
            raise SourceError(f"{table} is not read: make it metadata.jsonl, a line of JSON a row")


def _only_rows(folder: Path) -> bool:
    """Whether the .json files of a folder can be lists of rows, and not notes beside pictures, clips or tables."""
    files = [p for p in folder.iterdir() if p.is_file()]
    return all(p.suffix.lower() in (".json", ".txt", ".md", "") for p in files if p.name[0] != ".")


class _Files(ABC):
    """A source of files that are read from their beginning. Whole files before ``start`` are counted, not read."""

    seeks = True

    def __init__(self, files: list[Path]) -> None:
        self.files, self.notes = files, list[str]()
        self._counts: dict[Path, int] = {}

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`."""
        for path in self.files:
            if start > 0:
                known = self._known(path)
                if known <= start:
                    start -= known
                    continue
            yield from self._read(path, start)
            start = 0

    def count(self) -> int:
        """See :class:`Source`."""
        return sum(map(self._known, self.files))

    def spans(self, start: int, stop: int) -> list[Span]:
        """See :func:`spans_of`."""
        return file_spans(self.files, self._known, self._print, start, stop)

    def _known(self, path: Path) -> int:
        if path not in self._counts:
            self._counts[path] = self._count(path)
        return self._counts[path]

    @abstractmethod
    def _count(self, path: Path) -> int: ...

    @abstractmethod
    def _read(self, path: Path, start: int) -> Iterator[Row | RowError]: ...

    @abstractmethod
    def _print(self, path: Path, start: int, stop: int) -> int:
        """Checksum of what is told in words in rows ``start`` to ``stop`` of a file."""


class JsonlSource(_Files):
    """JSONL files; pictures' paths are relative to the file."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__(files)
        self._marks: dict[Path, list[tuple[int, int]]] = {}  # of every 1,000th row: (byte, line number)

    def _count(self, path: Path) -> int:
        total, marks, at = 0, [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if total % 1000 == 0:
                        marks.append((at, number))
                    total += 1
                at += len(line)
        self._marks[path] = marks
        return total

    def _read(self, path: Path, start: int) -> Iterator[Row | RowError]:
        for number, line in self._lines(path, start):
            yield parsed(line, f"{path}:{number}", path.parent)

    def _lines(self, path: Path, start: int) -> Iterator[tuple[int, bytes]]:
        at, first = self._marks[path][start // 1000] if start else (0, 1)
        skip = start % 1000
        with path.open("rb") as file:
            file.seek(at)
            for number, line in enumerate(file, start=first):
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                yield number, line

    def spans(self, start: int, stop: int) -> list[Span]:
        """See :func:`spans_of`; lines mean the same in a file of any name."""
        return [(told,) for *_, told in super().spans(start, stop)]

    def _print(self, path: Path, start: int, stop: int) -> int:
        return checksum(line for _, line in islice(self._lines(path, start), stop - start))


class JsonSource(_Files):
    """JSON files: a list of rows (LLaVA), or COCO's captions with the pictures in a folder near by."""

    _open: tuple[Path, list[Any]] | None = None  # the file that was read last

    def _rows(self, path: Path) -> list[Any]:
        if self._open is None or self._open[0] != path:
            try:
                found = json.loads(path.read_bytes())
                if isinstance(found, dict):
                    found = coco_rows(found, path)
            except LayoutError as error:
                raise SourceError(f"{path}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}: not valid JSON: {error}") from None
            if not isinstance(found, list):
                raise SourceError(f"{path}: a JSON file is a list of rows, or COCO's mapping")
            self._open = (path, found)
        return self._open[1]

    def _count(self, path: Path) -> int:
        return len(self._rows(path))

    def _print(self, path: Path, start: int, stop: int) -> int:
        return checksum(json.dumps(row, sort_keys=True).encode() for row in self._rows(path)[start:stop])

    def _read(self, path: Path, start: int) -> Iterator[Row | RowError]:
        for number, values in enumerate(self._rows(path)[start:], start=start):
            where = f"{path}: row {number}"
            yield (
                make_row(values, where, path.parent)
                if isinstance(values, dict)
                else _no_mapping(values, where)
            )


def parsed(line: bytes, where: str, folder: Path | None, listed: bool = False) -> Row | RowError:
    """The row of a line of JSON, or what is wrong with it. ``listed``: of a table that lists pictures."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"{where}: not valid JSON ({error})")
    if not isinstance(values, dict):
        return _no_mapping(values, where)
    return make_row(image_folder(values, listed=True) if listed else values, where, folder)


def _no_mapping(values: object, where: str) -> RowError:
    return RowError(f"{where}: a row is a mapping of keys to values, got {type(values).__name__}")


def make_row(values: Mapping[str, Any], where: str, folder: Path | None) -> Row | RowError:
    """The row of plain values, or what is wrong with it; see :func:`~nextflow_ar.data.rows.parse_row`."""
    try:
        return parse_row(values, where, folder)
    except RowError as error:
        return error
    except Exception as error:  # of a shape that nobody thought of: one row, not the end of the source
        reason = " ".join(str(error).split())[:200]
        return RowError(f"{where}: cannot be read ({type(error).__name__}: {reason})")


class ParquetSource:
    """Parquet files; pictures as bytes, as Hugging Face's struct of bytes and path, or as paths relative to the file."""

    seeks = True

    def __init__(self, files: list[Path]) -> None:
        self.files, self.notes = files, list[str]()
        self._counts: dict[Path, int] = {}

    def count(self) -> int:
        """See :class:`Source`."""
        return sum(map(self._count, self.files))

    def spans(self, start: int, stop: int) -> list[Span]:
        """See :func:`spans_of`."""

        def told(path: Path, low: int, high: int) -> int:
            return told_in(self._opened(path), low, high)

        return file_spans(self.files, self._count, told, start, stop)

    def _count(self, path: Path) -> int:
        if path not in self._counts:
            self._counts[path] = self._opened(path).metadata.num_rows
        return self._counts[path]

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`; whole row groups before ``start`` are not read."""
        passed = 0
        for path in self.files:
            file = self._opened(path)
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if passed + size <= start:
                    passed, number = passed + size, number + size
                    continue
                for values in group_rows(file, group, size):
                    where = f"{path}: row {number}"
                    if passed >= start:
                        damaged = isinstance(values, RowError)
                        yield (
                            RowError(f"{where}: {values}")
                            if damaged
                            else make_row(values, where, path.parent)
                        )
                    passed, number = passed + 1, number + 1

    def _opened(self, path: Path) -> Any:
        try:
            import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SourceError("parquet files need pyarrow: pip install 'nextflow-ar[train]'") from None
        try:
            return pq.ParquetFile(path)
        except Exception as error:
            reason = " ".join(str(error).split())[:100]
            raise SourceError(f"{path}: not a parquet file ({reason})") from None


class TarSource(_Files):
    """WebDataset shards: files of one key (``0001.jpg``, ``0001.txt`` or ``0001.json``) are one row."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__(files)
        self._prints: dict[Path, list[int]] = {}

    def _count(self, path: Path) -> int:
        return sum(1 for _ in self._groups(path, None))

    def _print(self, path: Path, start: int, stop: int) -> int:
        if path not in self._prints:
            self._prints[path] = told_by_key(path)
        return checksum(str(one).encode() for one in self._prints[path][start:stop])

    def _read(self, path: Path, start: int) -> Iterator[Row | RowError]:
        yield from self._groups(path, start)

    def _groups(self, path: Path, start: int | None) -> Iterator[Row | RowError]:
        """The rows of a shard from ``start`` on; with None all of them, from headers alone, good only for counting."""
        try:
            with tarfile.open(path) as shard:
                for number, (key, members) in enumerate(by_key(shard)):
                    if start is None:
                        yield RowError(key)
                    elif number >= start:
                        found = {suffix: content(shard, member) for suffix, member in members.items()}
                        yield _shard_row(found, f"{path}: {short(key)}", path)
                if goes_on(path, shard.offset):
                    raise tarfile.ReadError(
                        "something that is no file of it follows: a broken header, or tars that were joined"
                    )
        except (tarfile.TarError, EOFError, OSError) as error:
            yield RowError(f"{path}: the shard is damaged ({damage(path, error)})")


def _shard_row(members: dict[str, bytes], where: str, shard: Path) -> Row | RowError:
    try:
        values = shard_values(members, where)
    except RowError as error:
        return error
    return make_row(values, where, shard)  # a name that is no file of it is in no other folder


KINDS: dict[str, type[JsonlSource] | type[ParquetSource] | type[TarSource] | type[JsonSource]] = {
    ".jsonl": JsonlSource,
    ".tar": TarSource,  # before the tables that img2dataset writes beside its shards
    ".parquet": ParquetSource,
    ".json": JsonSource,
}
