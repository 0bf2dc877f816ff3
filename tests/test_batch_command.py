"""``--batch`` on the command line, with models and losses in the working directory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.__main__ import main

SAMPLES = Path(__file__).parent.parent / "sample_ckpts"
TRAINING = """
import sys
import torch

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))
        print("hello from the model")

def make(): return Two()
def raises(): raise ValueError("no\\nconfig")
def exits(): sys.exit("usage: train.py")
def nothing(): pass
def needs(config): return Two()
number = 5
class Three(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))
        self.more = torch.nn.Linear(1, 1)

def loss(model, batch): return (batch["x"] @ model.w).mean()
def per_row(model, batch): return batch["x"] @ model.w
def other(model, batch): return batch["observations"].sum()
def nan(model, batch): return loss(model, batch) * float("nan")
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command line beside a training's files; its exit code, output and error lines."""
    (tmp_path / "mytraining.py").write_text(TRAINING)
    (tmp_path / "broken.py").write_text("import no_such_dependency")
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "c.pt")
    save_file({"x": torch.tensor([[10.0, 0.1], [9.0, 0.3], [11.0, -0.1], [10.0, 0.1]])}, tmp_path / "b.safetensors")
    save_file({"x": torch.ones(4, 2), "y": torch.ones(3)}, tmp_path / "uneven.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def _run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *line.split()])
        code = main()
        return code, *capsys.readouterr()

    yield _run
    for name in ("mytraining", "broken"):
        sys.modules.pop(name, None)


GIVEN = "c.pt --batch b.safetensors --model mytraining:make --loss mytraining:loss"


def test_the_worked_example(run: Run) -> None:
    code, out, err = run(f"simulate {GIVEN} --clip-value 0.5 --max-norm 0.5 --format json")
    assert code == 0 and err == "hello from the model\n"
    norm, value = json.loads(out)["results"]
    # g = (10, 0.1): atan2(0.1, 10) is turned to atan2(0.1, 0.5).
    expected = np.degrees(np.arctan2(0.1, 0.5) - np.arctan2(0.1, 10.0))
    assert value["direction_change_deg"]["p50"] == pytest.approx(expected, abs=1e-5)
    assert f"{value['direction_change_deg']['p50']:.4f}" == "10.7370"
    assert norm["direction_change_deg"]["p50"] == 0.0
    assert norm["scale"]["p50"] == pytest.approx(0.0499975, abs=5e-8)


def test_a_step_for_each_minibatch(run: Run) -> None:
    line = f"inspect {GIVEN.replace(':loss', ':per_row')} --minibatch-size 1 --epochs 2 --format json"
    code, out, _ = run(line)
    found = json.loads(out)
    assert code == 0 and found["source"]["kind"] == "gradients" and found["source"]["steps"] == 8
    norms = np.linalg.norm([[10.0, 0.1], [9.0, 0.3], [11.0, -0.1], [10.0, 0.1]], axis=1)
    spread = found["gradients"]["global"]["l2_norm"]
    assert (spread["min"], spread["max"]) == pytest.approx((norms.min(), norms.max()), rel=1e-6)
    assert spread["mean"] == pytest.approx(norms.mean(), rel=1e-6)
    assert run(line)[1] == out


def test_groups_dtype_and_steps(run: Run) -> None:
    code, out, _ = run(
        f"simulate {GIVEN} --max-norm 1 --minibatch-size 2 --steps 1: --dtype float64 --groups g=* --format json"
    )
    found = json.loads(out)
    assert code == 0 and found["steps"] == 1 and [g["name"] for g in found["results"][0]["groups"]] == ["g"]


@pytest.mark.parametrize(
    ("change", "error", "hint"),
    [
        (("mytraining:make", "mytraining"), "--model mytraining: is not of the form MODULE:NAME", "train:make_model"),
        (("mytraining:make", "mytraining.py:make"), "there is no module mytraining", "mytraining:make"),
        (("mytraining:make", "./sub/net.py:make"), "not of the form MODULE:NAME", "sub.net:make"),
        (("mytraining:make", "mytrainig:make"), "--model mytrainig:make: there is no module mytrainig", "mytraining?"),
        (("mytraining:make", "broken:make"), "raised ModuleNotFoundError: No module named 'no_such_dependency'", ""),
        (("mytraining:make", "mytraining:mak"), "--model mytraining:mak: mytraining has no mak", "did you mean make?"),
        (("mytraining:make", "mytraining:raises"), "--model mytraining:raises: raised ValueError: no config", ""),
        (("mytraining:make", "mytraining:exits"), "ended the program (sys.exit('usage: train.py'))", ""),
        (("mytraining:make", "mytraining:nothing"), "returned nothing (None), not a torch.nn.Module", ""),
        (("mytraining:make", "mytraining:needs"), "raised TypeError: needs() missing 1 required", ""),
        (("mytraining:make", "mytraining:number"), "no function or class that makes a torch.nn.Module, but an int", ""),
        (
            ("mytraining:make", "mytraining:Three"),
            "c.pt: does not fit the model: of the model's tensors it lacks 2",
            "",
        ),
        (("mytraining:loss", "mytraining:other"), "raised KeyError: 'observations'", "the batch has x"),
        (("mytraining:loss", "mytraining:nan"), "--loss mytraining:nan: returned nan", ""),
        (("b.safetensors", "none.npz"), "none.npz: no such file", ""),
        (("b.safetensors", "uneven.safetensors"), "no common first dimension: 'x' has 4 rows, 'y' has 3", ""),
        ((" --model mytraining:make", ""), "--loss: goes with --model MODULE:FACTORY", ""),
        ((" --loss mytraining:loss", ""), "--model: goes with --loss MODULE:FUNCTION", ""),
        ((" --model mytraining:make --loss mytraining:loss", ""), "does not say what model and loss", "--model MODULE"),
        (("--batch b.safetensors ", ""), "--model: goes with --batch FILE", ""),
        (("c.pt", str(SAMPLES / "ppo_cartpole.gradscope")), "is a recorded run", ""),
        (("c.pt", str(SAMPLES / "ppo_cartpole_gradients")), "is no checkpoint (gradient dumps", ""),
        (("", " --minibatch-size 5"), "--minibatch-size 5: is more than the 4 rows of b.safetensors", ""),
        (("", " --minibatch-size 0"), "--minibatch-size: must be a whole number of at least 1", ""),
        (("", " --epochs 0"), "--epochs: must be a whole number of at least 1", ""),
        (("", " --dtype int8"), "--dtype int8: must be one of float32", ""),
        (("", " --device gpu"), "--device gpu: is no device that torch knows", "cpu, cuda"),
    ],
)
def test_what_cannot_be_used_is_one_line(change: tuple[str, str], error: str, hint: str, run: Run) -> None:
    old, new = change
    code, out, err = run(f"inspect {GIVEN.replace(old, new) if old else GIVEN + new}")
    lines = [line for line in err.splitlines() if line != "hello from the model"]
    assert code == 2 and out == ""
    assert lines[0].startswith("error: ") and error in lines[0]
    assert lines[1:] == [] or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert hint in "".join(lines[1:])


def test_an_sb3_checkpoint_is_not_unpickled_without_trust(run: Run) -> None:
    code, out, err = run(
        f"inspect {SAMPLES / 'ppo_cartpole.zip'} --batch {SAMPLES / 'ppo_cartpole_rollout.safetensors'}"
    )
    assert code == 2 and out == ""
    assert re.match(r"error: \S+ppo_cartpole.zip: .*unpickle.*policy_class", err) and "--trust" in err.splitlines()[1]


def test_a_file_is_not_written_over_the_batch(run: Run) -> None:
    before = Path("b.safetensors").read_bytes()
    code, _, err = run(f"inspect {GIVEN} -o b.safetensors")
    assert code == 2 and err.startswith("error: -o b.safetensors")
    assert Path("b.safetensors").read_bytes() == before


def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    line = "inspect c.safetensors --batch c.safetensors --model m:n --loss m:l"
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", *line.split()],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: --batch: needs PyTorch\nhint: pip install 'gradscope[torch]'\n"


def test_minibatches_are_no_run_in_time(run: Run) -> None:
    (code, out, _) = run(
        f"simulate {SAMPLES / 'ppo_cartpole.zip'} --batch {SAMPLES / 'ppo_cartpole_rollout.safetensors'} --trust "
        "--max-norm 10 --format json"
    )
    result = json.loads(out)
    assert code == 0 and result["steps"] == 32
    assert result["suggested_max_norm"] == result["suggested_max_norm_overall"]
    assert [phase["steps"] for phase in result["results"][0]["phases"]] == [[0, 31]]


def test_the_next_command_names_the_batch_and_its_options(run: Run) -> None:
    code, out, _ = run(f"inspect {GIVEN} --minibatch-size 2")
    following = " ".join(out.split("Next: gradscope ")[1].split())
    assert code == 0 and "--minibatch-size 2" in following
    again, out, _ = run(following)
    assert again == 0 and "2 steps" in out


def test_what_a_factory_asks_is_not_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("asking.py").write_text("def make(): return input('name? ')")
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run("inspect c.pt --batch b.safetensors --model asking:make --loss mytraining:loss")
    assert code == 2 and "error: --model asking:make: raised EOFError" in err
    assert sys.stdin is None


def test_a_captured_batch_by_itself_is_not_taken_for_gradients(run: Run) -> None:
    code, out, err = run(f"inspect {SAMPLES / 'ppo_cartpole_rollout.safetensors'}")
    assert code == 2 and out == ""
    assert "is a captured batch" in err and "hint: name the checkpoint" in err


def test_of_a_batch_the_optimizer_is_not_said_to_hide_the_norms(run: Run) -> None:
    ppo = SAMPLES / "ppo_cartpole.zip"
    _, alone, _ = run(f"inspect {ppo}")
    code, out, _ = run(f"inspect {ppo} --batch {SAMPLES / 'ppo_cartpole_rollout.safetensors'} --trust")
    assert code == 0 and "not in this file" in " ".join(alone.split())
    assert "not in this file" not in " ".join(out.split()) and out.count("dominates") == 1
