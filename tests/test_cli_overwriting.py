"""``-o`` replaces earlier reports, and never a file that holds tensors or that the command reads."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gradscope.__main__ import main

SAMPLES = Path(__file__).parent.parent / "sample_ckpts"
TENSORS = {"policy.weight": np.array([3.0, 4.0], dtype=np.float32)}
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def gradscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line beside a folder ``dumps`` of steps in every format: exit code and stderr."""
    dumps = tmp_path / "dumps"
    for folder in ("safetensors", "npz", "npy", "pt", "legacy", "shards"):
        (dumps / folder).mkdir(parents=True)
    for step in (1, 2):
        save_file(TENSORS, dumps / "safetensors" / f"s{step}.safetensors")
        save_file(TENSORS, dumps / "shards" / f"g-0000{step}-of-00002.safetensors")
        np.savez(dumps / "npz" / f"s{step}.npz", **TENSORS)
        np.save(dumps / "npy" / f"s{step}.npy", TENSORS["policy.weight"])
        torch.save({"policy.weight": torch.ones(2)}, dumps / "pt" / f"s{step}.pt")
        torch.save(
            {"policy.weight": torch.ones(2)}, dumps / "legacy" / f"s{step}.pt", _use_new_zipfile_serialization=False
        )
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *arguments])
        return main(), capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", ["simulate", "inspect"])
@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("dumps/safetensors", "dumps/safetensors/s2.safetensors"),
        ("dumps/safetensors/*", "dumps/safetensors/s1.safetensors"),
        ("dumps/safetensors/s1.safetensors dumps/safetensors/s2.safetensors", "dumps/safetensors/s1.safetensors"),
        ("dumps/shards", "dumps/shards/g-00002-of-00002.safetensors"),
        ("dumps/npz", "dumps/npz/s1.npz"),
        ("dumps/npy", "dumps/npy/s1.npy"),
        ("dumps/pt", "dumps/pt/s1.pt"),
        ("dumps/legacy", "dumps/legacy/s1.pt"),
        ("dumps/npz", "dumps/pt/s1.pt"),
    ],
)
def test_no_tensor_is_lost(gradscope: Command, command: str, source: str, file: str) -> None:
    before = Path(file).read_bytes()
    code, err = gradscope(command, *source.split(), "--max-norm", "1", "-o", file)
    assert code == 2
    assert err.startswith(f"error: -o {file}: ") and err.endswith("it would be overwritten\n")
    assert Path(file).read_bytes() == before


def test_a_link_to_a_dump_is_the_dump(gradscope: Command) -> None:
    Path("out.txt").symlink_to("dumps/npz/s1.npz")
    assert gradscope("inspect", "dumps/npz", "-o", "out.txt")[0] == 2
    np.testing.assert_array_equal(np.load("dumps/npz/s1.npz")["policy.weight"], TENSORS["policy.weight"])


def test_the_default_source_is_safe(gradscope: Command) -> None:
    Path("pyproject.toml").write_text('[tool.gradscope]\nsource = "dumps/npz"\n')
    assert gradscope("inspect", "-o", "dumps/npz/s2.npz")[0] == 2
    assert gradscope("inspect", "-o", "pyproject.toml")[0] == 2
    assert "source" in Path("pyproject.toml").read_text()


def test_text_that_a_source_reads_is_safe(gradscope: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "rsl_rl_run", run)
    settings = (run / "params" / "agent.yaml").read_bytes()
    assert gradscope("inspect", "run", "-o", "run/params/agent.yaml")[0] == 2
    assert (run / "params" / "agent.yaml").read_bytes() == settings
    index = tmp_path / "dumps" / "shards" / "g.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"policy.weight": "g-00001-of-00002.safetensors"}}))
    assert gradscope("inspect", "dumps/shards", "-o", str(index))[0] == 2
    assert "weight_map" in index.read_text()


@pytest.mark.parametrize("format_", ["table", "json", "csv", "markdown"])
def test_an_earlier_report_is_replaced_wherever_it_lies(gradscope: Command, format_: str) -> None:
    report = Path("dumps/npz/report.txt")
    assert gradscope("simulate", "dumps/npz", "--max-norm", "1", "--format", format_, "-o", str(report))[0] == 0
    first = report.read_bytes()
    assert gradscope("simulate", "dumps/npz", "--max-norm", "2", "--format", format_, "-o", str(report))[0] == 0
    assert report.read_bytes() != first


def test_a_report_cut_inside_a_character_is_still_text(gradscope: Command) -> None:
    Path("report.txt").write_text("a" + "é" * 4000, encoding="utf-8")
    assert gradscope("inspect", "dumps/npz", "-o", "report.txt")[0] == 0
    Path("report.txt").write_bytes(b"")
    assert gradscope("inspect", "dumps/npz", "-o", "report.txt")[0] == 0
