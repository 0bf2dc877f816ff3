"""Logs of gradient norms, told by their content.  Reading them is not supported yet; each is refused by its name."""

from __future__ import annotations

import os
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.gradients import SAVE_GRADIENTS
from gradscope.sources.formats.file_region import FileRegion

SCANNED_BYTES = 1 << 20
# Tags that only these two write; neither logs a gradient norm.
RL_TAGS = {
    "Stable-Baselines3": (b"rollout/ep_rew_mean", b"time/total_timesteps", b"train/n_updates"),
    "rsl_rl": (b"Loss/value_function", b"Policy/mean_noise_std", b"Train/mean_episode_length"),
}


def refuse_norm_log(region: FileRegion) -> None:
    """Say so if the file is a log.

    Raises:
        GradscopeError: it is one.
    """
    with region.open() as stream:
        head = stream.read(SCANNED_BYTES)
    what = str(region.path)
    if b"brain.Event:" in head[:64]:
        _refuse_events(what, head)
    kind = _kind_of_log(head)
    if kind is not None:
        raise GradscopeError(what, f"is {kind}: reading norm logs is not supported yet")


def refuse_log_directory(path: Path) -> None:
    """Say so if the directory holds event files or is a trace.

    Raises:
        GradscopeError: it does.
    """
    names = sorted(os.listdir(path))
    if path.suffix == ".gradscope" or "trace.json" in names:
        raise GradscopeError(str(path), "is a gradscope trace: reading traces is not supported yet")
    for name in names:
        if "tfevents" in name and (path / name).is_file():
            refuse_norm_log(FileRegion.whole(path / name))


def _refuse_events(what: str, head: bytes) -> None:
    for library, tags in RL_TAGS.items():
        if any(tag in head for tag in tags):
            raise GradscopeError(
                what,
                f"is an event file of {library}, which logs no gradient norm",
                f"{SAVE_GRADIENTS} (`gradscope record -- python train.py` comes with a later version)",
            )
    raise GradscopeError(what, "is a TensorBoard event file: reading TensorBoard event files is not supported yet")


def _kind_of_log(head: bytes) -> str | None:
    if head.startswith(b"PAR1"):
        return "a Parquet file"
    if head.startswith(b":W&B"):
        return "a W&B run"
    if head[:1] in (b"{", b"[") and b"\0" not in head:
        return "the log of a Hugging Face Trainer" if b'"log_history"' in head else "JSON"
    commas = [line.count(b",") for line in head[:4096].splitlines()[:2]]
    return "CSV" if b"\0" not in head and commas and commas[0] > 0 and len(set(commas)) == 1 else None
