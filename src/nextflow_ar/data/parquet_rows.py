"""Rows of a parquet file's groups; what is damaged costs as few of them as can be."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from nextflow_ar.data.rows import RowError


def group_rows(
    file: Any, group: int, size: int, columns: list[str] | None = None
) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a parquet file's row group (of some ``columns``), in parts, since one may be gigabytes; where it is
    damaged, an error for every row that cannot be read any more.
    """
    seen = 0
    try:
        for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns):
            for values in _batch_rows(batch):
                yield values
                seen += 1
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's own are among these
        reason = " ".join(str(error).split())[:200]
        for _ in range(size - seen):
            yield RowError(f"its part of the file is damaged ({reason})")


def told_in(file: Any, start: int, stop: int) -> int:
    """Checksum of what rows ``start`` to ``stop`` of a parquet file say: of all columns that hold no bytes. What is damaged
    counts by its message.
    """
    import pyarrow as pa  # pyright: ignore[reportMissingImports]

    def bare(kind: Any) -> bool:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and all(map(bare, inner))

    columns = [field.name for field in file.schema_arrow if bare(field.type)]
    found, at = 0, 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if columns and at < stop and at + size > start:
            for number, values in enumerate(group_rows(file, group, size, columns), start=at):
                if start <= number < stop:
                    found = zlib.crc32(repr(values).encode("utf-8", "backslashreplace"), found)
        at += size
    return found


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """The rows of an Arrow batch; where one holds what is no value (text that is not UTF-8), an error for that one."""
    try:
        found = batch.to_pylist()
    except Exception:  # dates that no calendar has, zones that nobody knows: of that row alone
        found = []
    if found or not batch.num_rows:
        yield from found
        return
    for i in range(batch.num_rows):
        try:
            (values,) = batch.slice(i, 1).to_pylist()
        except Exception as error:
            values = RowError(f"cannot be read ({' '.join(str(error).split())[:200]})")
        yield values
