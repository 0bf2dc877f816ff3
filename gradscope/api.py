"""The Python API: what the commands ``inspect``, ``simulate`` and ``check`` do, as functions that return results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gradscope.backward.options import BatchOptions, LossChoice, ModelChoice
    from gradscope.check_results import Check
    from gradscope.clipping import Convention, Policy
    from gradscope.comparison_results import Comparison
    from gradscope.gradients import GradientSource, Progress
    from gradscope.results import Inspection, Simulation

# A path, several paths (one step each), a mapping of names to arrays, a module with gradients, or an open source.
Readable = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any] | Any
ReadAs = Literal["gradients", "weights"]
Batch = str | os.PathLike[str] | Mapping[str, Any]


def inspect(
    source: Readable,
    *,
    as_: ReadAs | None = None,
    tag: str | None = None,
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    max_norm: float | None = None,
    at: int | None = None,
    progress: Progress | None = None,
    batch: Batch | None = None,
    model: ModelChoice | None = None,
    loss: LossChoice | None = None,
    minibatch_size: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    trust: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Inspection:
    """What is in ``source``: norms of its gradients and weights, and what its optimizers know.

    ``as_`` settles what a bare mapping of tensors holds; ``tag`` (a name or a glob) picks series of a log of norms;
    ``steps`` (``"A:B"``) picks gradient steps, ``at`` one of them with the 20 before it; ``groups`` (name → glob)
    redefines the clip groups; ``max_norm`` is the threshold for clip saturation; it takes the place of what the
    checkpoint names.  ``progress`` is told bytes done and bytes in all.

    With a ``batch`` (a file, or a mapping of names to arrays [rows, ...]) the gradients are computed: by the checkpoint
    in ``source`` (for SB3 only with ``trust``, since its parts are unpickled), or by the module that ``model`` makes
    (``"module:name"`` or the factory itself, called without arguments) with its weights, and ``loss(model, batch)``,
    which gives a scalar or one loss per row.  A step is a minibatch of ``minibatch_size`` rows, shuffled ``epochs``
    times from ``seed``; ``device`` and ``dtype`` are torch's, by name.  ``progress`` is then told rows.

    Raises GradscopeError for unusable input or options.
    """
    from gradscope import inspection
    from gradscope.backward.options import batch_options

    captured = batch_options(
        batch,
        model=model,
        loss=loss,
        minibatch_size=minibatch_size,
        epochs=epochs,
        seed=seed,
        trust=trust,
        device=device,
        dtype=dtype,
    )
    opened = _open(source, as_, None, tag, captured)
    return inspection.inspect(opened, steps=steps, groups=groups, max_norm=max_norm, at=at, progress=progress)


def simulate(
    source: Readable,
    policies: Sequence[Policy | str] = (),
    *,
    as_: ReadAs | None = None,
    tag: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    convention: Convention = "exact",
    sweep: bool = False,
    progress: Progress | None = None,
    batch: Batch | None = None,
    model: ModelChoice | None = None,
    loss: LossChoice | None = None,
    minibatch_size: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    trust: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Simulation:
    """What each of ``policies`` (``"norm:0.5"``, ``"value:0.01"``…) would have done to the gradients of ``source``.

    ``weights`` is a file with the parameters, which ``agc`` needs; ``convention`` is how a norm is clipped:
    ``"exact"``, min(1, υ/n), or ``"torch"``, min(1, υ/(n + 1e-6)); ``sweep`` adds a ladder of max_norm.  The other
    options are those of :func:`inspect`.

    Raises GradscopeError for unusable input or options, and for a source that holds no gradients.
    """
    from gradscope import simulation
    from gradscope.backward.options import batch_options

    captured = batch_options(
        batch,
        model=model,
        loss=loss,
        minibatch_size=minibatch_size,
        epochs=epochs,
        seed=seed,
        trust=trust,
        device=device,
        dtype=dtype,
    )
    return simulation.simulate(
        _open(source, as_, weights, tag, captured),
        policies,
        steps=steps,
        groups=groups,
        convention=convention,
        sweep=sweep,
        progress=progress,
    )


def check(
    source: Readable,
    *,
    rules: Mapping[str, float | str] | None = None,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    strict: bool | None = None,
    fail_on: Literal["error", "warn"] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    steps: str | slice | None = None,
    as_: ReadAs | None = None,
    tag: str | None = None,
    progress: Progress | None = None,
    batch: Batch | None = None,
    model: ModelChoice | None = None,
    loss: LossChoice | None = None,
    minibatch_size: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    trust: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Check:
    """Whether the gradients in ``source`` are healthy: the result is true if so, and tells what became of each rule.

    ``source`` is what :func:`inspect` takes, or a list of traces, checkpoints and logs, which are judged one by one.
    ``rules`` sets limits and severities (``{"clip-rate.max": 0.5, "spike.severity": "warn"}``); ``select`` and
    ``ignore`` name rules; ``strict`` makes a skipped rule a failure, ``fail_on="warn"`` a warning; ``baseline`` is a
    file that ``gradscope check --save-baseline`` wrote.

    No ``pyproject.toml`` is read unless ``config`` names it: what its ``[tool.gradscope.check]`` says then holds
    wherever nothing else is given.  ``select`` takes the place of its ``select`` and ``ignore``, and ``ignore`` takes
    away more.  The other options are those of :func:`inspect`.

    Raises GradscopeError for unusable input or options.
    """
    from pathlib import Path

    from gradscope.backward.options import batch_options
    from gradscope.health import checking
    from gradscope.health.project_settings import settings_of
    from gradscope.health.settings import CheckSettings
    from gradscope.project_file import read_project

    settings = CheckSettings() if config is None else settings_of(read_project(Path(config)))
    settings = settings.with_choice(
        rules=rules or {}, select=select, ignore=ignore, strict=strict, fail_on=fail_on, baseline=baseline
    )
    captured = batch_options(
        batch,
        model=model,
        loss=loss,
        minibatch_size=minibatch_size,
        epochs=epochs,
        seed=seed,
        trust=trust,
        device=device,
        dtype=dtype,
    )
    sources = _open_several(source, as_, tag, captured)
    return checking.check(sources, settings, steps=steps, progress=progress)


def compare(
    a: Readable,
    b: Readable,
    policies: Sequence[Policy | str] = (),
    *,
    as_: ReadAs | None = None,
    tag: str | None = None,
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    convention: Convention = "exact",
    progress: Progress | None = None,
) -> Comparison:
    """How ``a`` and ``b`` differ, in what both hold, and what of that is more than noise.

    ``policies`` are simulated on both.  The options are those of :func:`inspect` and :func:`simulate`, for both.

    Raises GradscopeError for unusable input or options, and for two sources that have nothing in common.
    """
    from gradscope.comparison import comparing
    from gradscope.sources.opening_pair import open_pair

    return comparing.compare(
        *open_pair(a, b, as_=as_, tag=tag),
        policies=policies,
        steps=steps,
        groups=groups,
        convention=convention,
        progress=progress,
    )


def _open_several(
    source: Readable, as_: ReadAs | None, tag: str | None, batch: BatchOptions | None
) -> list[GradientSource]:
    """A list of paths or sources is opened one by one; of single dumps in it, all are steps of one source."""
    from gradscope.gradients import GradientSource

    one_by_one = isinstance(source, str | os.PathLike) or (
        isinstance(source, list | tuple)
        and bool(source)
        and all(isinstance(each, str | os.PathLike | GradientSource) for each in source)
    )
    if not one_by_one:
        return [_open(source, as_, None, tag, batch)]
    listed = [source] if isinstance(source, str | os.PathLike) else list(source)
    if batch is not None:
        return [_open(each, as_, None, tag, batch) for each in listed]
    from gradscope.sources.opening_each import open_each

    return open_each(listed, as_=as_, tag=tag)


def _open(
    source: Readable,
    as_: ReadAs | None,
    weights: str | os.PathLike[str] | None,
    tag: str | None,
    batch: BatchOptions | None,
) -> GradientSource:
    if batch is not None:
        from gradscope.backward.opening import open_with_batch

        return open_with_batch(source, batch, as_=as_, weights=weights, tag=tag)
    from gradscope.sources import open_source

    return open_source(source, as_=as_, weights=weights, tag=tag)
