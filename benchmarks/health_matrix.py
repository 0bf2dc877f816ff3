"""Which rule finds which disease, and that none finds one in a healthy run.

``python -m benchmarks.health_matrix [--seeds 5] [--keep DIR] [--write-readme]`` trains everything in
``benchmarks/trainings``, checks each recording with the default limits, and prints one row per training.
The exit code is 0 when every disease is found by the rule that names it and every healthy run passes, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainings import HEALTHY, SICK, Training, train
from gradscope.check_results import Check
from gradscope.health.checking import check
from gradscope.sources.opening import open_source

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- health matrix -->", "<!-- /health matrix -->"
NONE = "–"


@dataclass(frozen=True)
class Row:
    """The checks of one training, one for each seed."""

    training: Training
    checks: tuple[Check, ...]

    @property
    def right(self) -> int:
        """Checks that passed a healthy run, or failed by the rule that names its disease."""
        return sum(self._right(rules_that(check, "fail")) for check in self.checks)

    def _right(self, failed: set[str]) -> bool:
        return bool(failed & set(self.training.disease)) if self.training.disease else not failed

    @property
    def named(self) -> str:
        """The rules that name the disease, and how many seeds each of them found."""
        failed = self._count("fail")
        return _counts({rule: failed[rule] for rule in self.training.disease if failed[rule]}, len(self.checks))

    @property
    def others(self) -> str:
        """The other rules that failed."""
        failed = self._count("fail")
        return _counts({rule: n for rule, n in failed.items() if rule not in self.training.disease}, len(self.checks))

    @property
    def warned(self) -> str:
        return _counts(self._count("warn"), len(self.checks))

    @property
    def exits(self) -> str:
        """The exit codes of ``gradscope check``."""
        return ", ".join(str(code) for code in sorted({0 if check else 1 for check in self.checks}))

    def _count(self, status: str) -> Counter[str]:
        return Counter(rule for check in self.checks for rule in rules_that(check, status))


def rules_that(check: Check, status: str) -> set[str]:
    """The names of the rules that ended so."""
    return {outcome.rule for outcome in check.rules if outcome.status == status}


def judge(trace: Path) -> Check:
    """``gradscope check TRACE``, every limit at its default."""
    return check([open_source(trace)])


def recorded(training: Training, seed: int, directory: Path) -> Path:
    """The trace of this training; trained now where ``directory`` does not have it."""
    path = directory / f"{training.name}-{seed}.gradscope"
    if not path.exists():
        # A trace under its own name is a whole one.
        with tempfile.TemporaryDirectory(dir=directory) as unfinished:
            train(training.name, seed, Path(unfinished) / path.name)
            os.rename(Path(unfinished) / path.name, path)
    return path


def markdown(rows: Sequence[Row]) -> str:
    """The healthy runs, and then the sick ones."""
    healthy = [row for row in rows if not row.training.disease]
    sick = [row for row in rows if row.training.disease]
    lines = ["| healthy run | passed | exit | failed | warned |", "|---|---|---|---|---|"]
    for row in healthy:
        lines.append(_line(row.training.about, _share(row), row.exits, row.others, row.warned))
    lines += ["", "| disease | caught | by | exit | other rules that failed | warned |", "|---|---|---|---|---|---|"]
    for row in sick:
        lines.append(_line(row.training.about, _share(row), row.named, row.exits, row.others, row.warned))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _share(row: Row) -> str:
    return f"{row.right}/{len(row.checks)}"


def _counts(counts: dict[str, int], of: int) -> str:
    """Rules, the most frequent first, with how often where that is not always."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"`{rule}`" if n == of else f"`{rule}` {n}/{of}" for rule, n in ordered) or NONE


def write_readme(table: str) -> None:
    """Put ``table`` between the markers of the README; ValueError where it has none."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README has no place for the table: {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how often each is trained")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the traces here, and train none that is here")
    parser.add_argument("--write-readme", action="store_true", help="put the table between the markers of the README")
    options = parser.parse_args()
    # The libraries' advice on how to train is of no use here.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        rows = []
        for training in HEALTHY + SICK:
            checks = [judge(recorded(training, seed, directory)) for seed in range(options.seeds)]
            rows.append(Row(training, tuple(checks)))
            print(f"{training.name}: {_share(rows[-1])}", file=sys.stderr, flush=True)
    table = markdown(rows)
    print(table)
    if options.write_readme:
        write_readme(table)
    return 0 if all(row.right == len(row.checks) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
