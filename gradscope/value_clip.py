"""Clip by value, read off a magnitude spectrum: rigorous bounds on what it does at any threshold.

With s = Σ(|g|-v)₊ and S = Σ((|g|-v)₊)² the exact ‖g‖² gives the whole answer, ‖c‖² = ‖g‖² - 2vs - S and
g·c = ‖g‖² - vs - S, so bounds on s and S are bounds on the angle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gradscope.clipped_count import ClippedCount, exactly

# How far a total may be off, relative to it, where every value is known: a few roundings.
POINT_ROUNDING = 2.0**-50
NOTHING = exactly(0)


@dataclass(frozen=True, slots=True)
class ValueClip:
    """What clip-by-value at ``v`` does to a gradient g, as rigorous bounds; parts of a gradient add up with ``+``.

    With c = clip(g): ``energy`` is ‖g‖²; ``excess`` bounds s = Σ(|g|-v)₊; ``excess_sq`` bounds S = Σ((|g|-v)₊)²;
    ``clipped_energy`` bounds ‖c‖² = ‖g‖² - 2vs - S; ``clipped`` counts the elements with |g| > v.
    ``rounding`` is how far ``energy`` may be off, relative to it.
    """

    v: float
    energy: float
    excess_lo: float
    excess_hi: float
    excess_sq_lo: float
    excess_sq_hi: float
    clipped_energy_lo: float
    clipped_energy_hi: float
    clipped: ClippedCount
    rounding: float

    @classmethod
    def none(cls, v: float, energy: float = 0.0, rounding: float = 0.0) -> ValueClip:
        """The clip of a gradient that holds nothing above ``v``."""
        return cls(v, energy, 0.0, 0.0, 0.0, 0.0, energy * (1 - rounding), energy * (1 + rounding), NOTHING, rounding)

    def __add__(self, other: ValueClip) -> ValueClip:
        if self.v != other.v:
            raise ValueError(f"clips at different values do not add up: {self.v} and {other.v}")
        return ValueClip(
            self.v,
            self.energy + other.energy,
            self.excess_lo + other.excess_lo,
            self.excess_hi + other.excess_hi,
            self.excess_sq_lo + other.excess_sq_lo,
            self.excess_sq_hi + other.excess_sq_hi,
            self.clipped_energy_lo + other.clipped_energy_lo,
            self.clipped_energy_hi + other.clipped_energy_hi,
            self.clipped + other.clipped,
            max(self.rounding, other.rounding) + 2.0**-53,
        )

    @classmethod
    def total(cls, clips: Iterable[ValueClip]) -> ValueClip:
        """The clip of all the parts together, at least one, added with a single rounding; they share one ``v``."""
        parts = list(clips)
        if len({part.v for part in parts}) != 1:
            raise ValueError(f"clips at different values do not add up: {sorted({part.v for part in parts})}")
        return cls(
            parts[0].v,
            energy=exact_sum([part.energy for part in parts]),
            excess_lo=exact_sum([part.excess_lo for part in parts]),
            excess_hi=exact_sum([part.excess_hi for part in parts]),
            excess_sq_lo=exact_sum([part.excess_sq_lo for part in parts]),
            excess_sq_hi=exact_sum([part.excess_sq_hi for part in parts]),
            clipped_energy_lo=exact_sum([part.clipped_energy_lo for part in parts]),
            clipped_energy_hi=exact_sum([part.clipped_energy_hi for part in parts]),
            clipped=sum((part.clipped for part in parts), NOTHING),
            rounding=max(part.rounding for part in parts) + 2.0**-53,
        )

    def direction_change_deg(self) -> tuple[float, float]:
        """The angle between g and c in degrees, and the half-width of the interval that surely holds it.

        cos θ = (‖c‖² + vs)/(‖g‖‖c‖) and sin² θ = (S‖c‖² - v²s²)/(‖g‖²‖c‖²).  At fixed ‖g‖² and S the angle falls as
        s grows; at fixed s it is largest where ‖c‖² = vs.  So its extremes over a box of bounds are at corners or
        there.  The boxes (s, S) and (s, ‖c‖²) both hold the truth: the first is sharp for small angles, the second
        where nearly all is clipped.  (45, 45) where the squares leave float64 and nothing is known.
        """
        if self.excess_hi == 0.0 and self.excess_sq_hi == 0.0:
            return 0.0, 0.0
        if not (0.0 < self.energy < math.inf) or not self.rounding < 1.0:
            return 45.0, 45.0
        lo, hi = self._angles_by_excess()
        also_lo, also_hi = self._angles_by_clipped_energy()
        lo, hi = max(lo, also_lo), min(hi, also_hi)
        return math.degrees((lo + hi) / 2), math.degrees(abs(hi - lo) / 2)

    def _angles_by_excess(self) -> tuple[float, float]:
        slope = self.v / self.energy
        s_lo, s_hi = self.excess_lo * slope, self.excess_hi * slope
        sq_lo, sq_hi = self.excess_sq_lo / self.energy, self.excess_sq_hi / self.energy
        kept_lo = self.clipped_energy_lo / self.energy
        # ‖c‖²/‖g‖² is a difference of numbers near 1 here, and loses digits where it is small.
        noise = 8 * max(self.rounding, POINT_ROUNDING) * (1 + 1 / kept_lo) if kept_lo > 0 else math.inf
        if noise > 1e-6:
            return 0.0, math.pi / 2

        def angle(s: float, sq: float, sign: int) -> float:
            kept = 1 - 2 * s - sq
            sine_sq = sq - s * s / kept + sign * noise
            return math.atan2(math.sqrt(max(sine_sq, 0.0)), (kept + s) / math.sqrt(kept))

        most = angle(s_lo, min(max(1 - 3 * s_lo, sq_lo), sq_hi, 1 - 2 * s_lo - kept_lo), +1)
        # A corner outside of what Cauchy-Schwarz allows bounds nothing.
        least = 0.0
        if 1 - 2 * s_hi - sq_hi > 0:
            least = min(angle(s_hi, sq_lo, -1), angle(s_hi, sq_hi, -1))
        return least, most

    def _angles_by_clipped_energy(self) -> tuple[float, float]:
        slope = self.v / self.energy
        s_lo, s_hi = self.excess_lo * slope, self.excess_hi * slope
        kept_lo, kept_hi = self.clipped_energy_lo / self.energy, self.clipped_energy_hi / self.energy
        if kept_lo <= 0.0:
            return 0.0, math.pi / 2
        noise = 8 * max(self.rounding, POINT_ROUNDING)

        def angle(s: float, kept: float, sign: int) -> float:
            cosine = (kept + s) / math.sqrt(kept)
            return math.atan2(math.sqrt(max(1 - cosine * cosine + sign * noise, 0.0)), cosine)

        most = angle(s_lo, min(max(s_lo, kept_lo), kept_hi), +1)
        least = min(angle(s_hi, kept_lo, -1), angle(s_hi, kept_hi, -1))
        return least, most

    def norm_ratio(self) -> float:
        """‖c‖/‖g‖, from the middle of its bounds; 1 for a zero gradient."""
        if self.excess_hi == 0.0 or self.energy == 0.0:
            return 1.0
        return math.sqrt((self.clipped_energy_lo + self.clipped_energy_hi) / 2 / self.energy)

    def scale(self) -> float:
        """(g·c)/‖g‖², from the middle of its bounds; 1 for a zero gradient."""
        if self.excess_hi == 0.0 or self.energy == 0.0:
            return 1.0
        kept = (self.clipped_energy_lo + self.clipped_energy_hi) / 2
        return (kept + self.v * (self.excess_lo + self.excess_hi) / 2) / self.energy


@dataclass(frozen=True, slots=True)
class Split:
    """Bounds on what the elements of the bin that holds v contribute."""

    s_lo: float
    s_hi: float
    square_lo: float
    square_hi: float
    around: float
    missed_lo: float
    missed_hi: float
    kept_lo: float
    kept_hi: float


@dataclass(frozen=True, slots=True)
class Straddle:
    """The bin that holds v inside: elements x in [lower, upper] and bounds on their scatter Σ(x-mean)²."""

    count: float
    sum_abs: float
    mean: float
    lower: float
    upper: float
    energy: float
    scatter_least: float
    scatter_most: float

    @classmethod
    def none(cls) -> Straddle:
        """No bin holds v."""
        return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def split(self, v: float, scatter_least: float, scatter_most: float) -> Split:
        """Bounds on s = Σ(x-v)₊, S = Σ((x-v)₊)² and Σmin(x,v)².

        With t = Σ(v-x)₊ and R = Σ((v-x)₊)², s - t = a - cv and S + R = M, the scatter around v.  Below and above v lie
        at most v - lower and upper - v away, so R <= (v - lower)t and S <= (upper - v)s; Cauchy-Schwarz gives
        S >= s²/c and R >= t²/c.  s is at most the chord (mass at the ends) and Scarf's ½(√(cM) + a - cv).
        """
        c = self.count
        if c == 0.0:
            return Split(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        lower, upper = self.lower, self.upper
        below, over = v - lower, upper - v
        d = c * (self.mean - v)
        most = min(self.scatter_most, scatter_most)
        around_least = min(scatter_least, most) + d * d / c
        around_most = most + d * d / c
        s_lo = max(0.0, d, (around_least + below * d) / (upper - lower))
        s_hi = max(min(c * (self.mean - lower) * over / (upper - lower), (math.sqrt(c * around_most) + d) / 2), s_lo)
        t_lo, t_hi = max(s_lo - d, 0.0), max(s_hi - d, 0.0)
        square_lo = max(s_lo * s_lo / c, around_least - below * t_hi, 0.0)
        square_hi = max(min(over * s_hi, around_most - t_lo * t_lo / c), square_lo)
        kept_lo = c * (v - t_hi / c) ** 2
        kept_hi = max(c * v * v - (v + lower) * t_lo, kept_lo)
        missed_lo, missed_hi = t_lo * t_lo / c, below * t_hi
        return Split(s_lo, s_hi, square_lo, square_hi, d * d / c, missed_lo, missed_hi, kept_lo, kept_hi)


def exact_sum(values: list[float]) -> float:
    """The correctly rounded sum, whatever the order; inf where it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
