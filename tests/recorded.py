"""Recording in a test, and reading what was recorded with Arrow alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradscope.recording.recorder import Recorder


@dataclass
class Recorded:
    path: Path
    rows: list[dict[str, Any]]
    metadata: dict[str, Any]

    @property
    def rules(self) -> set[str]:
        return {finding["rule"] for finding in self.metadata["findings"]}

    @property
    def names(self) -> list[str]:
        return [tensor["name"] for tensor in self.metadata["tensors"]]

    def group_rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if self.metadata["groups"][row["group"]]["name"] == name]

    def message(self, rule: str) -> str:
        return next(finding["message"] for finding in self.metadata["findings"] if finding["rule"] == rule)


def norm(row: dict[str, Any]) -> float:
    """The true norm of a row: NaN stands for a tensor without a gradient."""
    return sum(x for x in row["sum_squares"] if x == x) ** 0.5 / row["grad_scale"]


def read_rows(path: Path, rank: int = 0) -> list[dict[str, Any]]:
    with pa.OSFile(str(path / f"rank-{rank:05d}.arrows")) as stream:
        return pa.ipc.open_stream(stream).read_all().to_pylist()


def record(directory: Path, train: Callable[[], Any], **options: Any) -> Recorded:
    """Record ``train``; an error inside the recorder is an error of the test."""
    path = directory / "run.gradscope"
    with Recorder(path, quiet=True, **options):
        train()
    return Recorded(path, read_rows(path), json.loads((path / "trace.json").read_text()))
