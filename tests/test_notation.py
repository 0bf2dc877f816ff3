"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.notation import angle, names, number, percent, setting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (21.2899, "21.3"),
        (0.444444, "0.444"),
        (9.996, "10.0"),
        (12345.6, "12,346"),
        (0.00001234, "1.23e-05"),
        (1.9e19, "1.90e+19"),
        (-0.25, "-0.250"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(min_value=-1.7e308, max_value=1.7e308))
def test_number_is_short_and_right_to_its_last_digit(value: float) -> None:
    text = number(value)
    assert len(text) <= 10
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=5.1e-3, abs_tol=0)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.25, "25.0 %"),
        (0.294, "29.4 %"),
        (0.997, "99.7 %"),
        (0.9998, "99.98 %"),
        (1e-9, "< 0.01 %"),
        (0.003, "0.3 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@given(st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True))
def test_percent_never_rounds_some_to_none_or_to_all(share: float) -> None:
    assert percent(share) not in ("0 %", "0.0 %", "0.00 %", "100 %", "100.0 %", "100.00 %")


@pytest.mark.parametrize(
    ("share", "up", "down"),
    [
        (0.29492, "29.5 %", "29.4 %"),
        (0.1, "10.0 %", "10.0 %"),
        (0.3, "30.0 %", "30.0 %"),
        (0.99921, "99.93 %", "99.9 %"),
        (0.999999, "100 %", "> 99.99 %"),
        (1e-9, "< 0.01 %", "0 %"),
        (0.0006, "0.1 %", "0.06 %"),
        (0.0, "0 %", "0 %"),
        (1.0, "100 %", "100 %"),
    ],
)
def test_bounds_stay_bounds(share: float, up: str, down: str) -> None:
    assert (percent(share, "up"), percent(share, "down")) == (up, down)


@given(st.floats(0, 1))
def test_a_bound_is_never_rounded_past_the_truth(share: float) -> None:
    up, down = (percent(share, towards).strip("<> %") for towards in ("up", "down"))
    assert float(down) * (1 - 1e-15) <= 100 * share <= float(up) * (1 + 1e-15)


def test_setting_is_what_was_typed() -> None:
    assert [setting(0.5), setting(10.0), setting(1e-5), setting(0.123456789)] == ["0.5", "10", "1e-05", "0.123456789"]


def test_angle_and_names() -> None:
    assert [angle(0.0), angle(10.73704)] == ["0°", "10.7°"]
    assert names(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert names(["a", "b"]) == "a, b"
