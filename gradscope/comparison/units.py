"""The units in which two sources are compared: tensors, the layers and clip groups they make up, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradscope.comparison.matched_names import MatchedTensors, match_tensors
from gradscope.comparison.side import Side
from gradscope.errors import GradscopeError
from gradscope.step_table import members_of
from gradscope.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Unit:
    """What is compared: the places of its tensors on either side."""

    name: str
    name_in_b: str
    a: tuple[int, ...]
    b: tuple[int, ...]


def matched_sides(a: Side, b: Side) -> MatchedTensors:
    """The tensors of both; of a log of norms only another log has the series."""
    if (a.kind == "norm-log") != (b.kind == "norm-log"):
        return MatchedTensors((), (), (), (), None)
    matched = match_tensors(a.tensors, b.tensors)
    if not matched.pairs and a.kind != "norm-log":
        if matched.reshaped:
            shapes = reshaped_words(*(side.tensors[i] for side, i in zip((a, b), matched.reshaped[0], strict=True)))
            raise GradscopeError(
                b.source.info.path, f"shares no tensor of the same shape with {a.source.info.path}", shapes
            )
        raise GradscopeError(
            b.source.info.path,
            f"shares no tensor with {a.source.info.path}",
            f"the first names {a.tensors[0].name}, the second {b.tensors[0].name}",
        )
    return matched


def reshaped_words(a: TensorInfo, b: TensorInfo) -> str:
    """``w: 4×8 in A, 8×4 in B``."""
    return f"{a.name}: {_shape(a)} in A, {_shape(b)} in B"


def _shape(tensor: TensorInfo) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"


def whole_unit(a: Side, b: Side, matched: MatchedTensors) -> Unit:
    """All tensors that both have; everything where one side is a log of norms."""
    if not matched.pairs:
        return Unit("all", "all", tuple(range(len(a.tensors))), tuple(range(len(b.tensors))))
    return _unit("all", "all", matched.pairs)


def divided_units(a: Side, b: Side, matched: MatchedTensors) -> dict[str, list[Unit]]:
    """What both have, by ``tensors``, ``layers`` and ``groups``; a log of norms has neither of the latter."""
    tensors = [Unit(a.tensors[i].name, b.tensors[j].name, (i,), (j,)) for i, j in matched.pairs]
    if "norm-log" in (a.kind, b.kind):
        return {"tensors": tensors, "layers": [], "groups": []}
    return {"tensors": tensors, "layers": _layer_units(a, b, matched), "groups": _group_units(a, b, matched)}


def _layer_units(a: Side, b: Side, matched: MatchedTensors) -> list[Unit]:
    layers: dict[str, list[tuple[int, int]]] = {}
    for i, j in matched.pairs:
        layers.setdefault(a.tensors[i].layer, []).append((i, j))
    return [_unit(name, b.tensors[held[0][1]].layer, held) for name, held in layers.items()]


def _group_units(a: Side, b: Side, matched: MatchedTensors) -> list[Unit]:
    """Clip groups of the same name, by the tensors that both hold in them; or the only group on each side."""
    own = members_of(a.tensors, a.groups), members_of(b.tensors, b.groups)
    if len(own[0]) == len(own[1]) == 1:
        names = [(next(iter(own[0])), next(iter(own[1])))]
    else:
        names = [(name, name) for name in own[0] if name in own[1]]
    units = []
    for name, other in names:
        places_a, places_b = set(own[0][name]), set(own[1][other])
        held = [(i, j) for i, j in matched.pairs if i in places_a and j in places_b]
        if held:
            units.append(_unit(name, other, held))
    return units


def _unit(name: str, name_in_b: str, pairs: Sequence[tuple[int, int]]) -> Unit:
    return Unit(name, name_in_b, tuple(i for i, _ in pairs), tuple(j for _, j in pairs))
