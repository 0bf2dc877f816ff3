"""TensorBoard event files, written by the real writers."""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from real_training import _rsl_rl_environment, rsl_rl_settings
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from gradscope.errors import GradscopeError
from gradscope.sources import open_source

_KEPT = tempfile.TemporaryDirectory(prefix="gradscope-events-")
NORMS = np.random.default_rng(1).lognormal(size=3000)
NORMS[11] = np.nan


def log(directory: Path, norms: np.ndarray, first: int = 0, suffix: str = "") -> Path:  # type: ignore[type-arg]
    """A run of scalars, histograms and text, as one event file."""
    with SummaryWriter(str(directory), filename_suffix=suffix) as writer:
        for step, norm in enumerate(norms, first):
            writer.add_scalar("train/grad_norm", norm, step)
            writer.add_scalar("train/loss", 0.5, step)
        writer.add_histogram("grad_norm_histogram", torch.ones(5), first)
        writer.add_text("grad_norm_text", "hello", first)
    return directory


def read(source: object, tag: str | None = None) -> tuple[list[int], np.ndarray]:  # type: ignore[type-arg]
    opened = open_source(source, tag=tag)
    steps = list(opened.read_steps(range(opened.info.steps)))
    norms = [np.where(step.nan > 0, np.nan, np.sqrt(step.sum_squares))[0] for step in steps]
    return [step.index for step in steps], np.array(norms)


def test_every_norm_comes_out(tmp_path: Path) -> None:
    """TensorBoard keeps a sample of 1,000 values for a plot; gradscope keeps all of them."""
    log(tmp_path / "run", NORMS)
    (file,) = (tmp_path / "run").iterdir()
    for source in (tmp_path, tmp_path / "run", file):
        steps, norms = read(source)
        assert steps == list(range(3000))
        np.testing.assert_array_equal(norms, np.sqrt(NORMS.astype(np.float32).astype(float) ** 2))
    assert open_source(file).info.format == "TensorBoard log of train/grad_norm"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_stored_as_tensors(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """As TensorFlow 2 and JAX's writers store them."""
    writer = EventFileWriter(str(tmp_path))
    for step in range(5):
        tensor = make_tensor_proto(np.full(shape, step + 1, dtype))
        wide = make_tensor_proto(np.ones(3, np.float32))
        values = [Summary.Value(tag="grad_norm", tensor=tensor), Summary.Value(tag="grads_norm", tensor=wide)]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    writer.close()
    steps, norms = read(tmp_path)
    assert steps == [0, 1, 2, 3, 4] and norms.tolist() == [1, 2, 3, 4, 5]


def test_several_files_are_one_run(tmp_path: Path) -> None:
    log(tmp_path, np.arange(1.0, 11.0), suffix=".a")
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.100.host.1.0")
    # Resumed from step 6.
    log(tmp_path, np.arange(60.0, 70.0), first=6, suffix=".b")
    steps, norms = read(tmp_path)
    assert steps == list(range(16))
    assert norms.tolist() == [1, 2, 3, 4, 5, 6, *range(60, 70)]
    assert any("4 earlier ones are left out" in note for note in open_source(tmp_path).notes)


def test_several_runs_are_named(tmp_path: Path) -> None:
    for name in ("PPO_1", "PPO_2", "PPO_10"):
        log(tmp_path / name, np.ones(2))
    with pytest.raises(GradscopeError, match=r"holds 3 runs of event files \(PPO_1, PPO_2, PPO_10\)") as caught:
        open_source(tmp_path)
    assert caught.value.hint == f"name one: {tmp_path / 'PPO_10'}"
    with pytest.raises(GradscopeError, match="3 runs"):
        open_source(tmp_path, tag="train/grad_norm")


def test_what_lies_below_a_run_belongs_to_it(tmp_path: Path) -> None:
    """``add_scalars`` writes runs of its own below the run."""
    log(tmp_path, np.ones(3))
    log(tmp_path / "losses_train", np.ones(3))
    assert read(tmp_path)[0] == [0, 1, 2]


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    """Whatever byte the file ends at, the whole records before it are read."""
    log(tmp_path, np.arange(1.0, 6.0))
    (path,) = tmp_path.iterdir()
    whole, seen = path.read_bytes(), set()
    for size in range(70, len(whole)):
        path.write_bytes(whole[:size])
        try:
            source = open_source(path)
        except GradscopeError as error:
            assert error.why == "holds no series of numbers"
            continue
        seen.add(source.info.steps)
        left_out = [note for note in source.notes if "left out" in note]
        assert len(left_out) <= 1 and all(f"of {size:,} bytes" in note for note in left_out)
    assert seen == {1, 2, 3, 4, 5}


def test_a_flipped_bit(tmp_path: Path) -> None:
    log(tmp_path, np.arange(1.0, 6.0))
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    for place in range(len(whole) // 2, len(whole) // 2 + 100):
        damaged = whole.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        source = open_source(path)
        steps = list(source.read_steps(range(source.info.steps)))
        assert [step.sum_squares[0] for step in steps] == [(step.index + 1) ** 2 for step in steps]
        assert any("damaged or not yet whole" in note for note in source.notes)


def test_a_record_that_claims_the_world(tmp_path: Path) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    log(tmp_path, np.arange(1.0, 3.0))
    (path,) = tmp_path.iterdir()
    length = (1 << 62).to_bytes(8, "little")
    with path.open("ab") as file:
        file.write(length + masked_crc32c(length).to_bytes(4, "little") + bytes(100))
    source = open_source(path)
    assert source.info.steps == 2 and any("112 of" in note for note in source.notes)


def test_a_tensor_that_claims_the_world(tmp_path: Path) -> None:
    bomb = make_tensor_proto(np.ones(1, np.float32))
    bomb.tensor_shape.dim[0].size = 1 << 40
    writer = EventFileWriter(str(tmp_path))
    writer.add_event(Event(step=0, summary=Summary(value=[Summary.Value(tag="grad_norm", tensor=bomb)])))
    writer.close()
    with pytest.raises(GradscopeError, match="holds no series of numbers"):
        open_source(tmp_path)


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, np.ones(2))
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(GradscopeError, match="tensorboard is not installed") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "pip install 'gradscope[tensorboard]'"


# --- the libraries that log no norm ----------------------------------------------------------------------------------


@functools.cache
def sb3_events() -> Path:
    from stable_baselines3 import PPO

    directory = Path(_KEPT.name) / "sb3"
    PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu", tensorboard_log=str(directory)).learn(128)
    return directory / "PPO_1"


@functools.cache
def rsl_rl_events() -> Path:
    import contextlib
    import io

    from rsl_rl.runners import OnPolicyRunner

    directory = Path(_KEPT.name) / "rsl_rl"
    settings = rsl_rl_settings(1.0, image=False, curious=False)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(_rsl_rl_environment(False), settings, str(directory), "cpu")
        runner.learn(3)
        runner.logger.writer.close() if hasattr(runner, "logger") else runner.writer.close()
    return directory


@pytest.mark.parametrize(("library", "made"), [("Stable-Baselines3", sb3_events), ("rsl_rl", rsl_rl_events)])
def test_libraries_that_log_no_norm(tmp_path: Path, library: str, made: functools.partial[Path]) -> None:
    events = [path for path in made().iterdir() if "tfevents" in path.name]
    assert events
    for path in events:
        shutil.copy(path, tmp_path / path.name)
    for source in (tmp_path, *tmp_path.iterdir()):
        with pytest.raises(
            GradscopeError, match=f"is an event file of {library}, which logs no gradient norm"
        ) as caught:
            open_source(source)
        assert "gradscope record -- python train.py" in str(caught.value.hint)


def test_beside_a_checkpoint_the_checkpoint_is_meant() -> None:
    """The directory of an rsl_rl run holds both."""
    source = open_source(rsl_rl_events())
    assert source.info.kind == "checkpoint" and "rsl_rl" in source.info.format
    with pytest.raises(GradscopeError, match="no such series"):
        open_source(rsl_rl_events(), tag="grad_norm")
    assert open_source(rsl_rl_events(), tag="Loss/value*").info.kind == "norm-log"
