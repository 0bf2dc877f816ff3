"""What a comparison means, in sentences: the first lines of every output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope.comparison_results import Both, ClipComparison, Comparison, OptimizerSide, UnitComparison
from gradscope.findings import policy_words
from gradscope.notation import angle, called, count, names, number, percent, setting

MEASURES = {"norm": "norm", "recent_norm": "recent norm", "weight_norm": "weight norm"}


def comparison_findings(comparison: Comparison) -> tuple[str, ...]:
    """The sentences for a comparison, most important first."""
    return tuple(dict.fromkeys(_sentences(comparison)))


def ratio_words(unit: UnitComparison) -> str:
    """``2.10× (1.93 to 2.31)``: the ratio, with its interval where one is known."""
    if unit.ratio is None:
        return f"zero in {'B' if unit.typical.a else 'A'}{' and B' if not (unit.typical.a or unit.typical.b) else ''}"
    if unit.ratio_ci95 is None or unit.ratio_ci95[0] == unit.ratio_ci95[1]:
        return times(unit.ratio)
    return f"{times(unit.ratio)} ({bounds(unit.ratio_ci95)})"


def times(ratio: float) -> str:
    """A ratio: ``1.04×``, ``65,536×``."""
    return f"{number(ratio)}×"


def bounds(interval: tuple[float, float], between: str = " to ") -> str:
    """An interval: ``1.93 to 2.31``, with as many digits as tell its ends from each other and from 1."""
    low, high = (_end(bound) for bound in interval)
    if low == high:
        low, high = (number(bound, 6) for bound in interval)
    return f"{low}{between}{high}"


def _end(bound: float) -> str:
    """With as few digits as tell it from 1, from three to six."""
    told = [number(bound, digits) for digits in range(3, 7)]
    return next((text for text in told if float(text.replace(",", "")) != 1.0), told[0])


def units_of(comparison: Comparison) -> tuple[str, tuple[UnitComparison, ...]]:
    """What is told apart in the sentences: layers, else the series of logs."""
    return ("layers", comparison.layers) if comparison.layers else ("series", comparison.tensors)


def _sentences(comparison: Comparison) -> Iterator[str]:
    yield from _nonfinite(comparison)
    if comparison.verdict == "identical":
        yield _identical(comparison)
    elif comparison.constant_ratio is not None:
        yield from _constant(comparison)
        if not (comparison.constant_ratio.exact or comparison.constant_ratio.explanations):
            yield from _units(comparison)
    elif comparison.overall is not None:
        yield from _sizes(comparison)
    yield from _only(comparison)
    yield from _reshaped(comparison)
    # A table tells of more.
    for clip in comparison.recorded[:1] if comparison.verdict != "identical" else ():
        yield _recorded(clip)
    for clip in comparison.policies:
        yield _simulated(clip)
    yield from _zeros(comparison)
    yield from _shapes(comparison)
    yield from _optimizers(comparison.optimizers)
    if comparison.renamed is not None:
        yield f"Names were matched past a prefix: {comparison.renamed}."


def _identical(comparison: Comparison) -> str:
    steps = comparison.steps.a
    if not steps:
        return "Identical: every number that they hold is the same."
    where = "the one step" if steps == 1 else f"all {count(steps)} steps"
    if "norm-log" in (comparison.sources.a.kind, comparison.sources.b.kind):
        return f"Identical, as far as norms tell: they are the same at {where}."
    return f"Identical: norm, largest magnitude and zeros of every tensor are the same at {where}."


def _nonfinite(comparison: Comparison) -> Iterator[str]:
    held = comparison.nonfinite_steps
    if held.a or held.b:
        told = [
            f"{letter} holds NaN or Inf at {count(n)} of {count(steps)} steps"
            for letter, n, steps in (("A", held.a, comparison.steps.a), ("B", held.b, comparison.steps.b))
            if n
        ]
        yield f"{' and '.join(told)}{'' if len(told) > 1 else ', ' + ('B' if held.a else 'A') + ' at none'}; left out."


def _constant(comparison: Comparison) -> Iterator[str]:
    constant = comparison.constant_ratio
    assert constant is not None
    what = MEASURES[comparison.measure or "norm"]
    if constant.exact:
        where = ", at every step" if comparison.steps.a > 1 else ""
        yield f"Every {what} in B is {_exactly(constant.ratio)} times that in A{where}."
    else:
        assert constant.ci95 is not None
        yield f"Every layer's {what} in B is about {number(constant.ratio)} times that in A ({bounds(constant.ci95)})."
    if constant.explanations:
        yield f"That may be {'; or '.join(constant.explanations)}."


def _exactly(ratio: float) -> str:
    """The whole number, or one part of such, that a ratio is but for rounding."""
    for value, text in ((ratio, "{}"), (1.0 / ratio, "1/{}")):
        if round(value) >= 1 and abs(value / round(value) - 1.0) < 1e-3:
            return text.format(count(round(value)))
    return number(ratio, 4)


def _sizes(comparison: Comparison) -> Iterator[str]:
    overall = comparison.overall
    assert overall is not None
    what = {"norm": "global norm", "recent_norm": "global recent norm", "weight_norm": "global weight norm"}[
        comparison.measure or "norm"
    ]
    typical = overall.typical
    sizes = f"{number(typical.a or 0.0)} in A, {number(typical.b or 0.0)} in B"
    if overall.verdict == "identical":
        yield f"The {what} is the same: {number(typical.a or 0.0)}."
    elif overall.ratio is None:
        yield f"The {what} is {sizes}."
    elif overall.verdict == "within noise":
        yield f"The {what} does not differ beyond noise: {sizes}, {ratio_words(overall)}."
    elif overall.verdict == "differs":
        yield f"The {what} differs beyond noise: {sizes}, {ratio_words(overall)}."
    else:
        yield f"The {what} is {sizes}, {ratio_words(overall)}{_why_unknown(comparison)}."
    yield from _units(comparison)


def _why_unknown(comparison: Comparison) -> str:
    if comparison.measure != "norm":
        return ""
    return "; too few independent steps to tell whether that is noise"


def _units(comparison: Comparison) -> Iterator[str]:
    kind, units = units_of(comparison)
    if len(units) < 2:
        return
    one = kind.removesuffix("s") if kind == "layers" else kind
    differ = [unit for unit in units if unit.verdict == "differs"]
    known = [unit for unit in units if unit.verdict != "unknown"]
    if differ:
        most = f"{called(differ[0].name, one)}: {ratio_words(differ[0])}"
        if len(differ) == 1:
            yield f"1 of {count(len(units))} {kind} differs beyond noise, {most}."
        else:
            of = f"{count(len(differ))} of {count(len(units))}"
            which = of if len(differ) < len(units) else f"All {count(len(units))}" if len(units) > 2 else "Both"
            yield f"{which} {kind} differ beyond noise, most {most}."
    elif known and all(unit.verdict == "identical" for unit in units):
        yield f"All {count(len(units))} {kind} are the same."
    elif known:
        yield f"None of {count(len(known))} {kind} differs beyond noise{_not_told(len(units) - len(known))}."
    else:
        told = [unit for unit in units if unit.ratio is not None]
        if told:
            yield f"The {one} that differs most is {called(told[0].name, one)}: {ratio_words(told[0])}."


def _not_told(others: int) -> str:
    return f"; of {count(others)} more too few independent steps tell" if others else ""


def _only(comparison: Comparison) -> Iterator[str]:
    for letter, held in (("A", comparison.only.a), ("B", comparison.only.b)):
        if held:
            layers = list(dict.fromkeys(called(name.rsplit(".", 1)[0]) for name in held))
            tensors = f"{count(len(held))} tensor{'s' * (len(held) > 1)}"
            yield f"Only {letter} has {tensors}, in {names(layers)}: not compared."


def _reshaped(comparison: Comparison) -> Iterator[str]:
    held = comparison.reshaped
    if held:
        tensors = "1 tensor has" if len(held) == 1 else f"{count(len(held))} tensors have"
        yield f"{tensors} another shape in B and {'is' if len(held) == 1 else 'are'} not compared: {held[0]}."


def _recorded(clip: ClipComparison) -> str:
    whose = "" if clip.name == "all" else f" {clip.name}'s"
    limits = [_limit(clip.max_norm.a, clip.clip_value.a), _limit(clip.max_norm.b, clip.clip_value.b)]
    same = limits[0] == limits[1]
    told = [
        f"{percent(rate.clip_rate)}{'' if same or not limit else f' ({limit})'}"
        for rate, limit in zip((clip.rate.a, clip.rate.b), limits, strict=True)
    ]
    of = "gradients" if whose else "updates"
    if clip.rate.a.clip_rate == clip.rate.b.clip_rate:
        at = f" at {limits[0]}" if limits[0] else ""
        at = at if same else f": A at {limits[0] or 'no fixed limit'}, B at {limits[1] or 'no fixed limit'}"
        return f"Both clipped {percent(clip.rate.a.clip_rate)} of their{whose} {of}{at}."
    at = f" at {limits[0]}" if same and limits[0] else ""
    return f"A clipped {told[0]} of its{whose} {of}{at}, B {told[1]}{_apart(clip)}."


def _limit(max_norm: float | None, clip_value: float | None) -> str:
    held = [(name, value) for name, value in (("max_norm", max_norm), ("clip_value", clip_value)) if value is not None]
    return ", ".join(f"{name} {setting(value)}" for name, value in held)


def _simulated(clip: ClipComparison) -> str:
    drops = "drop" if (clip.policy or "").startswith("skip:") else "clip"
    mine, theirs = clip.rate.a.clip_rate, clip.rate.b.clip_rate
    shares = f"{percent(mine)} of both" if mine == theirs else f"{percent(mine)} of A and {percent(theirs)} of B"
    said = f"{policy_words(clip.policy or '')} would {drops} {shares}{'' if mine == theirs else _apart(clip)}"
    turned = clip.direction_change_deg
    if turned is not None and turned.a is not None and turned.b is not None and max(turned.a, turned.b) > 1e-6:
        said += f"; the median direction change is {angle(turned.a)} and {angle(turned.b)}"
    return f"{said}."


def _apart(clip: ClipComparison) -> str:
    if clip.differs is None:
        return " (too few independent steps for an interval)"
    return ": these differ" if clip.differs else ": no difference beyond noise"


def _zeros(comparison: Comparison) -> Iterator[str]:
    differ = [unit for unit in units_of(comparison)[1] if unit.zeros_differ and unit.zeros is not None]
    if differ:
        most = max(differ, key=lambda unit: abs(unit.zeros.b - unit.zeros.a) if unit.zeros else 0.0)
        assert most.zeros is not None
        others = "" if len(differ) == 1 else f" (and {count(len(differ) - 1)} more)"
        yield (
            f"Zeros differ in {called(most.name)}{others}: {percent(most.zeros.a)} of its elements in A, "
            f"{percent(most.zeros.b)} in B."
        )


def _shapes(comparison: Comparison) -> Iterator[str]:
    differ = [unit for unit in units_of(comparison)[1] if unit.shape_differs]
    if differ:
        most = max(differ, key=lambda unit: unit.shape_distance or 0.0)
        layers = "1 layer" if len(differ) == 1 else f"{count(len(differ))} layers"
        yield (
            f"Magnitudes spread otherwise in {layers}, most in {called(most.name)}: "
            f"{number(most.shape_distance or 0.0, 2)} octaves apart, where halves of one run are "
            f"{number(most.shape_noise or 0.0, 2)} apart."
        )


def _optimizers(optimizers: Both[tuple[OptimizerSide, ...]]) -> Iterator[str]:
    for a, b in _paired(optimizers.a, optimizers.b):
        settings = (
            ("type", a.type, b.type),
            ("lr", _set(a.lr), _set(b.lr)),
            ("max_norm", _set(a.max_norm), _set(b.max_norm)),
        )
        differ = [f"{name} {one} in A, {other} in B" for name, one, other in settings if one and other and one != other]
        if differ:
            yield f"The optimizers differ: {'; '.join(differ)}."
        if a.saturation is not None and b.saturation is not None:
            held = [percent(min(1.0, saturation)) for saturation in (a.saturation, b.saturation)]
            yield f"Clip saturation is {held[0]} in A and {held[1]} in B."


def _paired(a: Sequence[OptimizerSide], b: Sequence[OptimizerSide]) -> Iterator[tuple[OptimizerSide, OptimizerSide]]:
    if len(a) == len(b) == 1:
        yield a[0], b[0]
        return
    named = {optimizer.name: optimizer for optimizer in b}
    yield from ((optimizer, named[optimizer.name]) for optimizer in a if optimizer.name in named)


def _set(value: float | None) -> str:
    return "" if value is None else setting(value)
