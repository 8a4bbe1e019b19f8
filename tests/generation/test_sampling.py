"""Sampling functions on distributions small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextflow_ar.generation.sampling import (
    COLDEST,
    MOST,
    SamplingSettings,
    SettingError,
    at_scale,
    draw,
    guide,
    keep_best,
)

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
NEVER = float("-inf")


def kept(top_k: int, top_p: float) -> list[bool]:
    return (keep_best(LOGITS, top_k, top_p)[0] > NEVER).tolist()


def test_filters_by_hand() -> None:
    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(9, 1.0) == [True] * 4
    assert kept(0, 0.5) == [True, False, False, False]
    assert kept(0, 0.51) == [True, True, False, False]
    assert kept(0, 0.81) == [True, True, True, False]
    assert kept(0, 1e-9) == [True, False, False, False]
    assert kept(3, 0.5) == [True, False, False, False]


def test_draws_follow_the_distribution() -> None:
    many = LOGITS.expand(40_000, 4)
    shares = torch.bincount(draw(many, 1.0, 0, 1.0, torch.Generator().manual_seed(1)), minlength=4) / 40_000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.01)
    sharp = torch.bincount(draw(many, 0.5, 0, 1.0, torch.Generator().manual_seed(1)), minlength=4) / 40_000
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert sharp.tolist() == pytest.approx((squares / squares.sum()).tolist(), abs=0.01)
    two = torch.bincount(draw(many, 1.0, 2, 1.0, torch.Generator().manual_seed(1)), minlength=4) / 40_000
    assert two.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    assert set(draw(many, 0.0, 0, 1.0, torch.Generator().manual_seed(1)).tolist()) == {0}


def test_no_draw_leaves_what_is_kept() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(2)) * 3
    logits[:, -5:] = NEVER
    best = keep_best(logits, 20, 0.8)
    for seed in range(20):
        found = draw(logits, 1.0, 20, 0.8, torch.Generator().manual_seed(seed))
        assert bool((best.gather(1, found[:, None]) > NEVER).all())


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_numbers(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, number))
    logits = torch.tensor([[NEVER, 1.0, 2.0, NEVER, 1.0, NEVER], [0.0, NEVER, NEVER, NEVER, NEVER, NEVER]])
    found = draw(logits, 1.0, 0, 1.0, torch.Generator())
    assert found.tolist() == ([1, 0] if number == 0 else [4, 0])


def test_settings_never_shift_later_noise() -> None:
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    draw(LOGITS, 0.0, 0, 1.0, a)
    draw(LOGITS, 1.0, 2, 0.5, b)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


@given(st.floats(0, 10), st.integers(1, 5))
def test_guidance_is_a_line(guidance: float, n: int) -> None:
    c, u = torch.randn(n, 4), torch.randn(n, 4)
    torch.testing.assert_close(guide(c, u, guidance), u + guidance * (c - u))
    torch.testing.assert_close(guide(c, u, 1.0), c)


def test_values_per_scale() -> None:
    assert [at_scale(3.0, k, 8) for k in (0, 7)] == [3.0, 3.0]
    assert [at_scale((1.0, 8.0), k, 8) for k in range(8)] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8])
    assert [at_scale((5.0, 6.0, 7.0), k, 3) for k in range(3)] == [5, 6, 7]
    assert at_scale((4.0,), 5, 8) == 4
    settings = SamplingSettings(guidance=(1.0, 3.0), top_k=(10.0, 20.0, 30.0), top_p=0.9)
    assert settings.at(1, 3) == (2.0, 1.0, 20, 0.9)
    with pytest.raises(
        SettingError, match=r"top-k takes one value, two .* or one for each of the 8 scales, got 3"
    ):
        settings.check(8)
    with pytest.raises(SettingError, match=r"^top-k takes one value for words, which have no scales, got 3$"):
        settings.check(1)
    SamplingSettings(temperature=(1.0, 0.0)).check(1)


def test_guided_and_changed() -> None:
    assert not SamplingSettings().guided and not SamplingSettings(guidance=(1.0, 1.0)).guided
    assert SamplingSettings(guidance=(1.0, 2.0)).guided and SamplingSettings(guidance=0.0).guided
    assert SamplingSettings(top_k=5).changed(top_p=0.5, temperature=None) == SamplingSettings(
        top_k=5, top_p=0.5
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance": -1.0}, "guidance is a number from 0 to 100, got -1"),
        ({"guidance": float("nan")}, "guidance is a number from 0 to 100, got nan"),
        ({"guidance": float("inf")}, "guidance is a number from 0 to 100, got inf"),
        ({"guidance": (1.0, 1e38)}, r"guidance is a number from 0 to 100, got 1e\+38"),
        ({"temperature": (1.0, -0.5)}, "temperature is a number from 0 to 100, got -0.5"),
        ({"temperature": float("nan")}, "temperature is a number from 0 to 100, got nan"),
        ({"temperature": 100.5}, "temperature is a number from 0 to 100, got 100.5"),
        ({"temperature": 1e300}, r"temperature is a number from 0 to 100, got 1e\+300"),
        ({"top_p": float("nan")}, "top-p is a number above 0"),
        ({"top_k": 1.5}, "top-k is a whole number"),
        ({"top_p": 0.0}, "top-p is a number above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top-p is a number above 0"),
    ],
)
def test_senseless_settings_are_errors(setting: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SamplingSettings(**setting)


@pytest.mark.parametrize(
    "temperature", [0.0, 5e-324, 1e-300, 1e-40, 1e-38, 1e-30, 1e-9, COLDEST * 0.99, COLDEST]
)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9), (3, 1e-9)])
def test_next_to_no_temperature_takes_the_best(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(4)) * 100
    logits[:, -2:] = NEVER
    assert SamplingSettings(temperature=temperature).at(0, 1)[1] == temperature
    found = draw(logits, temperature, top_k, top_p, torch.Generator().manual_seed(5))
    assert torch.equal(found, logits.argmax(-1))


@given(
    st.lists(st.floats(-1e30, 1e30) | st.just(NEVER), min_size=2, max_size=9),
    st.floats(0, MOST),
    st.integers(0, 5),
    st.floats(1e-9, 1),
    st.integers(0, 50),
)
def test_what_is_drawn_is_always_an_entry(
    row: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """For any settings that are accepted, and never one that is ruled out."""
    SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.tensor([[*row, 0.0]])
    found = int(draw(logits, temperature, top_k, top_p, torch.Generator().manual_seed(seed)))
    assert 0 <= found <= len(row) and logits[0, found] > NEVER


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0])
@pytest.mark.parametrize("row", [[float("nan")] * 3, [0.0, float("nan"), 1.0], [NEVER] * 3], ids=str)
def test_scores_that_are_no_numbers_are_an_error(row: list[float], temperature: float) -> None:
    """Once they gave the entry behind the last one."""
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    with pytest.raises(FloatingPointError, match=r"^the model's scores are no numbers[^\n]*$"):
        draw(logits, temperature, 0, 1.0, torch.Generator())


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.95, 0.9999])
def test_the_nucleus_is_that_of_a_stable_sort(top_p: float) -> None:
    """Ties (bf16 scores tie often), entries that are out already, and even rows: rank by rank as sorting would have it."""
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 0.5, 3.0, 30.0):
        logits = (torch.randn(40, 97, generator=generator) * spread).bfloat16().float()
        logits[:, ::7] = -torch.inf
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        outside = torch.cat([torch.zeros(40, 1), share.cumsum(-1)[:, :-1]], -1) >= top_p
        wanted = logits.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
        assert torch.equal(keep_best(logits, 0, top_p), wanted)
