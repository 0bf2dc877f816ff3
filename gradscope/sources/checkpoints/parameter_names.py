"""Which parameter an optimizer's i-th state belongs to.

PyTorch keys optimizer state by position, so names come from the model's own list: by order and shape, where that
leaves no doubt.  Where it does, a parameter stays ``param[i]``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradscope.spectrum import FLOAT_DTYPES
from gradscope.tensors import TensorInfo

Shape = tuple[int, ...] | None  # None: the state does not tell it
Candidate = Sequence[TensorInfo]

# Module buffers, which live in a state dict beside the parameters but are in no optimizer.
_BUFFER = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|ra_mean|ra_var|inv_freq|position_ids|masked_bias"
    r"|\w*normali[sz]er\.(\w+\.)*(_?mean|_?var|_?std|_?count|until|disc_avg))$"
)


def is_float(info: TensorInfo) -> bool:
    """Whether gradscope can take norms of a tensor of this dtype."""
    return info.dtype in FLOAT_DTYPES


def is_buffer(name: str) -> bool:
    """Whether a state dict's entry of this name is a buffer of PyTorch's, rsl_rl's or sb3-contrib's modules."""
    return _BUFFER.search(name) is not None


def with_prefix(tensors: Candidate, prefix: str) -> Candidate:
    """Those of ``tensors`` whose names start with ``prefix``, names unchanged."""
    return [info for info in tensors if info.name.startswith(prefix)]


def top_level_parts(tensors: Candidate) -> list[Candidate]:
    """``tensors`` by the first dotted part of their names, where there is more than one."""
    parts: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        parts.setdefault(info.name.split(".")[0], []).append(info)
    return list(parts.values()) if len(parts) > 1 else []


def names_in_order(shapes: Sequence[Shape], whole: Candidate, parts: Iterable[Candidate] = ()) -> list[str] | None:
    """The names of the parameters of these ``shapes``, in their order; None if in doubt.

    They are all of ``whole`` or of one of its ``parts`` if those have the same shapes in order.  Else (frozen
    parameters, unknown buffers) they are those of ``whole`` among which the shapes can be found, in order, in exactly
    one way.  Matches that give different names are a doubt.
    """
    if not any(shape is not None for shape in shapes):
        return None
    same_length = [candidate for candidate in (whole, *parts) if len(candidate) == len(shapes)]
    found = {tuple(info.name for info in c) for c in same_length if all(map(_fits, shapes, c))}
    if found:
        return list(found.pop()) if len(found) == 1 else None
    return _only_embedding(shapes, whole)


@dataclass(frozen=True, slots=True)
class InOrder:
    """Names parameters by ``names_in_order``, over all parameter groups in turn."""

    whole: Candidate
    parts: Sequence[Candidate] = ()

    def __call__(self, shapes: Sequence[Sequence[Shape]]) -> Sequence[str | None] | None:
        """A name for each of ``shapes``, which are listed by parameter group; None if in doubt."""
        return names_in_order([shape for group in shapes for shape in group], self.whole, self.parts)


def _fits(shape: Shape, info: TensorInfo) -> bool:
    return shape is None or shape == info.shape


def _only_embedding(shapes: Sequence[Shape], candidate: Candidate) -> list[str] | None:
    """The names of ``shapes`` as a subsequence of ``candidate``, if there is exactly one.

    It is the only one exactly when matching greedily from the left and from the right gives the same.
    """
    left = _greedy(shapes, candidate)
    right = _greedy(list(reversed(shapes)), list(reversed(candidate)))
    if left is None or right is None or left != [len(candidate) - 1 - i for i in reversed(right)]:
        return None
    return [candidate[i].name for i in left]


def _greedy(shapes: Sequence[Shape], candidate: Candidate) -> list[int] | None:
    places: list[int] = []
    position = 0
    for shape in shapes:
        while position < len(candidate) and not _fits(shape, candidate[position]):
            position += 1
        if position == len(candidate):
            return None
        places.append(position)
        position += 1
    return places


def names_by_shape(shapes: Sequence[Shape], tensors: Candidate) -> list[str | None] | None:
    """Names for parameters whose module order the file does not keep (safetensors sorts its tensors by name).

    None unless ``tensors`` have the same shapes in some order.  A name is given only where it is certain: to a shape
    that occurs once, and to one that occurs only as the same parameter of numbered layers, which a model holds in the
    order of their numbers; the others are None.
    """
    wanted: dict[Shape, list[int]] = defaultdict(list)
    held: dict[Shape, list[str]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        wanted[shape].append(i)
    for info in tensors:
        held[info.shape].append(info.name)
    if {shape: len(places) for shape, places in wanted.items()} != {s: len(n) for s, n in held.items()}:
        return None
    names: list[str | None] = [None] * len(shapes)
    for shape, places in wanted.items():
        ordered = _in_layer_order(held[shape])
        for place, name in zip(places[: len(ordered)], ordered, strict=True):
            names[place] = name
    return names


def _in_layer_order(names: Sequence[str]) -> Sequence[str]:
    """``names`` sorted by their layer's number if that is all they differ in, else none of them."""
    if len(names) == 1:
        return names
    pieces = [re.split(r"(?<![^.])(\d+)(?![^.])", name) for name in names]
    if len({tuple(p[0::2]) for p in pieces}) > 1:
        return []
    numbered = sorted((tuple(int(n) for n in p[1::2]), name) for p, name in zip(pieces, names, strict=True))
    if any(first[0] == second[0] for first, second in pairwise(numbered)):
        return []
    return [name for _, name in numbered]


def decay_split(tensors: Candidate, pattern: str | None) -> tuple[Candidate, Candidate]:
    """Weights that decay and those that do not (``pattern`` in the name, else vectors), as trainers group them."""

    def decays(info: TensorInfo) -> bool:
        return not re.search(pattern, info.name.lower()) if pattern else len(info.shape) > 1

    return [info for info in tensors if decays(info)], [info for info in tensors if not decays(info)]
