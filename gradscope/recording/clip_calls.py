"""A clip call, between the moment it is made and the optimizer step that uses its gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradscope.recording.clip_groups import WatchedGroup, Witness

if TYPE_CHECKING:
    from gradscope.recording.optimizers import OptimizerWatch


@dataclass(eq=False, slots=True)
class ClipCall:
    """One clip call (or, with no ``function``, what an optimizer updates unclipped), until its optimizer has stepped.

    ``parts`` pairs each group with its measurement, None where the step is not recorded; several where calls shared
    one combined norm.  ``witness`` tells whether anything has changed the gradient since.
    """

    function: str | None
    where: str
    parts: list[tuple[WatchedGroup, Any]]
    time: float = 0.0
    max_norm: float | None = None
    clip_value: float | None = None
    norm_type: float | None = None
    total_norm: Any = None
    returned: Any = None
    grad_scale: float = 1.0
    witness: Witness | None = None
    consumers: list[OptimizerWatch] = field(default_factory=list)
    weight_norms: list[Any] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether there is anything to write of it."""
        return any(measured is not None for _, measured in self.parts)

    @property
    def steady(self) -> bool:
        """Whether it was an ordinary clip by norm, of which more of the same can be expected."""
        return (
            self.function == "clip_grad_norm_"
            and self.clip_value is None
            and self.grad_scale == 1.0
            and len(self.parts) == 1
            and self.measured
        )

    def weigh(self) -> None:
        """Take the norms of the weights, before their optimizer steps."""
        if not self.weight_norms:
            self.weight_norms = [group.updates.before() for group, _ in self.parts if group.updates]

    def update_norms(self, updated: frozenset[int] | None) -> list[Any]:
        """The norms of what the step has changed in them; NaN for what is not ``updated`` (ids) by its optimizer."""
        return [
            group.updates.after() if updated is None or group.members <= updated else group.updates.after(updated)
            for group, _ in self.parts
            if group.updates
        ]

    def covers(self, watch: OptimizerWatch) -> bool:
        """Whether ``watch`` updates parameters of this call, and has not done so yet."""
        if watch in self.consumers:
            return False
        return any(group.watch is watch or not watch.ids.isdisjoint(group.members) for group, _ in self.parts)

    def combine(self, max_norm: float | None, clip_value: Any) -> None:
        """A second clip of the same gradient: what the first met stands, and the smaller limit is in force."""
        if self.max_norm is None or (max_norm is not None and max_norm < self.max_norm):
            self.max_norm = max_norm
        if self.clip_value is None and clip_value is not None:
            self.clip_value = float(clip_value)

    def shares_norm(self, other: ClipCall) -> bool:
        """Whether both calls were given one total norm: the same object, or an equal number where that is known."""
        if self.total_norm is other.total_norm:
            return True
        return isinstance(self.returned, float) and self.returned == other.returned
