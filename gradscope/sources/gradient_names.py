"""Which tensors of a tree are gradients, which weights, and what their parameters are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gradscope.errors import GradscopeError
from gradscope.sources.formats.tree import Leaf, Opaque, Tree, UnreadableTensor, named_leaves
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, StreamTensor

FLOATING = frozenset(("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"))
# The first or last part of a name that says "this is the gradient" or "this is the parameter itself".
GRADIENT_WORDS = frozenset(("grad", "grads", "gradient", "gradients"))
WEIGHT_WORDS = frozenset(("param", "params", "parameters", "data", "value", "weight", "weights", "model", "state_dict"))
ALONE = "gradient"
NAMELESS = "nameless"


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """The floating tensors of a file by parameter name; what was skipped and why; parameters without a gradient."""

    gradients: dict[str, StoredTensor]
    weights: dict[str, StoredTensor]
    skipped: tuple[str, ...]
    absent: frozenset[str]


def gradients_of(tree: Tree, what: str) -> NamedTensors:
    """The gradients in ``tree``, each named after its parameter.

    ``{name: gradient}`` in any nesting, or gradients beside their parameters: ``{"w.grad": g, "w": w}``,
    ``{"w": {"grad": g, "param": w}}``, ``{"grads": {"w": g}, "params": {"w": w}}``.

    Raises:
        GradscopeError: there is no floating-point tensor, or two have one name.
    """
    if isinstance(tree, Opaque) and tree.mapping is None and not tree.module.startswith("__torch__"):
        raise GradscopeError(
            what,
            f"holds an object of the class {tree.module}.{tree.name}, not a mapping of tensors",
            "save the gradients by name: torch.save({name: p.grad for name, p in model.named_parameters()}, FILE)",
        )
    found = tuple(named_leaves(tree, what))
    # Beside others a tensor without a name is no gradient among parameters.
    nameless = ALONE if len(found) == 1 else NAMELESS
    leaves = dict(_unique(((name or nameless, leaf) for name, leaf in found), what))
    marked = {name: parameter for name in leaves if (parameter := _without(name, GRADIENT_WORDS)) is not None}
    if not marked:
        return _floating(leaves, {}, what)
    gradients: dict[str, Leaf] = dict(_unique(((parameter, leaves[name]) for name, parameter in marked.items()), what))
    weights: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        if name in marked or leaf is None:
            continue
        for parameter in (name, _without(name, WEIGHT_WORDS)):
            if parameter in gradients:
                weights[parameter] = leaf
                break
    return _floating(gradients, weights, what)


def _without(name: str, words: frozenset[str]) -> str | None:
    """``name`` without its last or first part, where that is one of ``words``; None where neither is."""
    parts = name.split(".")
    if parts[-1] in words:
        return ".".join(parts[:-1]) or ALONE
    if parts[0] in words:
        return ".".join(parts[1:])
    return None


def _unique(leaves: Iterable[tuple[str, Leaf]], what: str) -> Iterable[tuple[str, Leaf]]:
    seen = set()
    for name, leaf in leaves:
        if name in seen:
            raise GradscopeError(what, f"holds two tensors named {name!r}")
        seen.add(name)
        yield name or ALONE, leaf


def _floating(gradients: dict[str, Leaf], weights: dict[str, Leaf], what: str) -> NamedTensors:
    kept, skipped, absent = {}, [], set()
    for name, leaf in gradients.items():
        if leaf is None:
            absent.add(name)
            skipped.append(f"{name}: None (no gradient)")
        elif isinstance(leaf, UnreadableTensor):
            skipped.append(f"{name}: {leaf.reason}")
        elif leaf.info.dtype not in FLOATING:
            skipped.append(f"{name}: {leaf.info.dtype}")
        else:
            kept[name] = _renamed(leaf, name)
    if not kept:
        raise GradscopeError(what, "holds no floating-point tensors" + (f" ({_shortened(skipped)})" if skipped else ""))
    own = {
        name: _renamed(leaf, name)
        for name, leaf in weights.items()
        if isinstance(leaf, FileTensor | MemoryTensor | StreamTensor) and leaf.info.dtype in FLOATING
    }
    return NamedTensors(kept, own, tuple(skipped), frozenset(absent))


def _renamed(leaf: StoredTensor, name: str) -> StoredTensor:
    return leaf if leaf.info.name == name else replace(leaf, info=replace(leaf.info, name=name))


def _shortened(reasons: list[str]) -> str:
    return ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")
