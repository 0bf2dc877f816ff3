"""Several values after one option; a path that follows stays a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.commands.several_values import TAKES_SEVERAL, repeat_options


def rewritten(line: str) -> str:
    return " ".join(repeat_options(line.split(), TAKES_SEVERAL))


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("--max-norm 0.5 grads/", "--max-norm 0.5 grads/"),
        ("--max-norm 0.5 1 5 grads/", "--max-norm 0.5 --max-norm=1 --max-norm=5 grads/"),
        ("a.npz --max-norm 0.5 1 b.npz", "a.npz --max-norm 0.5 --max-norm=1 b.npz"),
        ("--max-norm=0.5 1 5", "--max-norm=0.5 --max-norm=1 --max-norm=5"),
        ("--max-grad-norm 1e-3 .5 -1 nan inf", "--max-grad-norm 1e-3 --max-grad-norm=.5 --max-grad-norm=-1 "
         "--max-grad-norm=nan --max-grad-norm=inf"),
        ("--max-norm abc 1", "--max-norm abc --max-norm=1"),
        ("--max-norm 0.5 --clip-value 1 2 x", "--max-norm 0.5 --clip-value 1 --clip-value=2 x"),
        ("--max-norm 0.5 ./5", "--max-norm 0.5 ./5"),
        ("--policy norm:0.5 valeu:1 skip grads", "--policy norm:0.5 --policy=valeu:1 --policy=skip grads"),
        ("--policy norm:0.5 s3://bucket/x", "--policy norm:0.5 s3://bucket/x"),
        (r"--policy norm:0.5 C:\x", r"--policy norm:0.5 C:\x"),
        ("--groups actor=*pi* critic=*vf* grads", "--groups actor=*pi* --groups=critic=*vf* grads"),
        ("--top 3 5", "--top 3 5"),
        ("--max-norm 0.5 -- 1 2", "--max-norm 0.5 -- 1 2"),
        ("--max-norm", "--max-norm"),
        ("--steps -1000: --max-norm 1", "--steps -1000: --max-norm 1"),
    ],
)  # fmt: skip
def test_rewriting(typed: str, parsed: str) -> None:
    assert rewritten(typed) == parsed


def test_an_existing_file_is_a_path_even_if_it_looks_like_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=0.1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rewritten("--groups actor=*pi* lr=0.1") == "--groups actor=*pi* lr=0.1"


@given(st.lists(st.sampled_from(["--max-norm", "0.5", "1", "x.pt", "-q", "--top", "--policy", "norm:1", "--"])))
def test_nothing_is_lost_and_nothing_invented(arguments: list[str]) -> None:
    out = repeat_options(arguments, TAKES_SEVERAL)
    assert len(out) == len(arguments)
    for before, after in zip(arguments, out, strict=True):
        assert after == before or (after.startswith("--") and after.endswith(f"={before}"))
