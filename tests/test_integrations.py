"""The callbacks of the frameworks: recording starts and ends with training, also when training raises."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from real_training import _rsl_rl_environment, rsl_rl_settings
from recorded import read_rows

import gradscope
from gradscope import GradscopeError
from gradscope.integrations.training_recorder import TrainingRecorder

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def metadata(path: Path) -> dict[str, Any]:
    return json.loads((path / "trace.json").read_bytes())


def step_once() -> None:
    """An optimizer step that nobody should record."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.sum().backward()
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    optimizer.step()


class TrainingError(Exception):
    """Training goes wrong."""


# --- SB3 --------------------------------------------------------------------------------------------------------------


def ppo() -> Any:
    from stable_baselines3 import PPO

    small = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}
    return PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **small)


def test_sb3_learn_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    from gradscope.integrations.sb3 import RecordGradients

    model = ppo()
    model.learn(64, callback=RecordGradients(tmp_path / "run.gradscope"))
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == model._n_updates * 2 == 8
    assert recorded["framework"] == "SB3 PPO" and recorded["ended"] is not None
    inspection = gradscope.inspect(tmp_path / "run.gradscope")
    assert inspection.source.steps == 8


def test_a_second_training_of_one_callback_gets_a_trace_of_its_own(tmp_path: Path) -> None:
    from gradscope.integrations.sb3 import RecordGradients

    model, callback = ppo(), RecordGradients(tmp_path / "run.gradscope")
    model.learn(32, callback=callback)
    model.learn(64, callback=callback)
    assert metadata(tmp_path / "run.gradscope")["steps"] == 4
    assert callback.recorder.path == tmp_path / "run-2.gradscope"
    assert metadata(callback.recorder.path)["steps"] == 8


def test_sb3_training_that_raised_is_closed_when_the_callback_trains_again(tmp_path: Path) -> None:
    from stable_baselines3.common.callbacks import CallbackList, EveryNTimesteps, StopTrainingOnMaxEpisodes

    from gradscope.integrations.sb3 import RecordGradients

    class Fail(StopTrainingOnMaxEpisodes):
        def _on_step(self) -> bool:
            raise TrainingError

    model, callback = ppo(), RecordGradients(tmp_path / "run.gradscope")
    with pytest.raises(TrainingError):
        model.learn(1000, callback=CallbackList([callback, EveryNTimesteps(48, Fail(1))]))
    model.learn(32, callback=callback)
    first = metadata(tmp_path / "run.gradscope")
    assert (first["steps"], first["ended"] is not None) == (4, True)
    assert metadata(tmp_path / "run-2.gradscope")["steps"] == 4


# --- Lightning --------------------------------------------------------------------------------------------------------


def fit(callback: Any, fail_at: int = -1) -> None:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            if index == fail_at:
                raise TrainingError
            return self.head(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
    )
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", gradient_clip_val=0.5, callbacks=[callback], devices=1, **quiet
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(torch.ones(24, 4)), batch_size=8))


def test_lightning_fit_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    from gradscope.integrations.lightning import RecordGradients

    fit(RecordGradients(tmp_path / "run.gradscope"))
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == 6 and recorded["ended"] is not None
    assert [tensor["name"] for tensor in recorded["tensors"]] == ["head.weight", "head.bias"]


def test_lightning_training_that_raises_is_closed_at_once(tmp_path: Path) -> None:
    from gradscope.integrations.lightning import RecordGradients

    with pytest.raises(TrainingError):
        fit(RecordGradients(tmp_path / "run.gradscope"), fail_at=2)
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == 2 and recorded["ended"] is not None


# --- Transformers -----------------------------------------------------------------------------------------------------


def fine_tune(callback: Any, out: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = [{"input_ids": (ids := torch.randint(0, 20, (4,))), "labels": ids} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=5,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows, callbacks=[callback]).train()


def test_a_transformers_trainer_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    from gradscope.integrations.transformers import RecordGradients

    fine_tune(RecordGradients(tmp_path / "run.gradscope", detail="norms"), tmp_path / "out")
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == 5 and recorded["ended"] is not None
    assert recorded["framework"] == "Transformers" and recorded["detail"] == "norms"


# --- rsl_rl -----------------------------------------------------------------------------------------------------------


def runner() -> Any:
    from rsl_rl.runners import OnPolicyRunner

    settings = rsl_rl_settings(1.0, image=False, curious=False)
    return OnPolicyRunner(_rsl_rl_environment(False), settings, None, "cpu")


def test_an_rsl_rl_runner_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    from gradscope.integrations.rsl_rl import record

    with contextlib.redirect_stdout(io.StringIO()):
        trained = runner()
        record(trained, tmp_path / "run.gradscope")
        trained.learn(2)
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == 2 * 4 * 4 and recorded["ended"] is not None
    assert [group["name"].split(".")[0] for group in recorded["groups"]] == ["actor", "critic"]


def test_rsl_rl_training_that_raises_is_closed_at_once(tmp_path: Path) -> None:
    from gradscope.integrations.rsl_rl import record

    with contextlib.redirect_stdout(io.StringIO()):
        trained = runner()
        update, updates = trained.alg.update, []

        def fail_at_the_second() -> Any:
            if updates:
                raise TrainingError
            updates.append(1)
            return update()

        trained.alg.update = fail_at_the_second
        record(trained, tmp_path / "run.gradscope")
        with pytest.raises(TrainingError):
            trained.learn(5)
    step_once()
    recorded = metadata(tmp_path / "run.gradscope")
    assert recorded["steps"] == 16 and recorded["ended"] is not None


# --- all of them ------------------------------------------------------------------------------------------------------


def train_with(framework: str, path: Path) -> None:
    """Train with the framework's own way of recording to ``path``."""
    if framework == "rsl_rl":
        from gradscope.integrations.rsl_rl import record

        with contextlib.redirect_stdout(io.StringIO()):
            trained = runner()
            record(trained, path)
            trained.learn(1)
        return
    callback = import_module(f"gradscope.integrations.{framework}").RecordGradients(path)
    if framework == "sb3":
        ppo().learn(32, callback=callback)
    elif framework == "lightning":
        fit(callback)
    else:
        fine_tune(callback, path.parent / "out")


@pytest.mark.parametrize(("framework", "steps"), [("sb3", 4), ("lightning", 6), ("transformers", 5), ("rsl_rl", 4 * 4)])
def test_a_callback_and_a_recorder_around_it_record_the_same(framework: str, steps: int, tmp_path: Path) -> None:
    with gradscope.Recorder(tmp_path / "all.gradscope"):
        step_once()
        train_with(framework, tmp_path / "run.gradscope")
        step_once()
    inner, outer = read_rows(tmp_path / "run.gradscope"), read_rows(tmp_path / "all.gradscope")
    assert metadata(tmp_path / "run.gradscope")["steps"] == steps
    groups = len(metadata(tmp_path / "run.gradscope")["groups"])
    assert len(inner) == steps * groups == len(outer) - 2
    assert [row["returned_norm"] for row in inner] == [row["returned_norm"] for row in outer[1:-1]]
    assert [row["sum_squares"] for row in inner] == [row["sum_squares"] for row in outer[1:-1]]


def test_a_callback_of_a_recorded_command_has_a_trace_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "from test_integrations import ppo, step_once\n"
        "from gradscope.integrations.sb3 import RecordGradients\n"
        "ppo().learn(32, callback=RecordGradients('own'))\n"
        "step_once()\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", "record", "-o", "all", "--", sys.executable, "train.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0
    assert done.stderr.startswith("Recorded 5 updates, 2 clip groups")
    assert metadata(tmp_path / "own.gradscope")["steps"] == 4
    assert [row["sum_squares"] for row in read_rows(tmp_path / "own.gradscope")] == [
        row["sum_squares"] for row in read_rows(tmp_path / "all.gradscope")[:-1]
    ]


def test_an_existing_trace_is_refused_before_anything_trains(tmp_path: Path) -> None:
    from gradscope.integrations.sb3 import RecordGradients

    (tmp_path / "run.gradscope").mkdir()
    with pytest.raises(GradscopeError, match="exists"):
        RecordGradients(tmp_path / "run.gradscope")


def test_a_callback_can_be_sent_to_another_process(tmp_path: Path) -> None:
    recorder = TrainingRecorder(tmp_path / "run.gradscope", {"detail": "norms"})
    sent = pickle.loads(pickle.dumps(recorder))
    sent.start()
    step_once()
    sent.stop()
    assert metadata(tmp_path / "run.gradscope")["steps"] == 1


@pytest.mark.parametrize(
    ("integration", "packages", "needed"),
    [
        ("sb3", ["stable_baselines3"], "stable-baselines3"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "transformers"),
    ],
)
def test_a_framework_that_is_not_installed_is_named(integration: str, packages: list[str], needed: str) -> None:
    code = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\nimport gradscope.integrations.{integration}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"ModuleNotFoundError: gradscope.integrations.{integration} needs {needed} (")
