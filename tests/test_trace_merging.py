"""Ranks merged when read: shards add, replicas count once, whatever the split and the order."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trace_rows import described, row, write

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientStep
from gradscope.inspection import inspect
from gradscope.sources import open_source
from gradscope.sources.traces import RecordedTrace
from gradscope.trace.schema import TraceMetadata

Array = NDArray[np.float64]


def rank_metadata(
    rank: int,
    world: int,
    shapes: dict[str, tuple[int, ...]],
    placements: dict[str, tuple[str, ...]] | None = None,
    mesh: tuple[int, ...] | None = None,
    **fields: Any,
) -> TraceMetadata:
    """Metadata of a rank at its place in a mesh of ``mesh`` (one dimension of ``world`` ranks without it)."""
    metadata = described(shapes, rank=rank, world_size=world, **fields)
    mesh = mesh or (world,)
    for tensor in metadata.tensors:
        tensor.placements = (placements or {}).get(tensor.name, ())
        if tensor.placements:
            tensor.mesh_shape = mesh
            tensor.mesh_coordinate = tuple(int(c) for c in np.unravel_index(rank, mesh))
    return metadata


def opened(directory: Path) -> RecordedTrace:
    source = open_source(directory)
    assert isinstance(source, RecordedTrace)
    return source


def steps_of(source: RecordedTrace) -> list[GradientStep]:
    return list(source.read_steps(range(source.info.steps)))


def write_shards(directory: Path, steps: Sequence[Array], cuts: Sequence[int], **row_fields: Any) -> None:
    """One tensor, the parts between ``cuts`` at one rank each."""
    edges = [0, *cuts, len(steps[0])]
    world = len(edges) - 1
    for rank, (start, stop) in enumerate(pairwise(edges)):
        metadata = rank_metadata(rank, world, {"w": (len(steps[0]),)}, {"w": ("S(0)",)})
        write(directory, metadata, [row(i, [g[start:stop]], spectra="all", **row_fields) for i, g in enumerate(steps)])


gradients = st.lists(
    st.floats(-1e6, 1e6).map(lambda x: 0.0 if abs(x) < 1e-12 else x) | st.sampled_from([0.0, np.nan, np.inf]),
    min_size=1,
    max_size=12,
).map(np.array)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gradient=gradients, data=st.data())
def test_a_group_split_over_ranks_reads_as_the_unsplit_one(
    tmp_path: Path, gradient: Array, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(gradient)), max_size=4)))
    for name, where in (("whole", []), ("split", cuts)):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        write_shards(tmp_path / name, [gradient, 2 * gradient], where)
    finite = gradient[np.isfinite(gradient)]
    for whole, split in zip(steps_of(opened(tmp_path / "whole")), steps_of(opened(tmp_path / "split")), strict=True):
        factor = whole.index + 1
        assert split.sum_squares[0] == pytest.approx(float(((factor * finite) ** 2).sum()), rel=1e-14)
        for name in ("max_abs", "zeros", "nan", "inf"):
            np.testing.assert_array_equal(getattr(split, name), getattr(whole, name))
        for one, other in ((whole.spectra[0], split.spectra[0]), (whole.group_spectra[0], split.group_spectra[0])):
            assert one is not None and other is not None
            np.testing.assert_array_equal(one.lower, other.lower)
            np.testing.assert_array_equal(one.count, other.count)
            np.testing.assert_allclose(one.sum_abs, other.sum_abs, rtol=1e-6)
            assert one.numel == other.numel == len(gradient)


def test_merged_spectra_answer_for_the_whole_gradient(tmp_path: Path) -> None:
    gradient = np.random.default_rng(5).normal(size=4000)
    write_shards(tmp_path / "run.gradscope", [gradient], [700, 2500])
    spectrum = steps_of(opened(tmp_path / "run.gradscope"))[0].group_spectra[0]
    assert spectrum is not None
    clipped = np.clip(gradient, -0.7, 0.7)
    angle = math.degrees(math.acos(gradient @ clipped / np.linalg.norm(gradient) / np.linalg.norm(clipped)))
    found, error = spectrum.value_clip(0.7).direction_change_deg()
    assert abs(found - angle) <= error <= 1.0


def test_copies_count_once(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path / "run.gradscope", rank_metadata(rank, 3, {"w": (2,)}), [row(0, [np.array([3.0, 4.0])])])
    source = opened(tmp_path / "run.gradscope")
    assert steps_of(source)[0].sum_squares.tolist() == [25.0]
    assert source.findings == ()
    assert source.notes == ()


def test_shards_of_copies(tmp_path: Path) -> None:
    """Hybrid sharding on a 2 × 2 mesh: dimension 0 holds copies, dimension 1 shards."""
    halves = [np.array([3.0]), np.array([4.0])]
    for rank in range(4):
        metadata = rank_metadata(rank, 4, {"w": (2,)}, {"w": ("R", "S(0)")}, (2, 2))
        write(tmp_path / "run.gradscope", metadata, [row(0, [halves[rank % 2]])])
    assert steps_of(opened(tmp_path / "run.gradscope"))[0].sum_squares.tolist() == [25.0]


def test_sharded_and_ordinary_tensors_in_one_group(tmp_path: Path) -> None:
    """Its own bins count the ordinary tensor at every rank: the group's spectrum then comes from its tensors."""
    for rank, half in enumerate(([3.0], [4.0])):
        metadata = rank_metadata(rank, 2, {"w": (2,), "b": (1,)}, {"w": ("S(0)",)})
        rows = [row(0, [np.array(half), np.array([12.0])], spectra="all"), row(1, [np.array(half), np.array([12.0])])]
        write(tmp_path / "run.gradscope", metadata, rows)
    first, second = steps_of(opened(tmp_path / "run.gradscope"))
    assert first.sum_squares.tolist() == second.sum_squares.tolist() == [25.0, 144.0]
    spectrum = first.group_spectra[0]
    assert spectrum is not None
    assert (spectrum.numel, spectrum.norm) == (3, pytest.approx(13.0))
    assert second.group_spectra[0] is None


def test_different_tensors_at_different_ranks(tmp_path: Path) -> None:
    for rank, name in enumerate(("stage0.w", "stage1.w")):
        write(tmp_path / "run.gradscope", rank_metadata(rank, 2, {name: (1,)}), [row(0, [np.array([rank + 1.0])])])
    source = opened(tmp_path / "run.gradscope")
    assert [tensor.name for tensor in source.tensors] == ["stage0.w", "stage1.w"]
    assert source.groups[0].tensors == ("stage0.w", "stage1.w")
    assert steps_of(source)[0].sum_squares.tolist() == [1.0, 4.0]


def test_a_partial_gradient_is_left_out_in_words(tmp_path: Path) -> None:
    for rank in range(2):
        metadata = rank_metadata(rank, 2, {"w": (2,), "b": (1,)}, {"b": ("P",)})
        write(tmp_path / "run.gradscope", metadata, [row(0, [np.array([3.0, 4.0]), np.array([9.0])])])
    source = opened(tmp_path / "run.gradscope")
    assert [tensor.name for tensor in source.tensors] == ["w"]
    assert any("Left out: b, of whose gradient each rank holds a summand" in note for note in source.notes)


@pytest.mark.parametrize(("norm_type", "whole"), [(2.0, 5.0), (1.0, 7.0), (math.inf, 4.0), (None, 5.0)])
def test_partial_returned_norms_merge(tmp_path: Path, norm_type: float | None, whole: float) -> None:
    for rank, part in enumerate((3.0, 4.0)):
        metadata = rank_metadata(rank, 2, {"w": (2,)}, {"w": ("S(0)",)})
        metadata.groups[0].returned_partial = True
        rows = [row(0, [np.array([part])], returned_norm=part, norm_type=norm_type), row(1, [np.array([part])])]
        write(tmp_path / "run.gradscope", metadata, rows)
    source = opened(tmp_path / "run.gradscope")
    recorded = [step.recorded for step in steps_of(source)]
    assert recorded[0] is not None and recorded[1] is not None
    assert recorded[0].returned_norm[0] == pytest.approx(whole)
    assert math.isnan(recorded[1].returned_norm[0])
    assert source.findings == ()


def test_ranks_that_recorded_different_gradients(tmp_path: Path) -> None:
    for rank in range(2):
        rows = [row(step, [np.array([1.0 + (rank if step >= 3 else 0)])]) for step in range(5)]
        write(tmp_path / "run.gradscope", rank_metadata(rank, 2, {"w": (1,)}), rows)
    (finding,) = opened(tmp_path / "run.gradscope").findings
    assert "different gradients of the same parameters" in finding
    assert "1 at rank 0, 2 at rank 1 in step 3, and likewise in 2 of 5 steps" in finding


def test_ranks_that_clip_by_different_norms(tmp_path: Path) -> None:
    for rank in range(2):
        metadata = rank_metadata(rank, 2, {"w": (2,)}, {"w": ("S(0)",)})
        write(tmp_path / "run.gradscope", metadata, [row(0, [np.array([1.0 + rank])], returned_norm=1.0 + rank)])
    (finding,) = opened(tmp_path / "run.gradscope").findings
    assert "clip by different norms: clip call returned 1 at rank 0, 2 at rank 1 in step 0" in finding


def test_steps_that_a_rank_lacks_are_left_out_in_words(tmp_path: Path) -> None:
    for rank, count in enumerate((5, 3)):
        metadata = rank_metadata(rank, 2, {"w": (2,)}, {"w": ("S(0)",)})
        write(tmp_path / "run.gradscope", metadata, [row(step, [np.array([1.0])]) for step in range(count)])
    source = opened(tmp_path / "run.gradscope")
    assert [step.index for step in steps_of(source)] == [0, 1, 2]
    assert "2 steps that not all ranks hold are left out." in source.notes


def test_missing_ranks_are_told(tmp_path: Path) -> None:
    metadata = rank_metadata(1, 4, {"w": (8,)}, {"w": ("S(0)",)})
    write(tmp_path / "run.gradscope", metadata, [row(0, [np.array([1.0, 2.0])])])
    assert "3 of 4 ranks are missing: the norms lack their shards." in opened(tmp_path / "run.gradscope").notes


def test_a_rank_of_another_run_is_left_out_in_words(tmp_path: Path) -> None:
    write(tmp_path / "run.gradscope", rank_metadata(0, 2, {"w": (1,)}, {"w": ("S(0)",)}), [row(0, [np.array([1.0])])])
    stray = rank_metadata(1, 2, {"w": (1,)}, {"w": ("S(0)",)}, run="another")
    write(tmp_path / "run.gradscope", stray, [row(0, [np.array([5.0])])])
    source = opened(tmp_path / "run.gradscope")
    assert steps_of(source)[0].sum_squares.tolist() == [1.0]
    assert "Rank 1 is of another run and left out." in source.notes


def test_a_rank_under_another_number_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run.gradscope", rank_metadata(0, 2, {"w": (1,)}), [row(0, [np.array([1.0])])])
    for name, copy in (("trace.json", "rank-00001.json"), ("rank-00000.arrows", "rank-00001.arrows")):
        shutil.copy(tmp_path / "run.gradscope" / name, tmp_path / "run.gradscope" / copy)
    with pytest.raises(GradscopeError, match="is that of rank 0"):
        opened(tmp_path / "run.gradscope")


def test_ranks_that_disagree_on_a_shape_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / "run.gradscope", rank_metadata(rank, 2, {"w": (1 + rank,)}), [row(0, [np.ones(1 + rank)])])
    with pytest.raises(GradscopeError, match="'w' has shape"):
        opened(tmp_path / "run.gradscope")


def test_a_rank_that_was_killed_before_its_first_word(tmp_path: Path) -> None:
    write(tmp_path / "run.gradscope", rank_metadata(0, 2, {"w": (1,)}), [row(0, [np.array([1.0])])])
    (tmp_path / "run.gradscope" / "rank-00001.arrows").touch()
    source = opened(tmp_path / "run.gradscope")
    assert "1 of 2 ranks are missing: those that are here hold the same gradients." in source.notes


def test_a_tensor_that_two_groups_clip_counts_once(tmp_path: Path) -> None:
    metadata = described({"a": (1,), "b": (1,)}, {"both": ["a", "b"], "again": ["b"]})
    first, clipped = row(0, [np.array([3.0]), np.array([4.0])]), row(0, [np.array([0.5])], group=1)
    (step,) = steps_of(opened(write(tmp_path / "run.gradscope", metadata, [first, clipped])))
    assert step.sum_squares.tolist() == [9.0, 16.0]
    again = step.group_spectra[1]
    assert again is not None
    assert again.norm == 0.5


def test_ranks_may_number_their_tensors_and_groups_differently(tmp_path: Path) -> None:
    for rank, names in enumerate((["a", "b"], ["b", "a"])):
        metadata = rank_metadata(rank, 2, dict.fromkeys(names, (2,)), dict.fromkeys(names, ("S(0)",)))
        metadata.groups = [type(metadata.groups[0])(f"of {name}", [i]) for i, name in enumerate(names)]
        rows = [row(0, [np.array([1.0 if name == "a" else 10.0])], group=i) for i, name in enumerate(names)]
        write(tmp_path / "run.gradscope", metadata, rows)
    source = opened(tmp_path / "run.gradscope")
    assert [(group.name, group.tensors) for group in source.groups] == [("of a", ("a",)), ("of b", ("b",))]
    assert steps_of(source)[0].sum_squares.tolist() == [2.0, 200.0]


def test_metadata_that_differs_from_what_is_recorded_so_far(tmp_path: Path) -> None:
    metadata = rank_metadata(0, 1, {"a": (1,), "later": (1,)})
    metadata.groups = [type(metadata.groups[0])("now", [0]), type(metadata.groups[0])("soon", [1])]
    source = opened(write(tmp_path / "run.gradscope", metadata, [row(0, [np.array([1.0])])]))
    assert [tensor.name for tensor in source.tensors] == ["a"]
    assert [group.name for group in source.groups] == ["now"]


def test_bins_that_mean_nothing_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = row(0, [np.ones(4)])
    assert bad.measurement.group_bins is not None
    bad.measurement.group_bins.code[:] = 16383
    # As if the stream had changed since its rows were checked.
    monkeypatch.setattr("gradscope.trace.rows.Rows.check", lambda rows, sizes: None)
    source = open_source(write(tmp_path / "run.gradscope", described({"a.weight": (4,)}), [bad]))
    (step,) = source.read_steps(range(1))
    with pytest.raises(GradscopeError, match=r"rank-00000\.arrows: is damaged: a bin code"):
        step.group_spectra[0]


@pytest.mark.parametrize("scale", [5e-324, 1e-300])
def test_a_loss_scale_that_makes_everything_huge_is_no_warning(tmp_path: Path, scale: float) -> None:
    rows = [
        row(step, [np.ones(4) * (1 + step)], max_norm=1.0, grad_scale=scale, returned_norm=2.0) for step in range(9)
    ]
    source = open_source(write(tmp_path / "run.gradscope", described({"a.weight": (4,)}), rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspection = inspect(source)
    assert inspection.gradients is not None and inspection.recorded is not None
    assert inspection.gradients.global_.l2_norm.max == math.inf
    assert inspection.recorded.overall.steps == 0
