"""Baselines: what is written comes back, and no file of a stranger's does harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope.errors import GradscopeError
from gradscope.health import baselines
from gradscope.health.baselines import read_baseline, save_baseline
from gradscope.health.evidence import Evidence
from gradscope.health.run_courses import RunCourses
from tests.in_memory_source import InMemorySource, RecordedSource


def evidence(seed: int = 0, layers: int = 3, **options: Any) -> Evidence:
    generator = np.random.default_rng(seed)
    steps = [{f"l{k}.weight": generator.standard_normal(50) for k in range(layers)} for _ in range(100)]
    updates = {f"l{k}.weight": (1.0, 0.01) for k in range(layers)}
    return Evidence.gather(RecordedSource(steps, updates=updates, **options))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    runs = [evidence(seed, limits=2.0) for seed in range(3)]
    save_baseline(tmp_path / "b.json", runs)
    read = read_baseline(tmp_path / "b.json")
    assert len(read.runs) == 3
    for run, saved in zip(read.runs, runs, strict=True):
        expected = RunCourses.of(saved)
        assert expected is not None
        assert (run.path, run.kind, run.steps, run.clipping) == (
            expected.path,
            expected.kind,
            expected.steps,
            expected.clipping,
        )
        assert run.clipping.max_norms == {"all": 2.0}
        assert list(run.layers) == ["l0", "l1", "l2"]
        for name, layer in run.layers.items():
            assert layer.numel == 50
            assert set(layer.courses) == set(expected.layers[name].courses)
            for quantity, course in layer.courses.items():
                assert course.means == pytest.approx(
                    expected.layers[name].courses[quantity].means, abs=1e-6, nan_ok=True
                )
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_nothing_is_written_of_what_makes_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="one baseline is of one model"):
        save_baseline(tmp_path / "b.json", [evidence(), evidence(layers=2)])
    with pytest.raises(GradscopeError, match=r"is the run of .* again"):
        save_baseline(tmp_path / "b.json", [evidence(), evidence()])
    with pytest.raises(GradscopeError, match="1 to 100 runs"):
        save_baseline(tmp_path / "b.json", [])
    with pytest.raises(GradscopeError, match="no such file"):
        save_baseline(tmp_path / "missing" / "b.json", [evidence()])
    assert not list(tmp_path.iterdir())


def test_a_run_of_one_layer_that_is_never_finite_is_saved(tmp_path: Path) -> None:
    save_baseline(tmp_path / "b.json", [Evidence.gather(InMemorySource([{"a.w": np.array([np.nan])}] * 20))])
    assert np.isnan(read_baseline(tmp_path / "b.json").runs[0].layers["a"].silent)


BROKEN: dict[str, Any] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "deep": b"[" * 200_000,
    "nan": b'{"schema": NaN}',
    "long number": b'{"schema": ' + b"9" * 10_000 + b"}",
    "list": b"[]",
    "other": b'{"schema": "else"}',
    "later": b'{"schema": "gradscope.baseline/9"}',
    "no runs": {"schema": baselines.SCHEMA, "runs": []},
    "runs of numbers": {"schema": baselines.SCHEMA, "runs": [1]},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_baseline_is_one_line(tmp_path: Path, name: str) -> None:
    content = BROKEN[name]
    (tmp_path / "b.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(GradscopeError) as caught:
        read_baseline(tmp_path / "b.json")
    assert re.match(r".*b\.json: is no baseline", str(caught.value))
    assert "\n" not in str(caught.value)


# Where a baseline is changed, and to what.
DAMAGE: list[tuple[tuple[Any, ...], Any]] = [
    (("runs", 0, "steps"), -1),
    (("runs", 0, "steps"), True),
    (("runs", 0, "steps"), 1e400),
    (("runs", 0, "path"), None),
    (("runs", 0, "layers"), []),
    (("runs", 0, "layers", "l0"), 3),
    (("runs", 0, "layers", "l0", "numel"), 1.5),
    (("runs", 0, "layers", "l0", "courses"), None),
    (("runs", 0, "layers", "l0", "courses", "norm"), []),
    (("runs", 0, "layers", "l0", "courses", "norm", "means"), [0.0] * 3),
    (("runs", 0, "layers", "l0", "courses", "norm", "means"), [0.0] * 128),
    (("runs", 0, "layers", "l0", "courses", "norm", "means", 0), "1"),
    (("runs", 0, "layers", "l0", "courses", "norm", "means", 0), 10**400),
    (("runs", 0, "layers", "l0", "courses", "norm", "means"), [1e300, -1e300] * 32),
    (("runs", 0, "clip_rate"), "much"),
    (("runs", 0, "clip_rate_ci95"), [1.0]),
    (("runs", 0, "max_norms"), {"all": None}),
]


@pytest.mark.parametrize(("where", "value"), DAMAGE)
def test_a_damaged_baseline_is_one_line(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    save_baseline(tmp_path / "b.json", [evidence(limits=2.0)])
    tree = json.loads((tmp_path / "b.json").read_text())
    place = tree
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (tmp_path / "b.json").write_text(json.dumps(tree))
    with pytest.raises(GradscopeError, match="is no baseline"):
        read_baseline(tmp_path / "b.json")


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradscopeError, match="no such file"):
        read_baseline(tmp_path / "b.json")
    with pytest.raises(GradscopeError, match="is a directory"):
        read_baseline(tmp_path)
    monkeypatch.setattr(baselines, "MOST_BYTES", 1 << 20)
    (tmp_path / "b.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(GradscopeError, match="too large"):
        read_baseline(tmp_path / "b.json")
