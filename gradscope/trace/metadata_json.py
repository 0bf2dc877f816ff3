"""``TraceMetadata`` as the text of ``trace.json``, and back."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from gradscope.trace.schema import LintFinding, RecordedGroup, RecordedTensor, TraceMetadata


def metadata_to_json(metadata: TraceMetadata) -> bytes:
    """The text of ``trace.json``; what ``extra`` holds beyond JSON's types is written as ``str()`` tells it."""
    tree = _plain(metadata)
    for name in ("tensors", "groups", "findings"):
        tree[name] = [_plain(part) for part in getattr(metadata, name)]
    return (json.dumps(tree, default=str, separators=(",", ":")) + "\n").encode()


def _plain(record: TraceMetadata | RecordedTensor | RecordedGroup | LintFinding) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
