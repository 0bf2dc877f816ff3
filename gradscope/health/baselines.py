"""Baselines: what healthy runs looked like, in one file that is safe to read, whoever wrote it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradscope.differences import MOST_FRACTIONS, Course
from gradscope.errors import GradscopeError
from gradscope.health.run_courses import Clipping, LayerCourses, RunCourses
from gradscope.layer_series import QUANTITIES, Quantity
from gradscope.whole_file import whole_file

if TYPE_CHECKING:
    from gradscope.health.evidence import Evidence

SCHEMA = "gradscope.baseline/1"
# About 30,000 layers; a file of somebody else's is not read into memory however long it is.
MOST_BYTES = 128 << 20
MOST_RUNS = 100
# Of any two float64 numbers the logarithms lie closer together.
LARGEST_LOGARITHM = 1e4
# Six digits of a logarithm say more than any run does.
DIGITS = 6


@dataclass(frozen=True, slots=True)
class Baseline:
    """One or more healthy runs of the same model; ``path`` is the file's."""

    path: str
    runs: tuple[RunCourses, ...]


def save_baseline(path: Path, evidences: Sequence[Evidence]) -> None:
    """Write what ``evidences``, each a run of the same training, look like to ``path``, which is there whole or not.

    Raises GradscopeError where one of them holds no gradients, where they are not of the same model or two are the
    same run, and where the file cannot be written.
    """
    runs: list[RunCourses] = []
    for evidence in evidences:
        run = RunCourses.of(evidence)
        if run is None:
            raise GradscopeError(
                evidence.source.info.path, "holds no gradients to make a baseline of", "record a run: gradscope record"
            )
        if runs and set(run.layers) != set(runs[0].layers):
            raise GradscopeError(run.path, f"is not of the same layers as {runs[0].path}: one baseline is of one model")
        runs.append(run)
    if not 1 <= len(runs) <= MOST_RUNS:
        raise GradscopeError(str(path), f"a baseline is of 1 to {MOST_RUNS} runs, not of {len(runs)}")
    told = [_run_as_json(run) for run in runs]
    _refuse_twins(told)
    text = json.dumps({"schema": SCHEMA, "runs": told}, allow_nan=False)
    try:
        _refuse_device(path)
        with whole_file(path) as out:
            out.write(f"{text}\n".encode())
    except OSError as error:
        raise GradscopeError(str(path), (error.strerror or str(error)).lower()) from None


def read_baseline(path: Path) -> Baseline:
    """What ``save_baseline`` wrote to ``path``.

    Raises GradscopeError where it cannot be read, or is anything else.
    """
    try:
        _refuse_device(path)
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise GradscopeError(str(path), (error.strerror or str(error)).lower()) from None
    if len(content) > MOST_BYTES:
        raise GradscopeError(str(path), f"is too large for a baseline: more than {MOST_BYTES >> 20} MiB")
    try:
        tree = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise GradscopeError(str(path), "is no baseline: it is not JSON", _HOW) from None
    try:
        return Baseline(str(path), _runs(tree))
    except _UnlikeError as error:
        raise GradscopeError(str(path), f"is no baseline: {error}", _HOW) from None


def _refuse_device(path: Path) -> None:
    """A pipe that nobody writes to would be waited for, and a device replaced.  A directory fails by itself."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise GradscopeError(str(path), "is not a regular file")


_HOW = "make one: gradscope check RUN.gradscope --save-baseline FILE"


class _UnlikeError(Exception):
    """What is read is not what a baseline holds."""


def _refuse_twins(runs: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        content = json.dumps({**run, "path": ""})
        if content in seen:
            raise GradscopeError(run["path"], f"is the run of {seen[content]} again: a baseline is of different seeds")
        seen[content] = run["path"]


def _run_as_json(run: RunCourses) -> dict[str, Any]:
    return {
        "path": run.path,
        "kind": run.kind,
        "steps": run.steps,
        "clip_rate": run.clipping.rate,
        "clip_rate_ci95": run.clipping.interval,
        "max_norms": dict(run.clipping.max_norms),
        "layers": {
            name: {
                "numel": layer.numel,
                "silent": _number_or_null(layer.silent),
                "courses": {
                    quantity: {
                        "effective": _number_or_null(course.effective),
                        "means": [_number_or_null(mean) for mean in course.means],
                    }
                    for quantity, course in layer.courses.items()
                },
            }
            for name, layer in run.layers.items()
        },
    }


def _number_or_null(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _runs(tree: Any) -> tuple[RunCourses, ...]:
    schema = _mapping(tree, "the file").get("schema")
    if schema != SCHEMA:
        known = isinstance(schema, str) and schema.startswith("gradscope.baseline/")
        raise _UnlikeError("a later gradscope wrote it" if known else f'its "schema" is not {SCHEMA}')
    runs = tree.get("runs")
    if not isinstance(runs, list) or not 1 <= len(runs) <= MOST_RUNS:
        raise _UnlikeError(f'"runs" is no list of 1 to {MOST_RUNS}')
    read = tuple(_run(run) for run in runs)
    if any(set(run.layers) != set(read[0].layers) for run in read):
        raise _UnlikeError("its runs differ in their layers")
    return read


def _run(tree: Any) -> RunCourses:
    run = _mapping(tree, "a run")
    rate, interval = run.get("clip_rate"), run.get("clip_rate_ci95")
    if interval is not None and (not isinstance(interval, list) or len(interval) != 2):
        raise _UnlikeError('"clip_rate_ci95" is no pair')
    return RunCourses(
        path=_text(run.get("path"), "path"),
        kind=_text(run.get("kind"), "kind"),
        steps=_whole(run.get("steps"), "steps"),
        layers={name: _layer(layer) for name, layer in _mapping(run.get("layers"), "layers").items()},
        clipping=Clipping(
            rate=None if rate is None else _number(rate, "clip_rate"),
            interval=None if interval is None else (_number(interval[0], "rate"), _number(interval[1], "rate")),
            max_norms={k: _number(v, "max_norms") for k, v in _mapping(run.get("max_norms"), "max_norms").items()},
        ),
    )


def _layer(tree: Any) -> LayerCourses:
    layer = _mapping(tree, "a layer")
    courses: dict[Quantity, Course] = {}
    held = _mapping(layer.get("courses"), "courses")
    for quantity in QUANTITIES:
        # A quantity that is not known here, as of a later version, is not compared.
        if quantity in held:
            courses[quantity] = _course(held[quantity])
    silent = layer.get("silent")
    return LayerCourses(
        numel=_whole(layer.get("numel"), "numel"),
        silent=math.nan if silent is None else _number(silent, "silent"),
        courses=courses,
    )


def _course(tree: Any) -> Course:
    course = _mapping(tree, "a course")
    means = course.get("means")
    if not isinstance(means, list) or len(means) not in _LENGTHS:
        raise _UnlikeError(f'"means" is no list of 1, 2, 4 … or {MOST_FRACTIONS} numbers')
    return Course(
        means=tuple(math.nan if mean is None else _logarithm(mean) for mean in means),
        effective=_number(course.get("effective"), "effective"),
    )


_LENGTHS = frozenset(1 << k for k in range(MOST_FRACTIONS.bit_length()))


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _UnlikeError(f"{what} is no object")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _UnlikeError(f'"{what}" is no text')
    return value


def _number(value: Any, what: str) -> float:
    # Far beyond what is ever written, and near enough for no sum to overflow.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
        raise _UnlikeError(f'"{what}" holds what is no finite number')
    return float(value)


def _logarithm(value: Any) -> float:
    number = _number(value, "means")
    if abs(number) > LARGEST_LOGARITHM:
        raise _UnlikeError('"means" holds what is no logarithm')
    return number


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise _UnlikeError(f'"{what}" is no whole number')
    return value
