"""Gradient dumps: names, order, agreement between steps, and the weights beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources import open_source
from gradscope.sources.formats import contents


def steps_of(source: GradientSource) -> list[Any]:
    return list(source.read_steps(range(source.info.steps)))


def names_of(source: GradientSource) -> list[str]:
    return [info.name for info in source.tensors]


def dump(path: Path, value: float = 1.0, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"a.weight": torch.full((2, 3), value), "a.bias": torch.full((3,), value)}, path)
    return path


def sequence(directory: Path, count: int = 12) -> Path:
    directory.mkdir(exist_ok=True)
    for number in range(count):
        dump(directory / f"step_{number}.safetensors", float(number))
    return directory


def test_a_directory_is_a_sequence_in_natural_order(tmp_path: Path) -> None:
    source = open_source(sequence(tmp_path / "grads"))
    assert (source.info.kind, source.info.steps, source.info.format) == (
        "gradients",
        12,
        "gradient dumps (safetensors)",
    )
    steps = steps_of(source)
    assert [step.label for step in steps] == [f"step_{number}.safetensors" for number in range(12)]
    assert [step.index for step in steps] == list(range(12))
    assert [float(step.sum_squares.sum()) for step in steps] == [9.0 * number**2 for number in range(12)]
    (group,) = source.groups
    assert (group.name, group.tensors, group.max_norm) == ("all", tuple(names_of(source)), None)


def test_globs_lists_and_directories_agree(tmp_path: Path) -> None:
    sequence(tmp_path / "grads")
    by_directory = open_source(tmp_path / "grads")
    by_glob = open_source(str(tmp_path / "grads" / "step_*.safetensors"))
    by_list = open_source([str(path) for path in (tmp_path / "grads").iterdir()])
    labels = [[step.label for step in steps_of(source)] for source in (by_directory, by_glob, by_list)]
    assert labels[0] == labels[1] == labels[2]
    assert by_list.info.path == str(tmp_path / "grads")


def test_steps_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence(tmp_path / "grads")
    opened: list[str] = []
    original = contents.FileRegion.whole

    def whole(path: Path) -> Any:
        opened.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(contents.FileRegion, "whole", whole)
    source = open_source(tmp_path / "grads")
    assert opened == ["step_0.safetensors"]
    (step,) = source.read_steps(range(7, 8))
    assert step.label == "step_7.safetensors"
    assert opened == ["step_0.safetensors", "step_7.safetensors"]


def test_progress_counts_all_steps(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = open_source(sequence(tmp_path / "grads", 3))
    list(source.read_steps(range(3), lambda done, total: told.append((done, total))))
    assert told[-1] == (3 * 36, 3 * 36)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_read_gives_a_tensor_whole(tmp_path: Path) -> None:
    weight = torch.randn(4, 5)
    source = open_source(dump(tmp_path / "g", w=weight, v=torch.ones(1)))
    (step,) = steps_of(source)
    np.testing.assert_array_equal(step.read(names_of(source).index("w")), weight.numpy())


def test_types_may_change_from_step_to_step(tmp_path: Path) -> None:
    dump(tmp_path / "step_1.safetensors", w=torch.ones(4))
    dump(tmp_path / "step_2.safetensors", w=torch.ones(4).bfloat16())
    assert [step.sum_squares.tolist() for step in steps_of(open_source(tmp_path))] == [[4.0], [4.0]]


def test_the_order_within_a_file_does_not_matter(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": torch.full((1,), 2.0)}, tmp_path / "step_1.pt")
    torch.save({"b": torch.full((1,), 2.0), "a": torch.ones(1)}, tmp_path / "step_2.pt")
    assert [step.max_abs.tolist() for step in steps_of(open_source(tmp_path))] == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"a": torch.ones(2), "c": torch.ones(1)},
            "step_2.safetensors: has a gradient 'c', which step_1.safetensors lacks",
        ),
        ({"a": torch.ones(2)}, "step_2.safetensors: lacks the gradient 'b', which step_1.safetensors has"),
        ({"a": torch.ones(2), "b": torch.ones(2, 1)}, r"step_2.safetensors: 'b' has shape \(2, 1\).*it has \(1, 2\)"),
        ({"a": torch.ones(2, dtype=torch.int32), "b": torch.ones(1, 2)}, "lacks the gradient 'a'"),
    ],
)
def test_steps_that_disagree(tmp_path: Path, second: dict[str, torch.Tensor], message: str) -> None:
    dump(tmp_path / "step_1.safetensors", a=torch.ones(2), b=torch.ones(1, 2))
    dump(tmp_path / "step_2.safetensors", **second)
    with pytest.raises(GradscopeError, match=message):
        steps_of(open_source(tmp_path))


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    sequence(tmp_path, 3)
    (tmp_path / "step_1.safetensors").write_bytes(b"nothing")
    with pytest.raises(GradscopeError, match=r"step_1\.safetensors"):
        steps_of(open_source(tmp_path))


# --- directories -----------------------------------------------------------------------------------------------------


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    sequence(tmp_path, 3)
    for name in ("README.md", ".hidden.safetensors", "log.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub.safetensors").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    source = open_source(tmp_path)
    assert source.info.steps == 3
    assert source.notes == ("Left out: other.pt.",)


def test_one_directory_of_dumps_below(tmp_path: Path) -> None:
    sequence(tmp_path / "gradients", 3)
    (tmp_path / "plots").mkdir()
    assert open_source(tmp_path).info.steps == 3


def test_one_directory_per_step(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        (tmp_path / f"step_{number}").mkdir()
        dump(tmp_path / f"step_{number}" / "grads.safetensors", float(number))
    source = open_source(tmp_path)
    assert [step.label for step in steps_of(source)] == ["step_1", "step_2", "step_10"]


@pytest.mark.parametrize(("names", "message"), [([], "it is empty"), (["a.txt", "b.csv"], r"only a.txt, b.csv\)")])
def test_a_directory_without_gradients_says_what_it_holds(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(GradscopeError, match=f"no gradient files.*{message}"):
        open_source(tmp_path)


def test_a_directory_of_zip_checkpoints_hints_at_one(tmp_path: Path) -> None:
    for number in (2, 10):
        (tmp_path / f"ppo_{number}_steps.zip").touch()
    with pytest.raises(GradscopeError, match="no gradient files") as caught:
        open_source(tmp_path)
    assert caught.value.hint is not None and "ppo_10_steps.zip" in caught.value.hint


def test_several_directories_of_dumps(tmp_path: Path) -> None:
    sequence(tmp_path / "run_1", 2)
    sequence(tmp_path / "run_2", 2)
    with pytest.raises(GradscopeError, match="run_1, run_2"):
        open_source(tmp_path)


# --- names -----------------------------------------------------------------------------------------------------------

G, W = torch.full((2,), 3.0), torch.full((2,), 5.0)
FORMS: dict[str, tuple[Any, list[str], bool]] = {
    "mapping": ({"a.w": G, "b": G}, ["a.w", "b"], False),
    "nested": ({"a": {"w": G, "b": [G, G]}}, ["a.w", "a.b.0", "a.b.1"], False),
    "suffix": ({"a.w.grad": G, "b.grad": G}, ["a.w", "b"], False),
    "suffix and weights": ({"a.w": W, "a.w.grad": G, "b": W, "b.grad": G}, ["a.w", "b"], True),
    "pairs": ({"a.w": {"param": W, "grad": G}, "b": {"param": W, "grad": G}}, ["a.w", "b"], True),
    "pairs of data": ({"a.w": {"data": W, "grad": G}}, ["a.w"], True),
    "pairs of weights": ({"a": {"weight": W, "grad": G}}, ["a"], True),
    "wrapped": ({"step": 5, "grads": {"a.w": G, "b": G}}, ["a.w", "b"], False),
    "wrapped with weights": ({"params": {"a.w": W}, "gradients": {"a.w": G}}, ["a.w"], True),
    "list": ([G, G], ["0", "1"], False),
    "tuple": ((G, G), ["0", "1"], False),
    "single": (G, ["gradient"], False),
    "with None": ({"a": G, "frozen": None}, ["a"], False),
    "integer keys": ({0: G, 1: G}, ["0", "1"], False),
    "with numbers": ({"a": G, "loss": 0.5, "name": "run"}, ["a"], False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_people_save(tmp_path: Path, form: str) -> None:
    value, names, has_weights = FORMS[form]
    torch.save(value, tmp_path / "g.pt")
    for source in (open_source(tmp_path / "g.pt"), open_source(value)):
        assert names_of(source) == names
        (step,) = steps_of(source)
        assert step.max_abs.tolist() == [3.0] * len(names)
        weights = source.weights()
        assert (weights is not None) == has_weights
        if weights is not None:
            assert [info.name for info in weights.tensors] == names
            assert weights.read(names[0]).tolist() == [5.0, 5.0]


def test_parameters_without_a_gradient_are_named(tmp_path: Path) -> None:
    torch.save({"a": G, "frozen": None}, tmp_path / "g.pt")
    assert open_source(tmp_path / "g.pt").skipped == ("frozen: None (no gradient)",)


def test_a_gradient_missing_in_one_step_counts_as_zero(tmp_path: Path) -> None:
    torch.save({"a": G, "head": G}, tmp_path / "step_1.pt")
    torch.save({"a": G, "head": None}, tmp_path / "step_2.pt")
    steps = steps_of(open_source(tmp_path))
    assert [step.sum_squares.tolist() for step in steps] == [[18.0, 18.0], [18.0, 0.0]]
    assert steps[1].zeros.tolist() == [0, 2]


def test_no_floating_tensor_at_all(tmp_path: Path) -> None:
    torch.save({"n": torch.tensor([1]), "c": torch.ones(1, dtype=torch.complex64), "x": 5}, tmp_path / "g.pt")
    with pytest.raises(GradscopeError, match=r"no floating-point tensors \(n: int64, c: complex64\)"):
        open_source(tmp_path / "g.pt")


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    torch.save({"a.b": G, "a": {"b": G}}, tmp_path / "g.pt")
    with pytest.raises(GradscopeError, match=r"two tensors named 'a\.b'"):
        open_source(tmp_path / "g.pt")


# --- weights beside the dumps ----------------------------------------------------------------------------------------


def test_weights_from_another_file(tmp_path: Path) -> None:
    dump(tmp_path / "g.safetensors", w=G)
    dump(tmp_path / "weights.safetensors", w=W)
    source = open_source(tmp_path / "g.safetensors", weights=tmp_path / "weights.safetensors")
    assert source.notes == (
        f"The weights in {tmp_path / 'weights.safetensors'} are for agc, which alone compares gradients with them.",
    )
    weights = source.weights()
    assert weights is not None and weights.read("w").tolist() == [5.0, 5.0]


def test_the_weights_of_a_module(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(3)).sum().backward()
    source = open_source(model)
    assert names_of(source) == ["weight", "bias"]
    (step,) = steps_of(source)
    assert step.sum_squares.tolist() == [6.0, 2.0]
    weights = source.weights()
    assert weights is not None
    np.testing.assert_array_equal(weights.read("weight"), model.weight.detach().numpy())


def test_a_module_without_gradients() -> None:
    with pytest.raises(GradscopeError, match="none of its parameters has a gradient"):
        open_source(torch.nn.Linear(3, 2))


def test_control_characters_in_names_are_spelled_out(tmp_path: Path) -> None:
    save_file({"a\x1b[31m\nb": G, "ü.weight": W}, tmp_path / "g")
    assert sorted(names_of(open_source(tmp_path / "g"))) == ["a\\x1b[31m\\nb", "ü.weight"]


def test_weights_go_with_dumps_only(tmp_path: Path) -> None:
    dump(tmp_path / "w", w=W)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    with pytest.raises(GradscopeError, match="--weights: goes with gradient dumps"):
        open_source(tmp_path / "c.pt", weights=tmp_path / "w")


def test_a_tensor_without_a_name_hides_none_beside_it(tmp_path: Path) -> None:
    save_file({"": torch.ones(2), "a.weight": torch.ones(3)}, tmp_path / "step.safetensors")
    assert sorted(names_of(open_source(tmp_path / "step.safetensors"))) == ["a.weight", "nameless"]
