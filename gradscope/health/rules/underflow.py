"""``underflow``: gradients that a narrow number format rounded to zero, read off the magnitudes that are left.

A format whose smallest number is s rounds every magnitude below s/2 to zero, and those in [s/2, 3s/2) to s.  The
densities of gradients fall with magnitude, so at least half as many elements were lost as stand on s.  Zeros alone
(dead units, rows of an embedding that a batch does not touch) have nothing standing on s beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import count, number, percent, setting
from gradscope.spectrum import MagnitudeSpectrum

# The smallest positive number of each format; IEEE 754, and Micikevicius et al. 2022 for float8.
SMALLEST = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float8_e4m3fn": 2.0**-9,
    "float8_e5m2": 2.0**-16,
}
# What a mean that a trace keeps as a float32 may be off.
SAME_NUMBER = 1e-6
WORTH_TELLING = 1e-4


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    spectrum: MagnitudeSpectrum

    @property
    def living(self) -> int:
        """Its elements that are not zero."""
        return self.spectrum.finite - self.spectrum.zeros

    @property
    def format(self) -> str:
        """What it was computed in: its own format, or float16, of which a wider tensor shows the traces."""
        return self.dtype if self.dtype in SMALLEST else "float16"


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the share of each layer's elements that were lost, or would be in the format asked for."""
    layers = _layers(evidence)
    if not layers:
        return Verdict.cannot_tell("the source holds no magnitudes of elements")
    most, wanted, scale = limits.number("max"), limits.text("format"), limits.number("loss-scale")
    if scale != 1.0:
        wanted = wanted or "float16"
    steps = evidence.steps_of(evidence.sampled)
    readings = []
    for layer, tensors in layers.items():
        own = scale == 1.0 and all(wanted in ("", tensor.dtype) for tensor in tensors)
        share, said = _lost(layer, tensors) if own else _would_lose(layer, tensors, wanted, scale)
        remedy = "; scale the loss (GradScaler)" if own and share > most else ""
        readings.append(Reading(share, most, layer, steps, f"{said}{remedy}."))
    verdict = Verdict.by_value(readings)
    if verdict.nearest is None or wanted or (verdict.nearest.value or 0.0) >= WORTH_TELLING:
        return verdict
    return Verdict.well(_nothing(layers, most, steps))


def _layers(evidence: Evidence) -> dict[str, list[_Tensor]]:
    """The tensors of each layer that hold an element that is neither zero nor NaN nor infinite."""
    layers: dict[str, list[_Tensor]] = {}
    for layer, members in evidence.layers.items():
        for place in members:
            spectrum = evidence.spectra[place]
            if spectrum is not None and spectrum.count.size:
                layers.setdefault(layer, []).append(_Tensor(evidence.tensors[place].dtype, spectrum))
    return layers


def lost_elements(spectrum: MagnitudeSpectrum, smallest: float) -> tuple[float, int]:
    """How many elements a format whose smallest number is ``smallest`` lost at least, and how many stand on that.

    None where other magnitudes below twice as much show that the gradient went through no such format.  That is half
    of those that stand there, less twice the scatter of such a count, and no more than there are zeros.
    """
    lowest = int(np.searchsorted(spectrum.lower, 2.0 * smallest, side="left"))
    if lowest == 0 or spectrum.lower[0] < smallest or spectrum.upper[lowest - 1] >= 2.0 * smallest:
        return 0.0, 0
    standing = int(spectrum.count[:lowest].sum())
    if not math.isclose(float(spectrum.sum_abs[:lowest].sum()), standing * smallest, rel_tol=SAME_NUMBER):
        return 0.0, 0
    return min(float(spectrum.zeros), max(0.0, standing - 2.0 * math.sqrt(standing)) / 2.0), standing


def _lost(layer: str, tensors: list[_Tensor]) -> tuple[float, str]:
    """What the formats that the layer was computed in lost of it."""
    found = [lost_elements(tensor.spectrum, SMALLEST[tensor.format]) for tensor in tensors]
    lost = sum(elements for elements, _ in found)
    share = lost / (lost + sum(tensor.living for tensor in tensors))
    used = max(zip(found, tensors, strict=True), key=lambda pair: pair[0][0])[1].format
    standing = sum(elements for _, elements in found)
    zeros = sum(tensor.spectrum.zeros for tensor in tensors)
    return share, (
        f"At least {percent(share, 'down')} of the gradient of {layer} was rounded to zero in {used}: "
        f"{count(standing)} elements stand on its smallest number {number(SMALLEST[used])} beside {count(zeros)} zeros"
    )


def _would_lose(layer: str, tensors: list[_Tensor], wanted: str, scale: float) -> tuple[float, str]:
    """What a cast of ``scale`` times the gradient would lose: magnitudes below half the smallest number."""
    edge = SMALLEST[wanted] / 2.0 / scale
    lost = sum(
        max(0.0, tensor.spectrum.share_below(edge)[0] * tensor.spectrum.finite - tensor.spectrum.zeros)
        for tensor in tensors
    )
    share = lost / sum(tensor.living for tensor in tensors)
    times = "" if scale == 1.0 else f" with loss scale {setting(scale)}"
    return share, f"{wanted}{times} would round {percent(share)} of the gradient of {layer} to zero"


def _nothing(layers: dict[str, list[_Tensor]], most: float, steps: tuple[int, int] | None) -> Reading:
    """That nothing is lost, and what float16 would lose of wider gradients."""
    said = "No gradient shows that a narrow format rounded it to zero"
    wide = [
        (*_would_lose(layer, tensors, "float16", 1.0), layer)
        for layer, tensors in layers.items()
        if not any(tensor.dtype in SMALLEST for tensor in tensors)
    ]
    share, _, layer = max(wide, default=(0.0, "", ""))
    if share:
        said += f"; float16 without loss scaling would round {percent(share)} of {layer} to zero"
    return Reading(0.0, most, None, steps, f"{said}.")


UNDERFLOW = Rule(
    name="underflow",
    severity="error",
    about="A narrow number format rounded part of a gradient to zero, as float16 does without loss scaling.",
    formula="lost / (lost + elements that are not zero) of a layer, lost: half the elements on the format's smallest "
    "number s, at most the zeros; with format or loss-scale: elements with |g| * loss-scale < s/2 "
    "/ elements that are not zero",
    source="Micikevicius et al. 2018, Mixed Precision Training, section 3.2; IEEE 754 (float16: s = 2^-24)",
    limits=(
        Limit("max", 0.001, "largest share of a layer's elements that are lost", most=1.0),
        Limit(
            "format",
            "",
            "the format to judge; empty: the one that the run computed in",
            choices=("", *SMALLEST),
        ),
        Limit("loss-scale", 1.0, "the factor to judge the format with", least=1e-30, most=1e30),
    ),
    judge=judge,
)
