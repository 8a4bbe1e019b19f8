"""Packing: nothing lost, no row over its budget, the same after a restart anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextflow_ar.data.packing import Packer

ITEMS = st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(1, 50)), max_size=80)


@given(ITEMS, st.integers(1, 6))
def test_every_sample_is_in_one_row_and_no_row_is_too_full(items: list[tuple[float, int]], rows: int) -> None:
    stream = [(i, cost, length) for i, (cost, length) in enumerate(items)]
    packed = list(Packer(1.0, longest=60, open_rows=rows).pack(stream))
    assert sorted(n for row in packed for n in row) == list(range(len(items)))
    for row in packed:
        assert sum(items[n][0] for n in row) <= 1.0 + 1e-9 and sum(items[n][1] for n in row) <= 60


@given(ITEMS, st.integers(0, 80))
def test_a_restart_in_mid_stream_changes_nothing(items: list[tuple[float, int]], stop: int) -> None:
    stream = [(i, cost, length) for i, (cost, length) in enumerate(items)]
    whole = list(Packer(1.0, open_rows=3).pack(stream))
    first = Packer(1.0, open_rows=3)
    rows = [row for item in stream[:stop] if (row := first.add(*item)) is not None]
    second = Packer(1.0, open_rows=3)
    state = first.state()
    for item in stream[stop:]:
        first.add(*item)  # goes on while the state is being written elsewhere
    second.restore(json.loads(json.dumps(state)))
    assert second.taken == min(stop, len(items))
    rows += list(second.pack(stream[second.taken :]))
    assert rows == whole


def test_more_open_rows_waste_less() -> None:
    stream = [(i, 0.2 + 0.61 * ((i * 7919) % 101) / 101, 1) for i in range(400)]
    counts = [len(list(Packer(1.0, open_rows=n).pack(stream))) for n in (1, 8, 64)]
    assert counts[0] > counts[1] >= counts[2] >= sum(c for _, c, _ in stream)


def test_what_fits_no_row_is_named() -> None:
    with pytest.raises(ValueError, match="sample 7 costs 2 at length 5: more than a row may"):
        Packer(1.0).add(7, 2.0, 5)
    with pytest.raises(ValueError, match="budget is above 0"):
        Packer(0.0)
