"""Rows of a parquet file's groups; what is damaged costs as few of them as can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nextflow_ar.data.rows import RowError


def group_rows(file: Any, group: int, size: int) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a parquet file's row group, in parts, since one may be gigabytes; where it is damaged, an error for
    every row that cannot be read any more.
    """
    seen = 0
    try:
        for batch in file.iter_batches(batch_size=64, row_groups=[group]):
            for values in _batch_rows(batch):
                yield values
                seen += 1
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's own are among these
        reason = " ".join(str(error).split())[:200]
        for _ in range(size - seen):
            yield RowError(f"its part of the file is damaged ({reason})")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """The rows of an Arrow batch; where one holds what is no value (text that is not UTF-8), an error for that one."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:
        pass
    for i in range(batch.num_rows):
        try:
            (values,) = batch.slice(i, 1).to_pylist()
        except ValueError as error:
            values = RowError(f"cannot be read ({' '.join(str(error).split())[:200]})")
        yield values
