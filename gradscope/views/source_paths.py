"""The path of a source as a code host knows it: relative to the repository."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote


def path_in_workspace(path: str) -> str | None:
    """``path`` relative to the workspace, with forward slashes; None where it lies outside.

    The workspace is what GitHub Actions says it is, else the current directory.
    """
    workspace = os.path.realpath(os.environ.get("GITHUB_WORKSPACE") or os.curdir)
    real = os.path.realpath(path)
    try:
        inside = os.path.commonpath((workspace, real)) == workspace
    except ValueError:  # Another drive.
        return None
    return Path(os.path.relpath(real, workspace)).as_posix() if inside else None


def uri_of(path: str) -> str:
    """The URI of ``path`` (RFC 3986): relative within the workspace, else ``file:``."""
    inside = path_in_workspace(path)
    if inside is not None:
        # A colon in the first segment would make it a scheme.
        return quote(os.fsencode(inside), safe="/")
    return Path(os.path.realpath(path)).as_uri()
