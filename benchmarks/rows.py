"""The rows of the table: what is measured, against which peer, and which limit it has to meet."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data import CLIP_VALUE, EXPECTED, LARGE
from benchmarks.measuring import Series, alternate, quiet_run, run_once

SAMPLES = Path(__file__).parent.parent / "sample_ckpts"
GRADSCOPE = [sys.executable, "-m", "gradscope"]
TORCH_SCRIPT = [sys.executable, str(Path(__file__).parent / "torch_script.py")]
SCAN_ALONE = [sys.executable, "-m", "benchmarks.scan_alone"]
MAX_NORM = "1.0"
ONE_VALUE = [str(CLIP_VALUE)]
TEN_VALUES = ["1e-5", "3e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2", "3e-2"]
HEAVY = ("numpy", "torch", "pyarrow")


@dataclass(frozen=True)
class Row:
    """``measured`` against ``limit`` in ``unit``; ``at_least`` says which side of the limit is good; None: no limit."""

    what: str
    measured: float
    unit: str
    limit: float | None = None
    at_least: bool = False
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def start_up(rounds: int) -> Iterator[Row]:
    run_once([*GRADSCOPE, "--help"])
    helped = alternate({"help": [*GRADSCOPE, "--help"]}, 2 * rounds + 1)["help"]
    yield Row("gradscope --help, median", helped.seconds, "s", 0.25, detail=spread(helped))
    found = imported(["--help"])
    yield Row("gradscope --help: numpy, torch, pyarrow imported", len(found), "modules", 0, detail=" ".join(found))


def torch_imports(folder: Path) -> Iterator[Row]:
    """Every format that is not a legacy .pt; a dump is simulated as well."""
    dumps = ["gradients.pt", "gradients.npz", "gradients.npy", "sharded"]
    checkpoints = ["training.pt", "lightning.ckpt", "checkpoint-1"]
    sampled = ["ppo_cartpole.zip", "a2c_cartpole.zip", "rsl_rl_run/model_149.pt", "rsl_rl_run"]
    paths = [SAMPLES / "ppo_cartpole_gradients", *(folder / name for name in dumps)]
    runs = [["simulate", str(path), "--max-norm", "0.5", "--clip-value", "0.01"] for path in paths]
    paths += [*(folder / name for name in checkpoints), *(SAMPLES / name for name in sampled)]
    runs += [["inspect", str(path)] for path in paths]
    guilty = [f"{run[0]} {Path(run[1]).name}" for run in runs if "torch" in imported(run)]
    yield Row(
        f"inspect, simulate on {len(paths)} formats: torch imported", len(guilty), "runs", 0, detail=str(guilty or "")
    )


def imported(arguments: list[str]) -> list[str]:
    command = [sys.executable, "-X", "importtime", "-m", "gradscope", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-500:]}")
    return [name for name in HEAVY if re.search(rf"\| +{name}$", done.stderr, re.MULTILINE)]


def whole_process(folder: Path, rounds: int) -> Iterator[Row]:
    """``simulate`` against the torch script, from the start of the process to its end."""
    float32, bfloat16 = (str(folder / LARGE[dtype]) for dtype in ("float32", "bfloat16"))
    one = side_by_side(float32, ONE_VALUE, rounds)
    yield from ratios("float32, 1 norm + 1 value", one, {"script": 5, "plain": None, "tuned": None})
    ten = side_by_side(float32, TEN_VALUES, max(1, rounds // 2))
    yield from ratios("float32, 1 norm + 10 values", ten, {"plain": 15, "script": None, "tuned": None})
    half = side_by_side(bfloat16, ONE_VALUE, rounds)
    yield from ratios("bfloat16, 1 norm + 1 value", half, {"script": 5, "plain": None, "tuned": None})
    yield Row(
        "float32, peak memory", one["gradscope"].peak_mib, "MiB", 400, detail=f"script {one['script'].peak_mib:.0f}"
    )
    yield Row("float32, 10 values, peak memory", ten["gradscope"].peak_mib, "MiB", 400)
    yield Row(
        "bfloat16, peak memory", half["gradscope"].peak_mib, "MiB", 400, detail=f"script {half['script'].peak_mib:.0f}"
    )


def side_by_side(file: str, values: list[str], rounds: int) -> dict[str, Series]:
    options = [file, "--max-norm", MAX_NORM, "--clip-value", *values]
    commands = {
        "gradscope": [*GRADSCOPE, "simulate", *options],
        "script": [*TORCH_SCRIPT, *options],
        "plain": [*TORCH_SCRIPT, *options, "--form", "plain"],
        "tuned": [*TORCH_SCRIPT, *options, "--form", "tuned"],
    }
    return alternate(commands, rounds)


def ratios(what: str, series: dict[str, Series], limits: dict[str, float | None]) -> Iterator[Row]:
    own = series["gradscope"]
    for peer, limit in limits.items():
        detail = f"{series[peer].seconds:.2f} s / {own.seconds:.2f} s; {spread(own, series[peer])}"
        yield Row(f"{what}: torch {peer}", series[peer].seconds / own.seconds, "×", limit, at_least=True, detail=detail)


def scan_alone(folder: Path, rounds: int) -> Iterator[Row]:
    """Inside the process, after start and imports, against ``cat FILE >/dev/null`` of the same bytes.

    The scan takes no threshold: what reading some of them off its spectra adds stands in rows of its own.
    """
    for dtype, scan_limit in (("float32", 1.5), ("bfloat16", None)):
        file = str(folder / LARGE[dtype])
        for values in ((), ONE_VALUE, TEN_VALUES):
            limit = None if values else scan_limit
            scans, floors = [], []
            for _ in range(2 * rounds + 1):
                scans.append(float(quiet_run([*SCAN_ALONE, file, *values], keep_output=True).said))
                floors.append(quiet_run(["cat", file]).seconds)
            detail = f"{median(scans):.3f} s [{min(scans):.3f}-{max(scans):.3f}] / cat {median(floors):.3f} s"
            read_off = f" and {len(values)} value{'s' * (len(values) > 1)} read off" if values else " alone"
            what = f"{dtype} scan{read_off}: time of cat"
            yield Row(what, median(scans) / median(floors), "×", limit, detail=detail)


def accuracy(folder: Path) -> Iterator[Row]:
    """Every reported norm, and the joint angle, against float64 sums over the same stored values."""
    expected = json.loads((folder / EXPECTED).read_text())
    for dtype, name in LARGE.items():
        file, known = str(folder / name), expected[dtype]
        shown = reported("inspect", file, "--by", "tensor")["gradients"]
        total = sum(known["squares"].values())
        errors = [relative(shown["global"]["l2_norm"]["p50"], math.sqrt(total))]
        for tensor in shown["tensors"]:
            errors.append(relative(tensor["l2_norm"]["p50"], math.sqrt(known["squares"][tensor["name"]])))
        what = f"{dtype}, {len(errors)} norms: largest relative error"
        yield Row(what, max(errors), "", 1e-6)

        angle = math.degrees(math.acos(known["dot"] / math.sqrt(total * known["square"])))
        clip = reported("simulate", file, "--clip-value", *ONE_VALUE)["results"][0]
        stated = clip["direction_change_error_deg"]
        off = abs(clip["direction_change_deg"]["p50"] - angle)
        # The float64 reference itself is right to about 1e-9 degrees.
        yield Row(f"{dtype}, angle: distance to float64", off, "°", stated + 1e-9, detail="limit: the stated error")
        yield Row(f"{dtype}, angle: stated error", stated, "°", 0.1 if dtype == "float32" else 1e-5)


def recording() -> Iterator[Row]:
    """What recording costs a training, beside its peers; in processes of their own, which alternate by themselves."""
    for part in ("ppo", "learn", "transformer"):
        said = subprocess.run(
            [sys.executable, "-m", "benchmarks.recording_overhead", part], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        yield from (Row(**json.loads(line)) for line in said.splitlines())


def reported(*arguments: str) -> Any:
    done = subprocess.run([*GRADSCOPE, *arguments, "--format", "json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def relative(found: float, exact: float) -> float:
    return abs(found - exact) / exact if exact else abs(found)


def spread(*series: Series) -> str:
    ranges = ", ".join(f"{low:.2f}-{high:.2f}" for low, high in (one.spread for one in series))
    disturbed = sum(one.disturbed for one in series)
    return f"runs {ranges}" + (f"; {disturbed} disturbed" if disturbed else "")
