"""What a user names becomes the right kind of source, told by content."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.errors import GradscopeError
from gradscope.sources import open_source
from gradscope.sources.default import default_source

CONFIG = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})


def save_in_every_format(directory: Path, array: np.ndarray) -> list[Path]:  # type: ignore[type-arg]
    """One gradient in every format that holds it; the names tell nothing."""
    tensor = torch.from_numpy(array)
    save_file({"w": tensor}, directory / "a")
    torch.save({"w": tensor}, directory / "b")
    torch.save({"w": tensor}, directory / "c", _use_new_zipfile_serialization=False)
    for name, save in (("d", np.savez), ("e", np.savez_compressed)):
        with open(directory / name, "wb") as file:
            save(file, w=array)
    with open(directory / "f", "wb") as file:
        np.save(file, array)
    torch.save({"w": array}, directory / "g")
    (directory / "h").write_bytes(__import__("pickle").dumps({"w": array}))
    (directory / "i").write_bytes(__import__("pickle").dumps({"w": array}, 0))
    return sorted(directory.iterdir())


def test_one_gradient_in_every_format(tmp_path: Path) -> None:
    array = np.array([10, 0.1])
    paths = save_in_every_format(tmp_path, array)
    assert len(paths) == 9
    for path in paths:
        source = open_source(path)
        (step,) = source.read_steps(range(1))
        np.testing.assert_array_equal(step.read(0), array)
        assert step.sum_squares[0] == pytest.approx(100.01, rel=1e-15)


@pytest.mark.parametrize("as_", [None, "gradients", "weights"])
def test_a_bare_mapping_is_gradients_unless_said_otherwise(tmp_path: Path, as_: str | None) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors", as_=as_)
    assert source.info.kind == ("checkpoint" if as_ == "weights" else "gradients")
    assert (source.weights() is not None) == (as_ == "weights")
    assert bool(source.tensors) == (as_ != "weights")


@pytest.mark.parametrize("as_", [None, "gradients"])
@pytest.mark.parametrize("given", ["", "model.safetensors"])
def test_beside_a_model_config_it_is_weights(tmp_path: Path, given: str, as_: str | None) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(CONFIG)
    source = open_source(tmp_path / given, as_=as_)
    assert source.info.kind == ("gradients" if as_ else "checkpoint")


def test_another_config_changes_nothing(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"learning_rate": 0.1}')
    assert open_source(tmp_path / "x.safetensors").info.kind == "gradients"


def test_a_sequence_beside_a_model_config_is_gradients(tmp_path: Path) -> None:
    for number in range(3):
        save_file({"w": torch.ones(2)}, tmp_path / f"step_{number}.safetensors")
    (tmp_path / "config.json").write_text(CONFIG)
    assert open_source(tmp_path).info.kind == "gradients"


def test_weights_among_other_files_of_tensors(tmp_path: Path) -> None:
    for name in ("model.safetensors", "step_1.safetensors"):
        save_file({name[0]: torch.ones(2)}, tmp_path / name)
    weights = open_source(tmp_path, as_="weights").weights()
    assert weights is not None and [info.name for info in weights.tensors] == ["m"]


def test_several_files_cannot_be_the_weights(tmp_path: Path) -> None:
    for number in range(3):
        save_file({"w": torch.ones(2)}, tmp_path / f"step_{number}.safetensors")
    for source in (tmp_path, list(tmp_path.iterdir()), str(tmp_path / "*")):
        with pytest.raises(GradscopeError, match="3 files"):
            open_source(source, as_="weights")


def test_torchscript_is_weights(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert open_source(tmp_path / "script.pt").info.format == "weights (TorchScript)"


def test_a_checkpoint_is_recognised_by_its_keys(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert source.info.kind == "checkpoint" and len(source.optimizers()) == 1


def test_several_checkpoints_are_no_steps(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    for number in range(3):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"epoch_{number}.pt")
    with pytest.raises(GradscopeError, match="3 checkpoints") as caught:
        open_source(tmp_path)
    assert caught.value.hint is not None and "epoch_2.pt" in caught.value.hint


def test_a_source_stays_itself(tmp_path: Path) -> None:
    source = open_source({"w": np.ones(2)})
    assert open_source(source) is source


def test_steps_in_memory() -> None:
    source = open_source([{"w": np.full(2, float(number))} for number in range(4)])
    assert [step.max_abs[0] for step in source.read_steps(range(4))] == [0, 1, 2, 3]
    assert [step.label for step in source.read_steps(range(2))] == ["step 0", "step 1"]


def test_arrays_of_other_libraries() -> None:
    import jax.numpy as jnp
    import ml_dtypes

    bf16 = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    arrays = {"jax": jnp.array([3.0, 4.0]), "jax_bf16": jnp.array([3.0, 4.0], jnp.bfloat16), "ml": bf16}
    arrays |= {"torch_bf16": torch.tensor([3.0, 4.0]).bfloat16(), "fp8": torch.tensor([3.0, 4.0]).to(torch.float8_e5m2)}
    arrays |= {"strided": torch.arange(8.0)[::2], "big": np.array([3.0, 4.0], ">f4")}
    source = open_source(arrays)
    (step,) = source.read_steps(range(1))
    assert step.sum_squares.tolist() == [25.0, 25.0, 6.25, 25.0, 25.0, 56.0, 25.0]
    assert [info.dtype for info in source.tensors][1:5] == ["bfloat16", "bfloat16", "bfloat16", "float8_e5m2"]


# --- the default source ----------------------------------------------------------------------------------------------


def test_the_project_names_its_source(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.gradscope]\nsource = "runs/grads"\n')
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path, sentence = default_source(tmp_path / "deep" / "er")
    assert path == tmp_path / "runs" / "grads"
    assert str(path) in sentence and "pyproject.toml" in sentence
    path, sentence = default_source(tmp_path)
    assert sentence == "Using runs/grads (source in pyproject.toml)"


def test_only_the_nearest_project_counts(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.gradscope]\nsource = "grads"\n')
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(GradscopeError, match="no default source"):
        default_source(tmp_path / "inner")


def test_else_the_newest_trace(tmp_path: Path) -> None:
    for age, name in ((500, "old.gradscope"), (130, "a/b/new.gradscope"), (10, "a/b/c/too_deep.gradscope")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rank-00000.arrows").write_text("")
        for path in (tmp_path / name / "rank-00000.arrows", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    path, sentence = default_source(tmp_path)
    assert path == Path("a/b/new.gradscope")
    assert sentence == "Using a/b/new.gradscope (newest, 2 min old)"


@pytest.mark.parametrize("text", ["[tool.gradscope]\nsource = 3\n", "[tool.gradscope", "\x00"])
def test_a_damaged_project_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(GradscopeError, match=r"pyproject\.toml"):
        default_source(tmp_path)


def test_no_default_source(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="no default source") as caught:
        default_source(tmp_path)
    assert caught.value.hint is not None and "gradscope record" in caught.value.hint
