"""A run of so many minutes has the number of steps that fit."""

from __future__ import annotations

import pytest

from nextflow_ar.config import ConfigError
from nextflow_ar.training.runs import Pace


def test_without_a_time_the_steps_are_the_recipes() -> None:
    pace = Pace(7)
    for step in range(1, 100):
        pace.passed(step)
    assert pace.steps == 7


@pytest.mark.parametrize(("begun_at", "slow"), [(0, 0.0), (400, 20.0)])
def test_with_a_time_they_follow_from_how_long_a_step_takes(begun_at: int, slow: float) -> None:
    now = [1000.0]
    pace = Pace(7, 120.0, clock=lambda: now[0])
    now[0] += slow  # loading, compiling
    steps = []
    for step in range(begun_at + 1, begun_at + 51):
        now[0] += 3.0 if step == begun_at + 1 else 0.5
        pace.passed(step)
        steps.append(pace.steps)
    assert set(steps[:49]) == {10**9}
    left = 120.0 - 6.0 - slow - 3.0 - 49 * 0.5
    assert pace.steps == begun_at + 50 + int(left / 0.5)
    pace.passed(begun_at + 51)
    assert pace.steps == begun_at + 50 + int(left / 0.5)


def test_when_the_time_is_over_one_step_more_ends_it() -> None:
    now = [0.0]
    pace = Pace(7, 1.0, clock=lambda: now[0])
    now[0] += 1.0
    pace.passed(1)
    assert pace.steps == 2


def test_few_slow_steps_end_in_time_too() -> None:
    now, step = [0.0], 0
    pace = Pace(7, 300.0, clock=lambda: now[0])
    while step < pace.steps:
        step += 1
        now[0] += 90.0 if step == 1 else 20.0  # the first compiles
        pace.passed(step)
        assert pace.steps == 10**9 or now[0] >= 150.0
    assert step == 11
    assert now[0] == 290.0


@pytest.mark.parametrize(
    ("time", "first", "each", "steps"), [(120, 65, 0.5, 99), (600, 310, 1.0, 285), (300, 160, 2.0, 68)]
)
def test_a_long_beginning_leaves_the_rest(time: float, first: float, each: float, steps: int) -> None:
    now, step = [0.0], 0
    pace = Pace(7, time, clock=lambda: now[0])
    while step < pace.steps:
        step += 1
        now[0] += first if step == 1 else each
        pace.passed(step)
    assert step == steps and time - 12 < now[0] <= time


def test_several_processes_have_no_time() -> None:
    with pytest.raises(ConfigError, match="one process"):
        Pace(7, 60.0, 2)
