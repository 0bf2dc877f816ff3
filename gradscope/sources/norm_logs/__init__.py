"""Logs of gradient norms: TensorBoard event files, a Trainer's log, W&B exports, CSV, JSON and Parquet.

They hold one number for a step, or one for each layer: enough for what a norm decides, and no more.
"""

from __future__ import annotations

from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.norm_logs.kinds import Kind, kind_of_log

__all__ = ["kind_of_log", "open_log_directory", "open_norm_log"]

EXPORT_FROM_WANDB = (
    "export its history: import wandb, pandas; pandas.DataFrame(wandb.Api().run('ENTITY/PROJECT/RUN')"
    ".scan_history(keys=['_step', 'train/grad_norm'])).to_csv('norms.csv')"
)


def open_norm_log(path: Path, tag: str | None = None) -> GradientSource | None:
    """The log of norms in the file at ``path``, of the series called ``tag`` (a name or a glob); None if it is none.

    Raises:
        GradscopeError: it is damaged, holds no gradient norm, or several of which one must be chosen.
    """
    region = FileRegion.whole(path)
    kind = kind_of_log(region) if region.size else None
    return None if kind is None else _open(region, kind, tag)


def open_log_directory(path: Path, tag: str | None = None) -> GradientSource | None:
    """The log of the one run in the directory at ``path``; None if there is none.

    Raises:
        GradscopeError: there are several runs, or as for a file.
    """
    from gradscope.sources.norm_logs.directories import log_in_directory

    found = log_in_directory(path)
    if not isinstance(found, list):
        return None if found is None else open_norm_log(found, tag)
    return _open_events(found, str(path), tag)


def _open_events(paths: list[Path], what: str, tag: str | None) -> GradientSource:
    from gradscope.sources.norm_logs.event_files import read_event_files
    from gradscope.sources.norm_logs.source import norm_log_source
    from gradscope.sources.norm_logs.tags import Tags

    tags = Tags(what, tag)
    return norm_log_source(read_event_files(paths, what, tags), what, tags)


def _open(region: FileRegion, kind: Kind, tag: str | None) -> GradientSource:
    what = str(region.path)
    if kind == "W&B run":
        raise GradscopeError(what, "is a W&B run in the form that only W&B reads", EXPORT_FROM_WANDB)
    if kind == "event file":
        return _open_events([Path(what)], what, tag)
    # The readers load with the file that needs them.
    from gradscope.sources.norm_logs.source import norm_log_source
    from gradscope.sources.norm_logs.tags import Tags

    tags = Tags(what, tag)
    if kind == "Parquet":
        from gradscope.sources.norm_logs.parquet_logs import read_parquet_log

        return norm_log_source(read_parquet_log(what, tags), what, tags)
    if kind == "JSON":
        from gradscope.sources.norm_logs.json_logs import read_json_log

        return norm_log_source(read_json_log(region, what, tags), what, tags)
    from gradscope.sources.norm_logs.csv_logs import read_csv_log

    return norm_log_source(read_csv_log(region, what, tags), what, tags)
