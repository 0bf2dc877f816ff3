"""Checkpoints whose parts were replaced by something else: told in words, never in a traceback."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_training import lightning_checkpoint, rsl_rl_run, sb3_checkpoint

from gradscope.errors import GradscopeError
from gradscope.inspection import inspect
from gradscope.sources.checkpoints import recognise
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import Opaque, UnreadableTensor
from gradscope.sources.stored import MemoryTensor
from gradscope.tensors import TensorInfo

FILES: dict[str, Callable[[], Path]] = {
    "SB3": lambda: sb3_checkpoint("SAC"),
    "rsl_rl": lambda: rsl_rl_run() / "model_11.pt",
    "Lightning": lambda: lightning_checkpoint(2),
}
JUNK: list[Any] = [
    *(None, True, 0, -1, 2**63, 10**150, math.nan, math.inf, "", "x", b"y", 1 + 2j),
    *([], [0], (), {}, {"a": 1}, {1, 2}, Opaque("module", "Name"), UnreadableTensor("sparse tensor")),
    MemoryTensor(TensorInfo("", (), "float32"), np.array(3, np.float32)),
    MemoryTensor(TensorInfo("", (2,), "int64"), np.arange(2)),
    MemoryTensor(TensorInfo("", (0,), "float32"), np.zeros(0, np.float32)),
    MemoryTensor(TensorInfo("", (2, 2), "complex64"), np.zeros((2, 2), np.complex64)),
    MemoryTensor(TensorInfo("", (3,), "bfloat16"), np.full(3, 0x7FC0, np.uint16)),
]


@functools.cache
def tree_of(family: str) -> tuple[Path, Any, list[tuple[Any, ...]]]:
    path = FILES[family]()
    tree = read_contents(path).tree
    return path, tree, list(places(tree))


def places(node: Any, before: tuple[Any, ...] = ()) -> Any:
    yield before
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*before, key))


def replaced(node: Any, place: tuple[Any, ...], junk: Any, as_key: bool) -> Any:
    if not place:
        return junk
    key, *rest = place
    if isinstance(node, list):
        return [replaced(child, tuple(rest), junk, as_key) if i == key else child for i, child in enumerate(node)]
    changed = dict(node)
    if as_key and not rest and junk.__hash__ is not None:
        changed[junk] = changed.pop(key)
    else:
        changed[key] = replaced(node[key], tuple(rest), junk, as_key)
    return changed


@pytest.mark.parametrize("family", FILES)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_anything_may_stand_anywhere(family: str, data: st.DataObject) -> None:
    path, tree, where = tree_of(family)
    damaged = replaced(
        tree, data.draw(st.sampled_from(where)), data.draw(st.sampled_from(JUNK)), data.draw(st.booleans())
    )
    try:
        source = recognise(path, damaged)
        told = [] if source is None else inspect(source, max_norm=0.5).optimizers
    except GradscopeError as error:
        assert "\n" not in str(error)
        return
    for optimizer in told:
        assert optimizer.recent_norm is None or optimizer.recent_norm >= 0.0
        assert optimizer.recent_norm is not None or optimizer.unavailable
