"""``python -m benchmarks.killed_recordings [--times 200]``: kill -9 a training that is being recorded, and read on.

Each time a real training starts under ``gradscope record`` and is killed at a random moment after its first step.  It
writes the time at the end of every step, unbuffered, to a file of its own: every step older than 0.5 s at the kill must
be in the trace, with the norm that the training computed itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Step, wall time at its end, float64 norm of its gradient.
LINE = struct.Struct("<qdd")
UNFLUSHED_AT_MOST = 0.5
LONGEST = 3.0
START_LIMIT = 60.0

TRAINING = """
import os, struct, sys, time
import torch
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[2]))
seen = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
step = 0
while True:
    optimizer.zero_grad()
    (model(torch.randn(32, 64)) - 1).square().mean().backward()
    norm = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    os.write(seen, struct.pack("<qdd", step, time.time(), norm))
    step += 1
    # Now and then a training stalls: what is pending must be written all the same.
    if step % 400 == 0:
        time.sleep(0.8)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed_recordings", description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    delays = [moments.uniform(0.0, LONGEST) for _ in range(options.times)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(killed, range(options.times), delays))
    bad = [line for line in found if line is not None]
    print("\n".join(bad))
    print(f"{options.times} killed, {options.times - len(bad)} whole, {len(bad)} not")
    return 1 if bad else 0


def killed(number: int, delay: float) -> str | None:
    """What is wrong with the trace of a training killed ``delay`` seconds after its first step; None: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        seen, trace = Path(folder, "seen"), Path(folder, "run.gradscope")
        with training(seen, trace, number) as pid:
            time.sleep(delay)
            moment = time.time()
            os.kill(pid, signal.SIGKILL)
        done = np.frombuffer(seen.read_bytes()[: seen.stat().st_size // LINE.size * LINE.size], dtype="<i8,<f8,<f8")
        due = int((done["f1"] < moment - UNFLUSHED_AT_MOST).sum())
        wrong = missing(trace, done["f2"], due)
        return wrong and f"run {number}, killed {delay:.3f} s after its first step: {wrong}"


@contextlib.contextmanager
def training(seen: Path, trace: Path, seed: int) -> Iterator[int]:
    """The process id of a training that has made its first step; the launcher has ended behind it."""
    command = [sys.executable, "-c", TRAINING, str(seen), str(seed)]
    record = [sys.executable, "-m", "gradscope", "record", "-q", "-o", str(trace), "--", *command]
    launcher = subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_LIMIT
    while not (seen.exists() and seen.stat().st_size):
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.kill()
            sys.exit(f"the training did not start: {' '.join(record)}")
        time.sleep(0.005)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    yield int(children[0])
    launcher.wait(START_LIMIT)


def missing(trace: Path, norms: NDArray[np.float64], due: int) -> str | None:
    from gradscope.errors import GradscopeError
    from gradscope.sources import open_source

    if not trace.exists():
        return f"no trace, {due} steps due" if due else None
    try:
        source = open_source(str(trace))
        found = [float(np.sqrt(step.sum_squares.sum())) for step in source.read_steps(range(source.info.steps))]
    except GradscopeError as error:
        if not due and error.why == "holds no steps yet":
            return None
        return f"does not open, {due} steps due: {error}"
    if len(found) < due:
        return f"{len(found)} steps, {due} due"
    whole = min(len(found), len(norms))
    if not np.allclose(found[:whole], norms[:whole], rtol=1e-6, atol=0):
        return "norms differ"
    return None


if __name__ == "__main__":
    sys.exit(main())
