"""Whole processes, timed side by side: wall time and peak memory of each, alternating, on a machine that is quiet."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

Command = Sequence[str]

# A run is repeated when other processes used more of the machine than this, or waits for them that long at most.
OTHERS_AT_MOST = 0.10
WAIT_SECONDS = 60.0
RETRIES = 4


@dataclass(frozen=True)
class Run:
    """``seconds`` of wall time; ``peak_mib`` of resident memory; ``others`` is the CPU that others used, of one core.

    ``said`` is what the process wrote to stdout, where that was kept.
    """

    seconds: float
    peak_mib: float
    others: float
    said: str = ""


@dataclass(frozen=True)
class Series:
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return median(run.seconds for run in self.runs)

    @property
    def peak_mib(self) -> float:
        return max(run.peak_mib for run in self.runs)

    @property
    def disturbed(self) -> int:
        return sum(run.others > OTHERS_AT_MOST for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        return min(run.seconds for run in self.runs), max(run.seconds for run in self.runs)


def alternate(commands: Mapping[str, Command], rounds: int, keep_output: bool = False) -> dict[str, Series]:
    """Run each command once a round, in turn, so that a slow minute of the machine hits all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(quiet_run(command, keep_output))
    return {name: Series(tuple(found)) for name, found in runs.items()}


def quiet_run(command: Command, keep_output: bool = False) -> Run:
    """The least disturbed of up to ``RETRIES`` runs; the first one that nobody disturbed ends the search."""
    runs: list[Run] = []
    while not runs or (runs[-1].others > OTHERS_AT_MOST and len(runs) < RETRIES):
        wait_until_quiet()
        runs.append(run_once(command, keep_output))
    return min(runs, key=lambda run: run.others)


def run_once(command: Command, keep_output: bool = False) -> Run:
    # The kernel counts this process's own peak into its child's, so nothing large may ever be loaded here.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        busy, start = busy_seconds(), time.perf_counter()
        child = subprocess.Popen(command, stdout=output if keep_output else subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        if child.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{errors.read()[-2000:]}")
        output.seek(0)
        # /proc/stat counts in steps of 10 ms on every core: forgive two of them.
        return Run(seconds, usage.ru_maxrss / 1024, max(0.0, others - 0.04) / seconds, output.read())


def wait_until_quiet() -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        busy, start = busy_seconds(), time.perf_counter()
        time.sleep(0.2)
        if busy_seconds() - busy <= OTHERS_AT_MOST * (time.perf_counter() - start):
            return


def busy_seconds() -> float:
    """CPU time that all processes, and other guests of the host, have used since the start, over all cores."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def use_two_cores() -> int:
    """Pin this process and its children to two cores, so that figures of larger machines compare; how many it has."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    return len(cores)


def warm_page_cache(*paths: Path) -> None:
    for path in paths:
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
