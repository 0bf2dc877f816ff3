"""``--policy NAME:ARGUMENT,…``: what is read, and what is refused in words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.clipping import POLICIES, parse_policy
from gradscope.errors import GradscopeError

LABELS = [
    "norm:0.5",
    "joint-norm:1",
    "per-layer-norm:2.25",
    "per-tensor-norm:1e-05",
    "value:0.1",
    "block-rms:0.001",
    "agc:0.01",
    "agc:0.01,0.001",
    "autoclip:10",
    "zclip:2.5",
    "zclip:2.5,0.97",
    "skip:100",
]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_the_notation_it_was_read_from(label: str) -> None:
    policy = parse_policy(label)
    assert policy.label == label
    assert parse_policy(policy.label) == policy


def test_the_catalogue_holds_every_policy_with_its_words() -> None:
    assert {label.split(":")[0] for label in LABELS} == {rule.name for rule in POLICIES}
    assert all(rule.rule and rule.as_in for rule in POLICIES)
    assert next(rule.usage for rule in POLICIES if rule.name == "agc") == "agc:LAMBDA[,EPS]"


@given(st.floats(min_value=5e-324, max_value=1.7e308, allow_subnormal=True))
def test_any_positive_threshold_survives(max_norm: float) -> None:
    policy = parse_policy(f"norm:{max_norm!r}")
    assert policy.threshold == max_norm
    assert parse_policy(policy.label).threshold == max_norm


@pytest.mark.parametrize(
    ("label", "threshold"), [("norm:0.5", 0.5), ("value:2", 2.0), ("autoclip:10", None), ("zclip:2.5", None)]
)
def test_the_threshold_is_a_number_where_it_stands_still(label: str, threshold: float | None) -> None:
    assert parse_policy(label).threshold == threshold


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("norm", "takes 1 number, got 0"),
        ("norm:", "takes 1 number, got 0"),
        ("norm:1,2", "takes 1 number, got 2"),
        ("agc:1,2,3", "takes 1 to 2 numbers, got 3"),
        ("norm:x", "'x' is not a number"),
        ("agc:0.01,", "'' is not a number"),
        ("norm:0", "max_norm must be above 0"),
        ("norm:-1", "max_norm must be above 0"),
        ("norm:nan", "max_norm must be a finite number"),
        ("norm:inf", "max_norm must be a finite number"),
        ("value:0", "clip_value must be above 0"),
        ("autoclip:0", "percentile must be above 0"),
        ("autoclip:101", "percentile must be at most 100"),
        ("zclip:2.5,1", "alpha must be at most 1"),
        ("zclip:2.5,0", "alpha must be above 0"),
        ("agc:0.01,-1", "eps must be at least 0"),
        ("nrom:1", "no policy is called 'nrom'"),
        ("", "no policy is called ''"),
    ],
)
def test_unusable_notation_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(GradscopeError) as refused:
        parse_policy(text)
    assert refused.value.what == f"--policy {text}"
    assert refused.value.why.endswith(why)


@pytest.mark.parametrize(
    ("text", "nearest"), [("nrom:1", "norm"), ("block_rms:1", "block-rms"), ("auto-clip:5", "autoclip")]
)
def test_the_nearest_name_is_offered(text: str, nearest: str) -> None:
    with pytest.raises(GradscopeError) as refused:
        parse_policy(text)
    assert refused.value.hint == f"did you mean {nearest}?"


def test_a_name_near_nothing_gets_the_whole_list() -> None:
    with pytest.raises(GradscopeError) as refused:
        parse_policy("xyzzy:1")
    assert refused.value.hint is not None
    assert all(rule.name in refused.value.hint for rule in POLICIES)


def test_policies_are_listed_and_checked_without_numpy() -> None:
    code = (
        "import sys; from gradscope.clipping import POLICIES, check_notation;"
        "assert check_notation('agc:0.01,0.001') == ('agc', (0.01, 0.001));"
        "print(len(POLICIES), 'numpy' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(len(POLICIES)), "False"]
