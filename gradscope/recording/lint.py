"""What is wrong with how a run clips: noticed while it is being recorded, one finding per rule and clip group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradscope.notation import number, setting
from gradscope.trace.schema import LintFinding

NAMES_SHOWN = 3


class ClipLint:
    """Collects findings; ``changed`` is called when there is a new one."""

    def __init__(self, findings: list[LintFinding], changed: Callable[[], None]) -> None:
        self._findings = findings
        self._changed = changed
        self._known: dict[tuple[str, str | None], LintFinding] = {}

    def _note(self, rule: str, step: int, group: str | None, message: str, tensors: Sequence[str] = ()) -> None:
        known = self._known.get((rule, group))
        if known is not None:
            known.count += 1
            return
        finding = LintFinding(rule, message, 1, step, group, tuple(tensors))
        self._known[rule, group] = finding
        self._findings.append(finding)
        self._changed()

    def threshold(self, limit: float, name: str, where: str, step: int, group: str | None) -> None:
        """``max_norm`` or ``clip_value`` that cannot be meant: 0, negative, infinite or NaN."""
        if limit == 0:
            effect = "it zeroes every gradient and stops training"
        elif limit < 0:
            effect = "it turns every gradient around"
        elif limit == math.inf:
            effect = "nothing is ever clipped, only the norm is computed"
        elif math.isnan(limit):
            effect = "it makes every gradient NaN"
        else:
            return
        self._note("bad-threshold", step, group, f"{name} is {setting(limit)} ({where}): {effect}.")

    def nothing_to_clip(self, function: str, where: str, step: int, parameters: int) -> None:
        """A clip call that was given no parameters, or none with a gradient."""
        if parameters:
            what = f"was given {parameters} parameters, none of which has a gradient"
            why = "it runs before backward() or after zero_grad()"
        else:
            what = "was given no parameters"
            why = "an empty list or a generator that was used up before"
        self._note("empty-clip", step, where, f"{function} at {where} {what} ({why}): it clips nothing.")

    def after_step(self, function: str, where: str, step: int, group: str | None) -> None:
        """A clip call on gradients that the optimizer has used already."""
        self._note(
            "clip-after-step",
            step,
            group,
            f"{function} at {where} runs after optimizer.step(): the update has used the unclipped gradient.",
        )

    def twice(self, function: str, where: str, step: int, group: str | None) -> None:
        """A second clip call on the same gradient."""
        self._note(
            "clipped-twice",
            step,
            group,
            f"{function} at {where} clips a gradient that was clipped already: the smaller max_norm is in force.",
        )

    def scaled(self, where: str, scale: float, limit: float | None, step: int, group: str | None) -> None:
        """A clip call on gradients that a GradScaler has not unscaled."""
        in_force = "" if limit is None else f"; max_norm {setting(limit)} was in fact {number(limit / scale)}"
        self._note(
            "scaled-clip",
            step,
            group,
            f"The clip at {where} runs on gradients still multiplied by the loss scale {setting(scale)}{in_force}: "
            "call scaler.unscale_(optimizer) before it.",
        )

    def coverage(self, optimizer: str, missing: Sequence[str], total: int, step: int) -> None:
        """A clip that leaves out parameters which the same optimizer updates."""
        self._note(
            "coverage",
            step,
            optimizer,
            f"The clip leaves out {len(missing)} of the {total} tensors that {optimizer} updates: {_some(missing)}.",
            missing,
        )

    def normalised(self, optimizer: str, where: str, step: int, group: str | None) -> None:
        """Norm clipping in front of an optimizer that does not see the length of the gradient."""
        self._note(
            "normalised-anyway",
            step,
            group,
            f"The clip at {where} is followed by {optimizer}, which normalises the gradient itself: max_norm has next "
            "to no effect.",
        )

    def nonfinite(self, function: str, where: str, step: int, group: str | None) -> None:
        """NaN or Inf met by a clip call that does not stop at it."""
        self._note(
            "nonfinite-norm",
            step,
            group,
            f"{function} at {where} met a norm that is not finite and went on (error_if_nonfinite=False): NaN or zero "
            "gradients reached the optimizer.",
        )

    def overflow(self, function: str, where: str, norm: float, step: int, group: str | None) -> None:
        """A finite gradient whose norm the library could not represent."""
        self._note(
            "norm-overflow",
            step,
            group,
            f"{function} at {where} returned an infinite norm for a finite gradient (norm {norm:.3g}: its squares "
            "overflow float32), which zeroes the whole gradient.",
        )

    def rounded(self, dtype: str, returned: float, exact: float, limit: float, step: int, group: str | None) -> None:
        """A total norm whose rounding changed whether the gradient was clipped."""
        self._note(
            "rounded-norm",
            step,
            group,
            f"The norm is taken in {dtype}, whose rounding decided: {returned:.6g} instead of {exact:.6g} at max_norm "
            f"{setting(limit)}.",
        )

    def unused(self, optimizer: str, names: Sequence[str], steps: int) -> None:
        """Parameters that an optimizer holds and that never had a gradient."""
        self._note(
            "unused",
            steps,
            optimizer,
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} of {optimizer} never had a gradient: {_some(names)}.",
            names,
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
