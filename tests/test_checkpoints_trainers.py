"""Lightning checkpoints and Hugging Face directories of real trainings."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_training import lightning_checkpoint, rsl_rl_run, sb3_checkpoint, transformers_checkpoint

from gradscope.forensics import analyse
from gradscope.gradients import GradientSource
from gradscope.sources import open_source


def adam_norm(state: dict[str, Any]) -> float:
    beta2 = state["param_groups"][0]["betas"][1]
    entries = state["state"].values()
    return math.sqrt(sum(float(e["exp_avg_sq"].double().sum()) / (1 - beta2 ** float(e["step"])) for e in entries))


# --- Lightning -------------------------------------------------------------------------------------------------------


def test_a_lightning_fit() -> None:
    path = lightning_checkpoint()
    source = open_source(str(path))
    stored = torch.load(path, weights_only=True)
    assert source.info.format == "Lightning checkpoint"
    (state,) = source.optimizers()
    report = analyse(state)
    assert (report.name, report.type, report.steps, report.lr) == ("optimizer", "AdamW", 32.0, 1e-3)
    assert report.recent_norm == pytest.approx(adam_norm(stored["optimizer_states"][0]), rel=1e-9)
    assert [tensor.name for tensor in report.tensors] == [
        "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    assert any("gradient_clip_val" in note for note in source.notes)
    assert "body.1.num_batches_tracked: int64" in source.skipped
    weights = source.weights()
    assert weights is not None
    for tensor in weights.tensors:
        assert np.array_equal(weights.read(tensor.name), stored["state_dict"][tensor.name].numpy())


def test_max_norm_given_for_a_lightning_fit() -> None:
    (state,) = open_source(str(lightning_checkpoint())).optimizers()
    report = analyse(state, max_norm=4.0)
    assert report.recent_norm is not None
    assert report.saturation == pytest.approx(report.recent_norm**2 / 16.0)
    assert report.qualifications == ()


def test_a_lightning_fit_with_two_optimizers() -> None:
    body, head = open_source(str(lightning_checkpoint(2))).optimizers()
    assert (body.name, body.type, head.name, head.type) == ("optimizer[0]", "Adam", "optimizer[1]", "SGD")
    assert all(parameter.name.startswith("body.") for parameter in body.parameters)
    assert [parameter.name for parameter in head.parameters] == ["head.weight", "head.bias"]
    stored = torch.load(lightning_checkpoint(2), weights_only=True)["optimizer_states"][1]["state"].values()
    expected = math.sqrt(sum(float(entry["momentum_buffer"].double().square().sum()) for entry in stored))
    assert analyse(head).momentum_norm == pytest.approx(expected, rel=1e-9)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def trainer_order() -> list[str]:
    """The names in the order in which ``Trainer.create_optimizer`` lists them, from a model of the same kind."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer

    config = GPT2Config.from_pretrained(transformers_checkpoint() / "checkpoint-12")
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model=model)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert trainer.optimizer is not None
    return [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]


def test_a_trainer_checkpoint() -> None:
    directory = transformers_checkpoint() / "checkpoint-12"
    source = open_source(str(directory))
    assert source.info.format == "Hugging Face Trainer checkpoint"
    stored = torch.load(directory / "optimizer.pt", weights_only=True)
    (state,) = source.optimizers()
    report = analyse(state)
    assert (report.type, report.steps, report.max_norm) == ("AdamW", 12.0, 0.25)
    assert report.recent_norm == pytest.approx(adam_norm(stored), rel=1e-9)
    assert report.saturation == pytest.approx(1.0, abs=1e-4)
    assert report.qualifications == ()


def test_an_output_directory_gives_its_newest_checkpoint() -> None:
    source = open_source(str(transformers_checkpoint()))
    assert source.info.path.endswith("checkpoint-12")
    assert source.info.picked == f"checkpoint-12, the only checkpoint in {transformers_checkpoint()}"


def test_no_name_is_wrong_where_safetensors_lost_the_order() -> None:
    source = open_source(str(transformers_checkpoint() / "checkpoint-12"))
    (state,) = source.optimizers()
    named = [parameter.name for parameter in state.parameters]
    expected = trainer_order()
    unnamed = [name for i, name in enumerate(named) if name == f"param[{i}]"]
    assert all(name in (expected[i], f"param[{i}]") for i, name in enumerate(named))
    assert "transformer.h.1.mlp.c_fc.weight" in named
    assert 0 < len(unnamed) < len(named)
    assert any(f"{len(unnamed)} of {len(named)}" in note for note in source.notes)


def in_module_order(tmp_path: Path) -> Path:
    """The same checkpoint with its weights in ``pytorch_model.bin``, as before safetensors."""
    from safetensors.torch import load_file

    directory = tmp_path / "checkpoint-12"
    shutil.copytree(transformers_checkpoint() / "checkpoint-12", directory)
    weights = load_file(directory / "model.safetensors")
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config.from_pretrained(directory))
    model.load_state_dict(weights, strict=False)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_every_name_is_told_where_the_order_is_kept(tmp_path: Path) -> None:
    source = open_source(str(in_module_order(tmp_path)))
    (state,) = source.optimizers()
    assert [parameter.name for parameter in state.parameters] == trainer_order()
    assert "lm_head.weight: the same tensor as transformer.wte.weight" in source.skipped
    weights = source.weights()
    assert weights is not None
    shapes = {tensor.name: tensor.shape for tensor in weights.tensors}
    assert all(shapes[parameter.name] == parameter.shape for parameter in state.parameters)


def test_adafactors_factored_state_gives_the_energy() -> None:
    """The clip held every step, so the energy of the clipped gradients is max_norm squared."""
    source = open_source(str(transformers_checkpoint("adafactor") / "checkpoint-12"))
    (state,) = source.optimizers()
    report = analyse(state)
    assert report.type == "Adafactor"
    assert report.saturation == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_directory_is_weights(tmp_path: Path, kept: str) -> None:
    directory = in_module_order(tmp_path)
    if kept == "model.safetensors":
        shutil.copy(transformers_checkpoint() / "checkpoint-12" / kept, directory / kept)
    for path in directory.iterdir():
        if path.name not in ("config.json", kept):
            path.unlink()
    source = open_source(str(directory))
    assert (source.info.format, source.info.kind) == ("Hugging Face model", "checkpoint")
    assert source.optimizers() == ()
    weights = source.weights()
    assert weights is not None
    assert len(weights.tensors) == 28


def notes_without(tmp_path: Path, name: str) -> GradientSource:
    directory = tmp_path / "checkpoint-12"
    shutil.copytree(transformers_checkpoint() / "checkpoint-12", directory)
    (directory / name).unlink()
    return open_source(str(directory))


def test_without_training_args_max_norm_is_unknown(tmp_path: Path) -> None:
    source = notes_without(tmp_path, "training_args.bin")
    assert any("training_args.bin" in note for note in source.notes)
    assert source.optimizers()[0].clip_groups[0].max_norm is None


def test_without_the_optimizer_the_weights_are_left(tmp_path: Path) -> None:
    source = notes_without(tmp_path, "optimizer.pt")
    assert source.optimizers() == ()
    assert source.weights() is not None


def test_training_args_that_clip_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-12"
    shutil.copytree(transformers_checkpoint() / "checkpoint-12", directory)
    arguments = torch.load(directory / "training_args.bin", weights_only=False)
    arguments.max_grad_norm = 0.0
    torch.save(arguments, directory / "training_args.bin")
    source = open_source(str(directory))
    assert any("no clipping" in note for note in source.notes)
    assert source.optimizers()[0].clip_groups[0].max_norm is None


# --- what reading them imports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["SB3", "rsl_rl", "Lightning", "Hugging Face"])
def test_no_checkpoint_needs_torch_to_be_read(family: str) -> None:
    path = {
        "SB3": lambda: sb3_checkpoint("PPO"),
        "rsl_rl": rsl_rl_run,
        "Lightning": lightning_checkpoint,
        "Hugging Face": transformers_checkpoint,
    }[family]()
    program = (
        "import sys; from gradscope.sources import open_source; from gradscope.forensics import analyse\n"
        f"source = open_source({str(path)!r}); source.weights()\n"
        "print([analyse(state).recent_norm is not None for state in source.optimizers()])\n"
        "print(sorted({'torch', 'stable_baselines3', 'rsl_rl', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["[True]", "[]"]
