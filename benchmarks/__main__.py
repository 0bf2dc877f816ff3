"""``python -m benchmarks``: every figure that gradscope promises, measured beside its peer."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import rows
from benchmarks.data import EXPECTED, LARGE
from benchmarks.measuring import use_two_cores, warm_page_cache
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent


def main() -> int:
    options = parse()
    # Children must find gradscope and this package, installed or not.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # An installed package has its bytecode; a checkout may not be let to keep it.
    compileall.compile_dir(ROOT / "gradscope", quiet=1)
    cores = use_two_cores()
    # A folder of its own, for it is removed whole and the variable may name one that holds other things.
    folder = Path(os.environ.get("GRADSCOPE_BENCH_DATA") or ROOT / "benchmarks" / "data") / "gradscope-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make_data(folder, options.size)
        print(
            f"{cores} cores, {options.rounds} rounds, page cache warm, {options.size:g} GB in {folder}", file=sys.stderr
        )
        found = list(measure(folder, options.rounds, quiet=options.json))
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if options.json:
        print(json.dumps([asdict(row) | {"met": row.met} for row in found], indent=2))
    return 0 if all(row.met is not False for row in found) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=float, default=2.1, help="gigabytes of the float32 file (default: 2.1)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of every pair (default: 5)")
    parser.add_argument("--keep", action="store_true", help="leave the data for the next time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args()


def make_data(folder: Path, gigabytes: float) -> None:
    made = folder / f"size-{gigabytes:g}"
    if not (made.exists() and (folder / EXPECTED).exists()):
        make = [sys.executable, "-m", "benchmarks.data"]
        subprocess.run([*make, "large", str(folder), str(gigabytes)], check=True)
        subprocess.run([*make, "small", str(folder)], check=True)
        made.touch()


def measure(folder: Path, rounds: int, quiet: bool) -> Iterator[Row]:
    warm_page_cache(*(folder / name for name in LARGE.values()))
    sections = (
        rows.start_up(rounds),
        rows.torch_imports(folder),
        rows.accuracy(folder),
        rows.scan_alone(folder, rounds),
        rows.whole_process(folder, rounds),
        rows.recording(),
    )
    for section in sections:
        for row in section:
            if not quiet:
                print(line(row), flush=True)
            yield row


def line(row: Row) -> str:
    verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
    limit = "" if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:.4g}"
    return f"{row.what:52} {row.measured:9.4g} {row.unit:8} {limit:10} {verdict:8} {row.detail}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
