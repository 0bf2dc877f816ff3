"""The first step read in the background is the step itself, is read only when it is wanted, and can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gradscope.commands.reading import reading
from gradscope.errors import GradscopeError
from gradscope.gradients import Progress
from gradscope.sources import dumps, open_source
from gradscope.sources.read_ahead import ReadAhead


def test_a_step_read_ahead_is_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "WORTH_A_THREAD", 1)
    for step in range(3):
        np.savez(tmp_path / f"step_{step}.npz", w=np.full(5, step + 1.0, np.float32))
    source = open_source(str(tmp_path))
    with source.reading_ahead():
        ahead = [step.sum_squares.tolist() for step in source.read_steps(range(3))]
    assert ahead == [[5.0], [20.0], [45.0]]
    assert ahead == [step.sum_squares.tolist() for step in source.read_steps(range(3))]


def test_what_fails_ahead_is_raised_where_the_step_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "WORTH_A_THREAD", 1)
    np.savez(tmp_path / "g.npz", w=np.ones(5000, np.float32))
    source = open_source(str(tmp_path / "g.npz"))
    (tmp_path / "g.npz").write_bytes(b"PK")
    with source.reading_ahead(), pytest.raises(GradscopeError):
        list(source.read_steps(range(1)))


@pytest.mark.parametrize("from_start", [True, False])
def test_nothing_is_read_ahead_of_a_reading_that_starts_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_start: bool
) -> None:
    np.save(tmp_path / "g.npy", np.ones(3))
    source = open_source(str(tmp_path / "g.npy"))
    entered: list[bool] = []

    @contextmanager
    def noted(progress: Progress | None = None) -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(source, "reading_ahead", noted)
    with reading(source, quiet=True, from_start=from_start):
        pass
    assert bool(entered) is from_start


def test_a_reading_that_nobody_wants_stops_at_its_next_progress() -> None:
    started, told = threading.Event(), []

    def read(progress: Progress) -> None:
        while True:
            started.set()
            progress(1, 2)

    ahead = ReadAhead(read, lambda done, total: told.append(done))
    assert started.wait(10)
    ahead.stop()
    with pytest.raises(Exception, match=r"^$"):
        ahead.result()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
