"""Which tensor of one source is which of another, where wrappers put a prefix before their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradscope.tensors import TensorInfo

# What DataParallel, torch.compile, FSDP, activation checkpointing and trainers put around a model.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LEADING = ("module", "model", "network", "net")


@dataclass(frozen=True, slots=True)
class MatchedTensors:
    """``pairs`` are places (a, b) of the same tensor, in the order of a; the others are ``only`` in one of them.

    ``reshaped`` are those of the pairs that were left out because their shapes differ.  ``renamed`` says which prefix
    was looked past, None where none was.
    """

    pairs: tuple[tuple[int, int], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[tuple[int, int], ...]
    renamed: str | None


def match_tensors(a: Sequence[TensorInfo], b: Sequence[TensorInfo]) -> MatchedTensors:
    """The tensors that ``a`` and ``b`` share: by their names, else by their names without a prefix of wrappers.

    Names that differ by anything else than one common prefix or a wrapper's name are different tensors; so are
    tensors of different shape, unless one of them is not known (no elements).
    """
    places = {tensor.name: i for i, tensor in enumerate(b)}
    pairs = {i: places[tensor.name] for i, tensor in enumerate(a) if tensor.name in places}
    taken = set(pairs.values())
    left_a = [i for i in range(len(a)) if i not in pairs]
    left_b = [i for i in range(len(b)) if i not in taken]
    renamed = None
    if left_a and left_b:
        found = _unwrapped(a, b, left_a, left_b) or _prefixed(a, b, left_a, left_b)
        if found:
            pairs.update(found)
            i, j = next(iter(found.items()))
            renamed = f"{a[i].name} is {b[j].name}"
    taken = set(pairs.values())
    same = {i: j for i, j in pairs.items() if _same_shape(a[i], b[j])}
    return MatchedTensors(
        tuple(sorted(same.items())),
        tuple(tensor.name for i, tensor in enumerate(a) if i not in pairs),
        tuple(tensor.name for j, tensor in enumerate(b) if j not in taken),
        tuple((i, j) for i, j in sorted(pairs.items()) if i not in same),
        renamed,
    )


def plain_name(name: str) -> str:
    """``name`` without the names of wrappers."""
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts = parts[1:]
    return ".".join(parts)


def _same_shape(a: TensorInfo, b: TensorInfo) -> bool:
    return a.shape == b.shape or not a.numel or not b.numel


def _unwrapped(
    a: Sequence[TensorInfo], b: Sequence[TensorInfo], left_a: Sequence[int], left_b: Sequence[int]
) -> dict[int, int]:
    """By plain names, where these are unique on both sides."""
    plain_a = [plain_name(a[i].name) for i in left_a]
    plain_b = {plain_name(b[j].name): j for j in left_b}
    if len(set(plain_a)) < len(plain_a) or len(plain_b) < len(left_b):
        return {}
    return {i: plain_b[name] for i, name in zip(left_a, plain_a, strict=True) if name in plain_b}


def _prefixed(
    a: Sequence[TensorInfo], b: Sequence[TensorInfo], left_a: Sequence[int], left_b: Sequence[int]
) -> dict[int, int]:
    """By one prefix that, put before every name of one side, gives names of the other."""
    if len(left_a) > len(left_b):
        return {i: j for j, i in _prefixed(b, a, left_b, left_a).items()}
    first = a[left_a[0]].name
    names = {b[j].name: j for j in left_b}
    for name in names:
        prefix = name[: -len(first)] if name.endswith(f".{first}") else None
        if prefix is not None and all(f"{prefix}{a[i].name}" in names for i in left_a):
            return {i: names[f"{prefix}{a[i].name}"] for i in left_a}
    return {}
