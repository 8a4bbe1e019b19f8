"""Rows of a Hugging Face data set, streamed: pictures as the bytes they are, and connections that may be lost."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from nextflow_ar.data.rows import Row, RowError, parse_row
from nextflow_ar.data.sources import SourceError, image_folder

_ADDRESS = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/]+))?")
_WAITS = (1.0, 4.0, 15.0, 60.0)
"""Seconds before every new try after a connection was lost."""
_MOST_FAULTS = 10
"""So many rows in succession that cannot be read are no broken rows: the data set cannot be read from there on."""
_NETWORK = ("requests", "urllib", "httpx", "httpcore", "aiohttp", "http")
"""Packages whose errors are about connections, without the digits some end with."""
_OFFLINE = "OfflineModeIsEnabled"
"""In errors about a connection that was switched off (``HF_HUB_OFFLINE``): waiting brings none."""
_END = object()

_T = TypeVar("_T")


class HubSource:
    """A Hugging Face data set, streamed: ``OWNER/NAME``, ``OWNER/NAME@CONFIG``, each with ``/SPLIT`` (default: train)."""

    def __init__(self, name: str) -> None:
        found = _ADDRESS.fullmatch(name.strip("/"))
        if found is None:
            raise SourceError(f"hf://{name}: hf://OWNER/NAME or hf://OWNER/NAME@CONFIG/SPLIT is accepted")
        self.name, self.config, split = found.groups()
        self.split = split or "train"
        self.address = f"hf://{self.name}{f'@{self.config}' if self.config else ''}/{self.split}"
        self._found: Any = None

    def rows(self, start: int = 0) -> HubRows:
        """See :class:`Source`. Going on from a row that lies behind is cheaper by the iterator's ``skip``."""
        return HubRows(self, start)

    def count(self) -> int:
        """Raises SourceError: a stream does not know its length."""
        raise SourceError(f"{self.address}: a streamed data set does not tell its length; download it first")

    def stream(self, start: int) -> Iterator[Mapping[str, Any]]:
        """The examples from ``start`` on as ``datasets`` gives them, pictures not decoded.

        Raises SourceError, and a lost connection's error as it is, so that the caller can try again.
        """
        if self._found is None:
            self._found = _undecoded(self._loaded())
        return iter(self._found.skip(start))

    def _loaded(self) -> Any:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SourceError("hf:// needs the package datasets: pip install 'nextflow-ar[train]'") from None
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:
            if _lost(error):
                raise
            told = _line(error)
            several = re.search(r"Config name is missing.*?(\[.*?\])", told)
            if several:
                told = f"it has several configurations, name one (hf://{self.name}@CONFIG): {several[1]}"
            raise SourceError(f"{self.address}: {told[:300]}") from None


def _undecoded(found: Any) -> Any:
    """A data set whose pictures come as the bytes of their files; as it is where ``datasets`` does not know its columns."""
    features = getattr(found, "features", None)
    if not features:
        return found
    if hasattr(found, "decode"):
        return found.decode(False)
    for name, feature in features.items():  # datasets before 3.4: pictures within lists stay decoded
        if type(feature).__name__ == "Image":
            found = found.cast_column(name, type(feature)(decode=False))
    return found


class HubRows(Iterator[Row | RowError]):
    """The rows of a stream from ``at`` on. A lost connection is tried again; a row that cannot be read is its error.

    Raises SourceError when the data set cannot be opened, the connection stays lost, or nothing more can be read.
    """

    def __init__(self, source: HubSource, at: int) -> None:
        self.source, self.at = source, at
        self._stream: Iterator[Mapping[str, Any]] | None = None
        self._faults = 0

    def __next__(self) -> Row | RowError:
        where = f"{self.source.address}: row {self.at}"
        values = self._example(where)
        if isinstance(values, RowError):
            return values
        try:
            values = _patiently(lambda: _with_bytes(values), where)
        except SourceError:
            raise
        except Exception as error:  # of a picture's file
            return RowError(f"{where}: {_line(error)}")
        try:
            return parse_row(image_folder(values), where)
        except RowError as error:
            return error

    def skip(self, count: int) -> None:
        """Go on ``count`` rows further, without a look at these; not beyond the end."""
        if self._stream is None:
            self.at += count
            return
        for _ in range(count):
            try:
                self._example(f"{self.source.address}: row {self.at}")
            except StopIteration:
                return

    def _example(self, where: str) -> dict[str, Any] | RowError:
        try:
            found = _patiently(self._read, where)
        except SourceError:
            raise
        except Exception as error:
            self._faults += 1
            if self._faults == _MOST_FAULTS:
                raise SourceError(
                    f"{where}: it and the {_MOST_FAULTS - 1} rows before cannot be read ({_line(error)})"
                ) from None
            self.at += 1
            return RowError(f"{where}: {_line(error)}")
        if found is _END:
            raise StopIteration
        self.at, self._faults = self.at + 1, 0
        return dict(found)

    def _read(self) -> Any:
        if self._stream is None:
            self._stream = self.source.stream(self.at)
        try:
            return next(self._stream, _END)
        except Exception:
            self._stream = None  # a generator ends where it fails: another one goes on
            raise


def _patiently(call: Callable[[], _T], where: str) -> _T:
    """What ``call`` returns, tried again while the connection is lost. Raises SourceError when it stays so, and whatever
    else ``call`` raises.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            if not _lost(error):
                raise
            wait = next(waits, None)
            if wait is None:
                raise SourceError(
                    f"{where}: the connection was lost, and so it was in {len(_WAITS)} more tries ({_line(error)})"
                ) from None
            time.sleep(wait)


def _lost(error: BaseException) -> bool:
    """Whether an error is about the connection, and may be gone in a while; an answer such as "not found" is not."""
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if _OFFLINE in f"{type(error).__name__}: {error}":
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    packages = {kind.__module__.partition(".")[0].rstrip("0123456789") for kind in type(error).__mro__}
    return not packages.isdisjoint(_NETWORK)


def _with_bytes(value: Any) -> Any:
    """Values in which pictures that are only named, by an address that ``datasets`` made, have their bytes."""
    if isinstance(value, list):
        return [_with_bytes(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    path = value.get("path")
    if set(value) == {"bytes", "path"} and not value["bytes"] and isinstance(path, str):
        far = "://" in path and not path.startswith(
            ("http://", "https://")
        )  # these are refused as in any source
        return {"bytes": _fetched(path), "path": path} if far else value
    return {key: _with_bytes(each) for key, each in value.items()}


def _fetched(path: str) -> bytes:
    import fsspec  # comes with datasets  # pyright: ignore[reportMissingImports]

    with fsspec.open(path, "rb") as file:
        return file.read()  # pyright: ignore[reportAttributeAccessIssue]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:140] or type(error).__name__
