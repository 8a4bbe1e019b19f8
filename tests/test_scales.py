"""Scale schedules: the printed table, every final grid, levels, and the nearest aspect ratio."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextflow_ar.scales import BASE_SIZES, FINAL_GRIDS, LEVELS, ScaleSchedule, final_of

PAPER_GRIDS = (
    "32x128 32x124 32x120 32x116 36x112 36x104 36x108 40x100 40x96 44x92 44x88 44x84 48x84 48x80 "
    "52x76 52x72 56x72 56x68 60x68 60x64 64x64"
)


def test_the_41_final_grids_are_the_papers() -> None:
    wide = [tuple(int(v) for v in text.split("x")) for text in PAPER_GRIDS.split()]
    assert set(FINAL_GRIDS) == {*wide, *((w, h) for h, w in wide)}
    assert len(FINAL_GRIDS) == len(set(FINAL_GRIDS)) == 41


def test_square_levels_have_the_papers_token_counts() -> None:
    assert {px: ScaleSchedule.square(n).num_tokens for px, n in LEVELS.items()} == {
        256: 900,
        512: 3684,
        1024: 10084,
    }
    assert [ScaleSchedule.square(n).image_size(16) for n in LEVELS.values()] == [
        (256, 256),
        (512, 512),
        (1024, 1024),
    ]
    nano = ScaleSchedule.square(8)
    assert (nano.num_tokens, nano.image_size(8)) == (204, (64, 64))
    assert nano.grids == tuple((n, n) for n in range(1, 9))
    assert nano.offsets == (0, 1, 5, 14, 30, 55, 91, 140, 204)


@pytest.mark.parametrize(
    ("final", "grids"),
    [
        # round(b * 32 / 64) and round(b * 128 / 64), half to even: 2.5 -> 2, 3.5 -> 4
        ((32, 128), [(1, 1), (1, 4), (2, 6), (2, 8), (2, 10), (3, 12), (4, 14), (4, 16), (5, 20), (6, 24), (7, 28),
                     (8, 32), (10, 40), (12, 48), (14, 56), (16, 64), (24, 96), (32, 128)]),
        # 48 / 64 = 0.75 and 80 / 64 = 1.25: 6 * 0.75 = 4.5 -> 4, 2 * 1.25 = 2.5 -> 2, 10 * 1.25 = 12.5 -> 12
        ((48, 80), [(1, 1), (2, 2), (2, 4), (3, 5), (4, 6), (4, 8), (5, 9), (6, 10), (8, 12), (9, 15), (10, 18),
                    (12, 20), (15, 25), (18, 30), (21, 35), (24, 40), (36, 60), (48, 80)]),
    ],
)  # fmt: skip
def test_rule_on_hand_computed_schedules(final: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    assert list(ScaleSchedule.from_final(final)) == grids
    mirrored = ScaleSchedule.from_final((final[1], final[0]))
    assert list(mirrored) == [(w, h) for h, w in grids]


@pytest.mark.parametrize("final", FINAL_GRIDS)
@pytest.mark.parametrize("scales", [8, *LEVELS.values()])
def test_every_schedule_follows_the_rule(final: tuple[int, int], scales: int) -> None:
    schedule = ScaleSchedule.from_final(final, scales)
    assert schedule.grids[0] == (1, 1) and len(schedule) == scales
    for base, grid in list(zip(BASE_SIZES, schedule, strict=False))[1:]:
        for side, whole in zip(grid, final, strict=True):
            assert abs(side - base * whole / 64) <= 0.5 or side == 1
    assert list(schedule.sizes) == [h * w for h, w in schedule]
    assert schedule.offsets[-1] == schedule.num_tokens == sum(schedule.sizes)
    if scales == 18:
        assert schedule.final == final
        assert 0.9 <= final[0] * final[1] / 4096 <= 1.0  # nearly constant area


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_nearest_is_nearest(height: int, width: int) -> None:
    ratio = height / width
    if not 0.25 / 1.1 <= ratio <= 4.4:
        with pytest.raises(ValueError, match="aspect ratios from 1:4 to 4:1"):
            ScaleSchedule.nearest(height, width, 18)
        return
    chosen = ScaleSchedule.nearest(height, width, 18).final

    def distance(grid: tuple[int, int]) -> float:
        return max(grid[0] / grid[1] / ratio, ratio / (grid[0] / grid[1]))

    assert distance(chosen) <= min(distance(grid) for grid in FINAL_GRIDS) + 1e-12


def test_nearest_by_hand() -> None:
    assert ScaleSchedule.nearest(64, 64, 8) == ScaleSchedule.square(8)
    assert ScaleSchedule.nearest(512, 768, 18).final == (52, 76)  # 3:2
    assert ScaleSchedule.nearest(1080, 1920, 18).final == (48, 84)  # 16:9
    assert ScaleSchedule.nearest(1920, 1080, 18).final == (84, 48)


def test_a_canvas_has_one_schedule_by_hand() -> None:
    wide = ScaleSchedule.nearest(400, 600, 8)  # 52x76 is nearest, 48x80 nearer to the 6x10 that both round to
    assert wide == ScaleSchedule.from_final((48, 80), 8) and wide.num_tokens == 189
    assert wide.grids[5:] == ((4, 8), (5, 9), (6, 10))
    other = ScaleSchedule.from_final((52, 76), 8)
    assert other.final == (6, 10) and other.num_tokens == 195 and wide.canonical and not other.canonical
    assert final_of((6, 10), 8) == (48, 80) and final_of((6, 11), 8) == (44, 88)
    assert final_of((6, 10), 7) is None and final_of((64, 64), 18) == (64, 64)
    assert ScaleSchedule.nearest(480, 640, 8) == ScaleSchedule.from_final((56, 72), 8)  # 4:3: nobody else's
    assert not ScaleSchedule(((1, 1), (3, 3))).canonical
    with pytest.raises(ValueError, match="1 to 18, got 19"):
        final_of((1, 1), 19)


@pytest.mark.parametrize("scales", range(1, 19))
def test_every_picture_of_a_canvas_has_its_schedule(scales: int) -> None:
    every = [ScaleSchedule.from_final(final, scales) for final in FINAL_GRIDS]
    own = {schedule.final: schedule for schedule in every if schedule.canonical}
    assert {schedule.final for schedule in every} == set(own)
    assert scales < 12 or all(s.canonical for s in every)  # every ratio has a canvas of its own
    for height, width in FINAL_GRIDS:
        found = ScaleSchedule.nearest(height, width, scales)
        assert found == own[ScaleSchedule.from_final((height, width), scales).final]
        assert final_of(found.final, scales) in FINAL_GRIDS


def test_prefix_and_bad_schedules() -> None:
    assert ScaleSchedule.square(8).prefix(3).grids == ((1, 1), (2, 2), (3, 3))
    for bad in (
        lambda: ScaleSchedule(()),
        lambda: ScaleSchedule(((2, 2),)),
        lambda: ScaleSchedule(((1, 1), (0, 2))),
    ):
        with pytest.raises(ValueError, match="scale schedule"):
            bad()
    with pytest.raises(ValueError, match="1 to 18"):
        ScaleSchedule.square(19)
    with pytest.raises(ValueError, match="1 to 8 scales"):
        ScaleSchedule.square(8).prefix(9)
    with pytest.raises(ValueError, match="two positive numbers"):
        ScaleSchedule.nearest(0, 5, 8)
