"""A process that records is killed at any moment, or read while it goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradscope.sources import open_source
from gradscope.trace.ranks import RecordedRun

# A training step of about a millisecond; what the steps were and when goes to a file of its own, unbuffered.
TRAINING = """
import sys, os, time
from pathlib import Path
import numpy as np
from gradscope.trace.writer import TraceWriter
from trace_rows import described, row
names = {f"layer{i}.weight": (20,) for i in range(13)}
rows = [row(0, list(np.random.default_rng(0).normal(size=(13, 20))), spectra=s) for s in ("all", "group")]
witness = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
writer = TraceWriter(Path(sys.argv[1]), described(names, ended=None))
for step in range(10**9):
    row = rows[step % 10 > 0]
    row.step, row.time = step, time.time()
    writer.append(row)
    os.write(witness, f"{step} {time.time()!r}\\n".encode())
    time.sleep(0.001)
"""


def train(directory: Path, witness: Path) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    path = f"{here.parent}{os.pathsep}{here}"
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(directory), str(witness)], env={**os.environ, "PYTHONPATH": path}
    )


def begun(witness: Path) -> None:
    end = time.monotonic() + 60
    while not witness.exists() or not witness.stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_older_than_half_a_second_is_lost(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    files = [(tmp_path / f"{i}.gradscope", tmp_path / f"{i}.txt") for i in range(2)]
    trainings = [train(*pair) for pair in files]
    for training, (directory, witness) in zip(trainings, files, strict=True):
        try:
            begun(witness)
            time.sleep(moments.uniform(0.0, 0.8))
        finally:
            training.send_signal(signal.SIGKILL)
            training.wait()
        killed = time.time()
        steps = [line.split() for line in witness.read_text().splitlines()]
        old = [int(step) for step, at in steps if float(at) < killed - 0.5]
        recorded = RecordedRun.open(directory).steps
        assert recorded.tolist() == list(range(len(recorded)))
        assert len(recorded) >= len(old)


def test_a_trace_is_readable_while_it_is_written(tmp_path: Path) -> None:
    directory, witness = tmp_path / "run.gradscope", tmp_path / "witness.txt"
    training = train(directory, witness)
    seen = []
    try:
        begun(witness)
        end = time.monotonic() + 60
        while len(seen) < 4 and time.monotonic() < end:
            if len(RecordedRun.open(directory).steps) > (seen[-1] if seen else 0):
                source = open_source(directory)
                seen.append(source.info.steps)
                read = [step.index for step in source.read_steps(range(source.info.steps))]
                assert read == list(range(source.info.steps))
            time.sleep(0.01)
    finally:
        training.kill()
        training.wait()
    assert len(seen) == 4
    assert np.all(np.diff(seen) > 0)
