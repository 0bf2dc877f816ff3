"""From whatever a user names to a source: a path, a glob, a list of paths, tensors in memory, or a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources.arrays import gradient_tree_of, tree_of
from gradscope.sources.dumps import DumpedStep, GradientDumps, dumped_step, load_files
from gradscope.sources.formats.contents import Contents, read_contents
from gradscope.sources.formats.file_region import unreadable
from gradscope.sources.formats.safetensors_files import CAPTURED_BATCH, INDEX_SUFFIX
from gradscope.sources.formats.tree import Opaque, Tree
from gradscope.sources.gradient_names import ALONE
from gradscope.sources.norm_logs import open_log_directory, open_norm_log
from gradscope.sources.parameters import named_tensors, parameters_in, require_gradients
from gradscope.sources.step_files import (
    StepFile,
    StepFiles,
    has_model_config,
    has_model_file,
    is_glob,
    paths_of_glob,
    steps_of_directory,
    steps_of_paths,
    weights_of_directory,
)
from gradscope.sources.traces import open_trace, trace_directory

As: TypeAlias = Literal["gradients", "weights"]
IN_MEMORY = "memory"


def open_source(
    source: Any, *, as_: As | str | None = None, weights: Any = None, tag: str | None = None
) -> GradientSource:
    """The gradients, weights or optimizer states in ``source``, whose format is told by its content.

    ``source`` is a path, a quoted glob, a list of paths (one step each), a ``GradientSource``, a mapping of names to
    tensors (numpy, torch or JAX; nested mappings too), a list of such mappings (one step each), a list of (name,
    tensor) pairs, or a module with ``named_parameters``; of parameters the ``.grad`` are taken.  ``as_``
    (``"gradients"`` or ``"weights"``) says what a bare mapping of tensors is.  ``weights`` (like ``source``) supplies
    the parameters that go with gradient dumps.  ``tag`` (a name or a glob) picks series of a log of norms, by default
    those that are called gradient norms.

    Raises:
        GradscopeError: it is missing, unreadable, damaged, of no known format, or holds no floating-point tensors.
    """
    if as_ not in (None, "gradients", "weights"):
        raise GradscopeError(f"--as {as_}", "must be gradients or weights")
    if isinstance(source, GradientSource) and weights is None:
        return source
    parameters = open_source(weights, as_="weights") if weights is not None else None
    opened = _opened(source, as_, parameters) if tag is None else _open_log(source, tag)
    if as_ is not None and opened.info.kind == "norm-log":
        raise GradscopeError(f"--as {as_}", f"goes with tensors, and {opened.info.path} is a log of norms")
    if parameters is not None and not isinstance(opened, GradientDumps):
        raise GradscopeError("--weights", f"goes with gradient dumps, and {opened.info.path} holds none")
    if parameters is not None:
        opened.notes += (
            f"The weights in {parameters.info.path} are for agc, which alone compares gradients with them.",
        )
    return opened


def _opened(source: Any, as_: str | None, parameters: GradientSource | None) -> GradientSource:
    if isinstance(source, GradientSource):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), as_, parameters)
    if _is_list_of_paths(source):
        paths = [Path(path) for path in source]
        if len(paths) == 1:
            return _open_path(paths[0], as_, parameters)
        return _open_steps(steps_of_paths(paths), _common_path(paths), as_, parameters)
    return _open_objects(source, as_, parameters)


def _open_log(source: Any, tag: str) -> GradientSource:
    """The series called ``tag`` of a log, which is looked for even where a checkpoint lies beside it."""
    given = source[0] if _is_list_of_paths(source) and len(source) == 1 else source
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        try:
            path.stat()
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        log = open_log_directory(path, tag) if path.is_dir() else open_norm_log(path, tag)
        if log is not None:
            return log
    what = given if isinstance(given, str | os.PathLike) else "this source"
    raise GradscopeError(f"--tag {tag}", f"goes with a log of norms, and {what} is none")


def _is_list_of_paths(source: object) -> bool:
    return (
        isinstance(source, list | tuple) and len(source) > 0 and all(isinstance(p, str | os.PathLike) for p in source)
    )


def _common_path(paths: Sequence[Path]) -> str:
    return (
        str(paths[0].parent) if len({path.parent for path in paths}) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _open_path(path: Path, as_: str | None, weights: GradientSource | None) -> GradientSource:
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if not is_glob(str(path)):
            raise unreadable(path, error) from None
        paths = paths_of_glob(str(path))
        if len(paths) > 1:
            return _open_steps(steps_of_paths(paths), str(path), as_, weights)
        path = paths[0]
    trace = trace_directory(path)
    if trace is not None:
        if as_ == "weights":
            raise GradscopeError(str(path), "is a recorded run, which holds no weights")
        return open_trace(trace)
    if path.is_dir():
        return _open_directory(path, as_, weights)
    log = open_norm_log(path) if not path.name.endswith(INDEX_SUFFIX) else None
    if log is not None:
        return log
    contents = read_contents(path)
    _refuse_captured_batch(path, contents, as_)
    recognised = _checkpoint(path, contents, as_)
    if recognised is not None:
        return recognised
    if as_ is None and (contents.weights or has_model_config(path.parent)):
        as_ = "weights"
    return _bare_tensors([dumped_step(StepFile(path.name, (path,)))], str(path), contents, as_, weights)


def _refuse_captured_batch(path: Path, contents: Contents, as_: str | None) -> None:
    if as_ is None and CAPTURED_BATCH in contents.metadata:
        hint = f"name the checkpoint that it goes with: gradscope inspect CHECKPOINT --batch {path}"
        raise GradscopeError(str(path), "is a captured batch, which holds no gradients itself", hint)


def _checkpoint(path: Path, contents: Contents, as_: str | None) -> GradientSource | None:
    """The checkpoint that a file holds, unless it can be none or is not to be taken for one."""
    if as_ == "gradients" or contents.bare:
        return None
    # Loading every family takes as long as reading a policy's gradients, which need none.
    from gradscope.sources import checkpoints

    return checkpoints.recognise(path, contents.tree)


def _open_directory(path: Path, as_: str | None, weights: GradientSource | None) -> GradientSource:
    if not os.access(path, os.R_OK | os.X_OK):
        raise GradscopeError(str(path), "permission denied")
    from gradscope.sources import checkpoints

    recognised = checkpoints.recognise_directory(path) if as_ != "gradients" else None
    if recognised is not None:
        return recognised
    if as_ == "weights":
        return _open_steps(StepFiles((weights_of_directory(path),)), str(path), as_, weights)
    try:
        steps = steps_of_directory(path)
    except GradscopeError:
        log = open_log_directory(path)
        if log is None:
            raise
        return log
    # Several files of tensors, none of them called a model, are steps even beside a config.json.
    if as_ is None and has_model_config(path) and (len(steps.steps) == 1 or has_model_file(path)):
        return _open_steps(StepFiles((weights_of_directory(path),)), str(path), "weights", weights)
    return _open_steps(steps, str(path), as_, weights)


def _open_steps(steps: StepFiles, path: str, as_: str | None, weights: GradientSource | None) -> GradientSource:
    first = steps.steps[0]
    contents = load_files(first.paths)
    _refuse_captured_batch(first.paths[0], contents, as_)
    recognised = _checkpoint(first.paths[0], contents, as_)
    if recognised is not None and len(steps.steps) == 1:
        return recognised
    if recognised is not None:
        raise GradscopeError(
            path,
            f"holds {len(steps.steps)} checkpoints ({recognised.info.format}), not gradient steps",
            f"name one of them, such as {steps.steps[-1].paths[0]}",
        )
    notes = (f"Left out: {', '.join(steps.ignored[:4])}.",) if steps.ignored else ()
    return _bare_tensors([dumped_step(step) for step in steps.steps], path, contents, as_, weights, notes)


def _bare_tensors(
    dumps: Sequence[DumpedStep],
    path: str,
    contents: Contents,
    as_: str | None,
    weights: GradientSource | None,
    notes: tuple[str, ...] = (),
) -> GradientSource:
    if as_ != "weights":
        return GradientDumps.of(dumps, path, contents, weights, notes)
    if len(dumps) > 1:
        raise GradscopeError(path, f"names {len(dumps)} files, of which one must be the weights", "name it alone")
    tree = contents.tree if isinstance(contents.tree, dict | list | tuple | Opaque) else {ALONE: contents.tree}
    from gradscope.sources import checkpoints

    source = checkpoints.weights_only(Path(path), tree, f"weights ({contents.format})")
    if not source.model:
        raise GradscopeError(path, "holds no floating-point tensors")
    source.notes = notes
    return source


# --- memory ----------------------------------------------------------------------------------------------------------


def _open_objects(source: Any, as_: str | None, weights: GradientSource | None) -> GradientSource:
    source = named_tensors(source, IN_MEMORY)
    steps = list(source) if _is_list_of_steps(source) else [source]
    parameters = parameters_in(steps[0]) if as_ != "weights" else []
    if parameters:
        require_gradients(parameters, IN_MEMORY)
        weights = weights or _open_objects(steps[0], "weights", None)
    convert = gradient_tree_of if parameters else tree_of
    loaded = [_objects_step(step, index, convert) for index, step in enumerate(steps)]
    return _bare_tensors(loaded, IN_MEMORY, loaded[0].load(), as_, weights)


def _is_list_of_steps(source: object) -> bool:
    return isinstance(source, list | tuple) and len(source) > 0 and all(isinstance(step, Mapping) for step in source)


def _objects_step(step: Any, index: int, convert: Callable[[Any, str], Tree]) -> DumpedStep:
    what = f"step {index}"
    return DumpedStep(what, what, lambda: Contents(convert(step, what), "in memory"))
