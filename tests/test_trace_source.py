"""A recorded run as a source of gradient steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_rows import START, described, row, write

import gradscope
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientStep
from gradscope.sources import open_source
from gradscope.sources.traces import RecordedTrace
from gradscope.trace.schema import LintFinding
from gradscope.trace.writer import TraceWriter

SHAPES = {"actor.weight": (2, 3), "actor.bias": (3,), "critic.weight": (4,)}
GROUPS = {"actor": ["actor.weight", "actor.bias"], "critic": ["critic.weight"]}
RANDOM = np.random.default_rng(11)
GRADIENTS = [[RANDOM.normal(size=shape) for shape in SHAPES.values()] for _ in range(30)]


def a_run(directory: Path, numbers: range = range(30), **fields: Any) -> Path:
    """Every 10th step with tensors' spectra; the actor is clipped at 0.5, later at 0.25."""
    rows = []
    for place, number in enumerate(numbers):
        spectra = "all" if place % 10 == 0 else "group"
        weight, bias, critic = GRADIENTS[place]
        limit = 0.5 if place < 20 else 0.25
        norm = float(np.sqrt((weight**2).sum() + (bias**2).sum()))
        rows.append(
            row(
                number, [weight, bias], max_norm=limit, norm_type=2.0, returned_norm=norm, stepped=True, spectra=spectra
            )
        )
        rows.append(row(number, [critic], group=1, stepped=place != 3, spectra=spectra))
    return write(directory, described(SHAPES, GROUPS, **fields), rows, flush_every=7)


def steps_of(source: Any, steps: range | None = None) -> list[GradientStep]:
    return list(source.read_steps(range(source.info.steps) if steps is None else steps))


def test_what_it_tells_of_itself(tmp_path: Path) -> None:
    source = open_source(a_run(tmp_path / "run.gradscope", framework="SB3 PPO"))
    assert (source.info.kind, source.info.format, source.info.steps) == ("trace", "recorded SB3 PPO run", 30)
    assert [(t.name, t.shape, t.dtype) for t in source.tensors] == [(n, s, "float32") for n, s in SHAPES.items()]
    assert [(g.name, list(g.tensors), g.max_norm) for g in source.groups] == [
        ("actor", GROUPS["actor"], 0.25),
        ("critic", GROUPS["critic"], None),
    ]
    assert source.notes == source.findings == ()


def test_steps_hold_what_was_recorded(tmp_path: Path) -> None:
    for place, step in enumerate(steps_of(open_source(a_run(tmp_path / "run.gradscope")))):
        gradients = GRADIENTS[place]
        assert step.index == place
        np.testing.assert_allclose(step.sum_squares, [(g**2).sum() for g in gradients], rtol=1e-14)
        np.testing.assert_array_equal(step.max_abs, [np.abs(g).max() for g in gradients])
        assert step.recorded is not None
        assert step.recorded.time == START + place
        assert step.label == time.strftime("%H:%M:%S", time.localtime(START + place))
        assert step.recorded.max_norm[0] == (0.5 if place < 20 else 0.25)
        assert math.isnan(step.recorded.max_norm[1])
        assert step.recorded.returned_norm[0] == pytest.approx(math.sqrt(step.sum_squares[:2].sum()))
        assert step.recorded.stepped.tolist() == [1, 0 if place == 3 else 1]
        assert len(step.spectra) == (3 if place % 10 == 0 else 0)
        for spectrum, squares in zip(
            step.group_spectra, [step.sum_squares[:2].sum(), step.sum_squares[2]], strict=True
        ):
            assert spectrum is not None
            assert spectrum.norm == pytest.approx(math.sqrt(squares))
        for spectrum, gradient in zip(step.spectra, gradients, strict=False):
            assert spectrum is not None
            assert (spectrum.numel, spectrum.max_abs) == (gradient.size, np.abs(gradient).max())


def test_any_range_of_steps_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.trace.merging.MERGED_ENTRIES", 12)
    monkeypatch.setattr("gradscope.trace.stream.BLOCK_BYTES", 6000)
    source = open_source(a_run(tmp_path / "run.gradscope"))
    whole = steps_of(source)
    for places in (range(0), range(7, 8), range(5, 25), range(1, 30, 7), range(29, 30)):
        read = steps_of(source, places)
        assert [step.index for step in read] == list(places)
        for place, step in zip(places, read, strict=True):
            np.testing.assert_array_equal(step.sum_squares, whole[place].sum_squares)
            assert step.group_spectra[1].count.tolist() == whole[place].group_spectra[1].count.tolist()  # type: ignore[union-attr]


def test_steps_keep_their_number(tmp_path: Path) -> None:
    source = open_source(a_run(tmp_path / "run.gradscope", range(100, 400, 10), every=10, start=100))
    assert isinstance(source, RecordedTrace)
    assert source.info.steps == 30
    assert source.step_numbers.tolist() == list(range(100, 400, 10))
    assert [step.index for step in steps_of(source, range(28, 30))] == [380, 390]
    shown = gradscope.simulate(source, ["norm:0.5"], steps="-5:")
    assert shown.steps == 5
    assert shown.suggested_max_norm["steps"] == (350, 390)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = open_source(a_run(tmp_path / "run.gradscope"))
    list(source.read_steps(range(3, 9), lambda done, total: told.append((done, total))))
    assert told[-1][0] == told[-1][1] > 0


def test_a_tensor_without_a_gradient_counts_as_zeros(tmp_path: Path) -> None:
    rows = [row(0, [np.ones((2, 3)), None]), row(0, [np.ones(4)], group=1), row(1, [np.ones((2, 3)), np.ones(3)])]
    first, second = steps_of(open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)))
    assert first.sum_squares.tolist() == [6.0, 0.0, 4.0]
    assert first.zeros.tolist() == [0, 3, 0]
    assert second.zeros.tolist() == [0, 0, 4]
    assert second.group_spectra[1] is None
    assert second.recorded is not None and second.recorded.stepped.tolist() == [-1, -1]


def test_nan_and_inf_are_counted(tmp_path: Path) -> None:
    rows = [row(0, [np.array([[np.nan, 1, 2], [np.inf, 0, 0]]), np.ones(3)], returned_norm=math.nan)]
    (step,) = steps_of(open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)))
    assert (step.nan.tolist(), step.inf.tolist(), step.zeros.tolist()) == ([1, 0], [1, 0], [2, 0])
    assert step.sum_squares.tolist() == [5.0, 3.0]
    assert not step.finite


def test_a_loss_scale_is_divided_out(tmp_path: Path) -> None:
    scale = 1024.0
    scaled = [np.full((2, 3), 2.0) * scale, np.full(3, 1.0) * scale]
    rows = [row(0, scaled, grad_scale=scale, max_norm=512.0, returned_norm=math.sqrt(27.0) * scale, spectra="all")]
    (step,) = steps_of(open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)))
    assert step.sum_squares.tolist() == [24.0, 3.0]
    assert step.max_abs.tolist() == [2.0, 1.0]
    assert step.recorded is not None
    assert step.recorded.returned_norm[0] == pytest.approx(math.sqrt(27.0))
    assert step.recorded.max_norm[0] == 0.5
    spectrum = step.group_spectra[0]
    assert spectrum is not None
    assert spectrum.norm == pytest.approx(math.sqrt(27.0))
    assert spectrum.lower.min() <= 1.0 <= spectrum.upper.min()


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan])
def test_a_loss_scale_that_nothing_can_be_divided_by(tmp_path: Path, scale: float) -> None:
    rows = [row(0, [np.full((2, 3), np.inf), np.ones(3)], grad_scale=scale, max_norm=0.5, spectra="all")]
    (step,) = steps_of(open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)))
    assert step.sum_squares.tolist() == [0.0, 3.0]
    assert step.inf.tolist() == [6, 0]
    assert step.group_spectra[0] is not None


def test_weight_and_update_norms(tmp_path: Path) -> None:
    norms = {"weight_norm": np.array([10.0, 2.0]), "update_norm": np.array([0.1, np.nan])}
    rows = [row(0, [np.ones((2, 3)), np.ones(3)], **norms), row(1, [np.ones((2, 3)), np.ones(3)])]
    first, second = steps_of(open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)))
    assert first.recorded is not None and second.recorded is not None
    assert first.recorded.weight_norm is not None and first.recorded.update_norm is not None
    assert first.recorded.weight_norm.tolist() == [10.0, 2.0]
    np.testing.assert_array_equal(first.recorded.update_norm, [0.1, np.nan])
    assert second.recorded.weight_norm is None


def test_norms_alone(tmp_path: Path) -> None:
    rows = [row(step, GRADIENTS[step][:2], spectra="none") for step in range(5)]
    source = open_source(write(tmp_path / "run.gradscope", described(SHAPES, GROUPS, detail="norms"), rows))
    assert all(len(step.spectra) == len(step.group_spectra) == 0 for step in steps_of(source))
    assert gradscope.simulate(source, ["norm:0.5"]).steps == 5
    with pytest.raises(GradscopeError, match="norms only"):
        gradscope.simulate(source, ["value:0.5"])


def test_what_was_found_while_recording_is_told(tmp_path: Path) -> None:
    fields = {"findings": [LintFinding("twice", "train.py:3 clips twice.")], "notes": ["The loss was scaled."]}
    directory = a_run(tmp_path / "run.gradscope", **fields)
    tree = json.loads((directory / "trace.json").read_text())
    tree["groups"][1]["after_clipping"] = "DeepSpeed"
    (directory / "trace.json").write_text(json.dumps(tree))
    source = open_source(directory)
    assert source.findings == ("train.py:3 clips twice.",)
    assert source.notes == (
        "The loss was scaled.",
        "DeepSpeed clips inside its own optimizer: the gradients of critic are those after clipping.",
    )


def test_a_run_that_is_still_recorded(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "run.gradscope", described(SHAPES, GROUPS, ended=None), flush_seconds=1e6)
    for step in range(3):
        writer.append(row(step, GRADIENTS[step][:2]))
        writer.append(row(step, GRADIENTS[step][2:], group=1))
    writer.append(row(3, GRADIENTS[3][:2]))
    writer.flush()
    source = open_source(tmp_path / "run.gradscope")
    # Of step 3 the critic is not there yet.
    assert source.info.steps == 3
    assert source.notes == ("This run is still being recorded: these are the steps so far.",)
    writer.append(row(3, GRADIENTS[3][2:], group=1))
    writer.close()
    assert open_source(tmp_path / "run.gradscope").info.steps == 4


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    directory = a_run(tmp_path / "run.gradscope", ended=None)
    path = directory / "rank-00000.arrows"
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, (START, START))
    source = open_source(directory)
    assert "The recording was cut off: these are the steps up to then." in source.notes
    assert any(note.startswith("rank-00000.arrows ends in ") and "unfinished batch" in note for note in source.notes)
    assert 20 < source.info.steps < 30


@pytest.mark.parametrize("named", ["", "trace.json", "rank-00000.arrows"])
def test_its_files_stand_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    directory = a_run(tmp_path / "run")
    assert open_source(directory / named).info.steps == 30
    monkeypatch.chdir(directory)
    assert open_source(named or ".").info.steps == 30


def test_the_trace_of_a_profiler_is_none(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    np.savez(tmp_path / "step0.npz", w=np.ones(3))
    assert open_source(tmp_path / "step0.npz").info.kind == "gradients"
    with pytest.raises(GradscopeError) as caught:
        open_source(tmp_path / "trace.json")
    assert "gradscope trace" not in str(caught.value)


def test_it_holds_no_weights(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="holds no weights"):
        open_source(a_run(tmp_path / "run.gradscope"), as_="weights")


def test_a_run_without_a_step(tmp_path: Path) -> None:
    write(tmp_path / "ended.gradscope", described(SHAPES, GROUPS), [])
    with pytest.raises(GradscopeError, match=r"holds no steps$"):
        open_source(tmp_path / "ended.gradscope")
    write(tmp_path / "begun.gradscope", described(SHAPES, GROUPS, ended=None), [])
    with pytest.raises(GradscopeError, match="holds no steps yet"):
        open_source(tmp_path / "begun.gradscope")


def test_a_file_that_only_bears_the_name(tmp_path: Path) -> None:
    (tmp_path / "run.gradscope").mkdir()
    (tmp_path / "run.gradscope" / "notes.txt").write_text("mine")
    with pytest.raises(GradscopeError, match="is no complete gradscope trace"):
        open_source(tmp_path / "run.gradscope")


def test_no_torch_is_needed(tmp_path: Path) -> None:
    directory = a_run(tmp_path / "run.gradscope")
    script = (
        "import sys, gradscope; from pathlib import Path\n"
        f"gradscope.simulate({str(directory)!r}, ['norm:0.5', 'value:0.1']); gradscope.inspect({str(directory)!r})\n"
        "print([name for name in ('torch', 'pyarrow.compute', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"every": 7}, "One update in 7 was recorded."),
        ({"every": 7, "start": 2000}, "One update in 7 was recorded, from update 2,000 on."),
        ({"start": 2000}, "Recorded from update 2,000 on."),
    ],
)
def test_what_is_only_a_part_of_a_run_says_so(tmp_path: Path, fields: dict[str, Any], note: str) -> None:
    assert note in open_source(a_run(tmp_path / "run.gradscope", **fields)).notes
