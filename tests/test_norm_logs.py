"""Logs of gradient norms, written by the tools that write them."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from real_training import transformers_checkpoint

import gradscope
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources import open_source

_KEPT = tempfile.TemporaryDirectory(prefix="gradscope-logs-")
NORMS = np.random.default_rng(0).lognormal(size=60)
NORMS[7], NORMS[9] = np.nan, np.inf


def norms_of(source: GradientSource) -> NDArray[np.float64]:
    """The norms of a source's steps, [steps, series]."""
    rows = []
    for step in source.read_steps(range(source.info.steps)):
        norms = np.sqrt(step.sum_squares)
        norms[step.inf > 0], norms[step.nan > 0] = np.inf, np.nan
        rows.append(norms)
    return np.array(rows)


def steps_of(source: GradientSource) -> list[int]:
    return [step.index for step in source.read_steps(range(source.info.steps))]


def columns(every: int = 5) -> dict[str, Any]:
    steps = every * np.arange(len(NORMS))
    return {"_step": steps, "_runtime": steps * 0.1, "loss": np.ones(len(NORMS)), "train/grad_norm": NORMS}


def records(every: int = 5) -> list[dict[str, Any]]:
    table = {name: values.tolist() for name, values in columns(every).items()}
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def write(path: Path, kind: str) -> Path:
    """The same log in every format; the names tell nothing."""
    if kind == "csv":
        arrow_csv.write_csv(pyarrow.table(columns()), path)
    elif kind == "tsv":
        arrow_csv.write_csv(pyarrow.table(columns()), path, arrow_csv.WriteOptions(delimiter="\t"))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table(columns()), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    elif kind == "json records":
        path.write_text(json.dumps(records(), indent=1))
    elif kind == "json columns":
        path.write_text(json.dumps({name: values.tolist() for name, values in columns().items()}))
    elif kind == "nested":
        text = (
            json.dumps({"info": {"step": r["_step"]}, "train": {"grad_norm": r["train/grad_norm"]}}) for r in records()
        )
        path.write_text("\n".join(text))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl", "json records", "json columns", "nested"])
def test_one_log_in_every_format(tmp_path: Path, kind: str) -> None:
    source = open_source(write(tmp_path / "log", kind))
    assert source.info.kind == "norm-log" and source.info.steps == len(NORMS)
    assert [info.name for info in source.tensors] == ["train/grad_norm"]
    assert [group.tensors for group in source.groups] == [("train/grad_norm",)]
    assert steps_of(source) == list(range(0, 300, 5))
    np.testing.assert_allclose(norms_of(source)[:, 0], NORMS, rtol=1e-15)
    assert "A sample: the log holds 60 norms of the steps 0 to 295, usually one in 5." in source.notes


def test_positions_pick_steps(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "log", "csv"))
    assert [step.index for step in source.read_steps(range(10, 20, 3))] == [50, 65, 80, 95]
    assert [step.label for step in source.read_steps(range(1, 2))] == ["step 5"]


def test_what_norms_decide_and_what_they_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "log", "csv")
    finite = NORMS[np.isfinite(NORMS)]
    policies = ["norm:1.5", "joint-norm:1.5", "skip:1.5", "autoclip:90", "zclip:2.5"]
    result = gradscope.simulate(path, policies)
    assert result.steps == 60 and result.nonfinite_steps == 2
    assert result.results[0].clipped_steps == int((finite > 1.5).sum())
    assert result.results[0].scale.mean == pytest.approx(np.minimum(1, 1.5 / finite).mean(), rel=1e-12)
    for policy in ("value:0.1", "per-layer-norm:1", "per-tensor-norm:1", "block-rms:1", "agc:0.1"):
        with pytest.raises(GradscopeError, match="log of norms"):
            gradscope.simulate(path, [policy])


def test_inspecting_a_log(tmp_path: Path) -> None:
    inspection = gradscope.inspect(write(tmp_path / "log", "parquet"))
    assert inspection.source.format == "W&B history of train/grad_norm"
    assert inspection.gradients is not None
    assert inspection.gradients.global_.l2_norm.p50 == pytest.approx(np.median(NORMS[np.isfinite(NORMS)]), rel=1e-12)
    assert [fault.step for fault in inspection.gradients.nonfinite] == [35, 45]


def test_the_chart_export_of_wandb(tmp_path: Path) -> None:
    path = tmp_path / "wandb_export.csv"
    header = ["Step", "brave-elf-3 - train/grad_norm"]
    header += [f"{header[1]}__MIN", f"{header[1]}__MAX"]
    rows = [header, *[[str(i), str(i + 0.5), str(i), str(i + (1 if i % 3 else 0))] for i in range(30)]]
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    for tag in (None, "train/grad_norm", "brave-elf-3 - train/grad_norm", "*grad_norm"):
        source = open_source(path, tag=tag)
        assert norms_of(source)[:, 0] == pytest.approx(np.arange(30) + 0.5)
        assert source.info.format == "W&B chart export of brave-elf-3 - train/grad_norm"
        assert any(note.startswith("20 of 30 points") for note in source.notes)


def test_a_chart_over_time(tmp_path: Path) -> None:
    """Its x axis is no step, but W&B adds one."""
    path = tmp_path / "wandb_export.csv"
    path.write_text('"Relative Time (Process)","elf - _step","elf - grad_norm"\n"0.5","10","1.5"\n"0.9","20","2.5"\n')
    assert steps_of(open_source(path)) == [10, 20]


def test_sparse_rows(tmp_path: Path) -> None:
    """Loggers write a row per call, and the norm is in some of them."""
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,grad_norm,step,val_loss\n0,1.5,9,\n0,,9,0.25\n1,2.5,19,\n1,,19,0.5\n")
    source = open_source(path)
    assert steps_of(source) == [9, 19] and norms_of(source)[:, 0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("header", ["grad_norm", "loss,grad_norm"])
def test_rows_are_counted_where_there_are_no_steps(tmp_path: Path, header: str) -> None:
    prefix = "0.5," if "," in header else ""
    (tmp_path / "log").write_text(header + "\n" + "".join(f"{prefix}{norm}\n" for norm in (1.0, 2.0, "nan", 4.0)))
    source = open_source(tmp_path / "log")
    assert [step.label for step in source.read_steps(range(4))] == ["row 0", "row 1", "row 2", "row 3"]
    assert "rows are counted" in source.notes[0]
    assert norms_of(source)[:, 0] == pytest.approx([1.0, 2.0, np.nan, 4.0], nan_ok=True)


# --- order -----------------------------------------------------------------------------------------------------------


def log_of(path: Path, steps: list[int], norms: list[float]) -> GradientSource:
    path.write_text("".join(json.dumps({"step": s, "grad_norm": n}) + "\n" for s, n in zip(steps, norms, strict=True)))
    return open_source(path)


def test_a_resumed_run_counts_its_last_values(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log", [0, 1, 2, 3, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7])
    assert steps_of(source) == [0, 1, 2, 3, 4]
    assert norms_of(source)[:, 0].tolist() == [1, 2, 5, 6, 7]
    assert any("resumed" in note and "2 earlier ones are left out" in note for note in source.notes)


def test_several_values_in_one_step_all_count(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log", [0, 0, 1, 1], [1, 2, 3, 4])
    assert norms_of(source)[:, 0].tolist() == [1, 2, 3, 4]
    assert any(note.startswith("2 values of grad_norm share their step") for note in source.notes)


def test_steps_out_of_order_are_sorted(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log", [0, 2, 1, 3], [1, 3, 2, 4])
    assert norms_of(source)[:, 0].tolist() == [1, 2, 3, 4]
    assert any("sorted" in note for note in source.notes)


def test_a_whole_log_is_no_sample(tmp_path: Path) -> None:
    assert not any("sample" in note for note in log_of(tmp_path / "log", [3, 4, 5], [1, 2, 3]).notes)


# --- the Trainer -----------------------------------------------------------------------------------------------------


@functools.cache
def trained(logging_steps: int) -> tuple[Path, list[float]]:
    """The output of a real Trainer, and what its clip returned at each update."""
    import torch
    import transformers
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = [{"input_ids": (ids := torch.randint(0, 50, (8,))), "labels": ids} for _ in range(32)]
    output = Path(_KEPT.name) / f"trainer-{logging_steps}"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=12,
        per_device_train_batch_size=4,
        max_grad_norm=0.75,
        logging_steps=logging_steps,
        report_to=["tensorboard"],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    norms: list[float] = []
    clip = Accelerator.clip_grad_norm_

    def kept(*args: Any, **kwargs: Any) -> Any:
        norms.append(float(norm := clip(*args, **kwargs)))
        return norm

    Accelerator.clip_grad_norm_ = kept  # type: ignore[method-assign]
    try:
        trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows)
        trainer.train()
    finally:
        Accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]
    trainer.save_state()
    torch.save(arguments, output / "training_args.bin")
    return output, norms


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_the_log_of_a_trainer(logging_steps: int) -> None:
    output, norms = trained(logging_steps)
    assert len(norms) == 12
    source = open_source(output / "trainer_state.json")
    assert source.info.format == "Hugging Face Trainer log of grad_norm"
    assert steps_of(source) == list(range(logging_steps, 13, logging_steps))
    assert norms_of(source)[:, 0].tolist() == pytest.approx(norms[logging_steps - 1 :: logging_steps], rel=1e-7)
    assert source.groups[0].max_norm == 0.75
    sampled = "the norms of 3 of 12 updates (logging_steps 4), each that of the last update"
    assert (sampled in source.notes[0]) == (logging_steps == 4)
    assert "before clipping" in source.notes[0]


def test_what_a_trainer_tells_tensorboard() -> None:
    output, norms = trained(1)
    (runs,) = (output / "runs").iterdir() if (output / "runs").is_dir() else [output]
    source = open_source(runs)
    assert [info.name for info in source.tensors] == ["train/grad_norm"]
    assert norms_of(source)[:, 0] == pytest.approx(norms, rel=1e-6)
    assert source.groups[0].max_norm == 0.75


def test_the_directory_of_a_trainer(tmp_path: Path) -> None:
    output, _ = trained(4)
    (tmp_path / "trainer_state.json").write_bytes((output / "trainer_state.json").read_bytes())
    assert open_source(tmp_path).info.steps == 3
    assert open_source(tmp_path).groups[0].max_norm is None
    # A checkpoint stays a checkpoint, unless the log in it is asked for.
    (checkpoint,) = transformers_checkpoint().glob("checkpoint-*")
    assert open_source(checkpoint).info.kind == "checkpoint"
    with pytest.raises(GradscopeError, match=r"trainer_state\.json: holds no series of numbers"):
        open_source(checkpoint, tag="grad_norm")


def test_the_newest_checkpoint_has_the_longest_log(tmp_path: Path) -> None:
    for updates in (2, 10):
        history = [{"step": step, "grad_norm": 1.0} for step in range(1, updates + 1)]
        state = {"global_step": updates, "log_history": history, "logging_steps": 1}
        (tmp_path / f"checkpoint-{updates}").mkdir()
        (tmp_path / f"checkpoint-{updates}" / "trainer_state.json").write_text(json.dumps(state, indent=2))
    assert open_source(tmp_path, tag="grad_norm").info.steps == 10


# --- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "events"])
def test_neither_torch_nor_tensorflow_is_imported(tmp_path: Path, kind: str) -> None:
    if kind == "events":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            writer.add_scalar("grad_norm", 1.0, 0)
    path = tmp_path if kind == "events" else write(tmp_path / "log", kind)
    program = (
        "import sys; from gradscope.__main__ import main\n"
        f"sys.argv = ['gradscope', 'simulate', {str(path)!r}, '--max-norm', '1', '--format', 'json']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'tensorflow', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["source"]["kind"] == "norm-log"


def test_a_norm_beyond_the_square_root_of_the_largest_number(tmp_path: Path) -> None:
    source = log_of(tmp_path / "log", [0, 1], [1e200, 0.0])
    result = gradscope.simulate(source, ["norm:1"])
    assert result.nonfinite_steps == 1 and not math.isnan(result.norm.p50)
