"""The fast path of the watcher: a training that does the same at every step.

Most loops clip the same parameters on the same lines before every step of one optimizer.  After a few equal steps the
watcher has ``SteadySteps``, which is compiled, look at the next ones: it asks only whether a step is like the last, in
a tenth of the time.  Whatever is different sends it back to the watcher, which takes over what the step had seen.
"""

from __future__ import annotations

from gradscope._meter import ExpectedClip
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.clip_groups import WatchedGroup, Witness
from gradscope.recording.sampling import Sampling
from gradscope.recording.scalars import take_down
from gradscope.trace.schema import TENSOR_SPECTRA_EVERY

CLIP = "clip_grad_norm_"
# Equal steps before the next is expected to be equal, too.
STEPS_TO_BELIEVE = 3


def expected(group: WatchedGroup, used: Witness | None) -> ExpectedClip | None:
    """The next call that clips ``group``, whose gradient was ``used`` the last time; None where it is not foreseen."""
    meter = group.meter
    known = None if meter is None else meter.known_small
    if meter is None or known is None or group.kept is not None or group.number is None:
        return None
    if not isinstance(group.site, tuple) or used is None or used.parameter != group.ids[group.smallest]:
        return None
    code, instruction = group.site
    return ExpectedClip(
        *(group, code, instruction, group.ids, group.smallest, group.number, used.gradient, used.version),
        *(known, meter.behind, meter.room, meter.new_copy, group.updates),
    )


def plans_after(step: int, sampling: Sampling) -> list[tuple[int, bool]]:
    """(spectra, tenth) of the steps after ``step``, all of which are recorded, until they repeat."""
    plans = [sampling.plan(step + 1 + ahead) for ahead in range(TENSOR_SPECTRA_EVERY)]
    return [(plan.spectra, plan.tenth) for plan in plans]


def witness_of(clip: ExpectedClip) -> Witness:
    """The gradient that was clipped last."""
    return Witness(clip.group.ids[clip.group.smallest], clip.used, clip.version)


def clip_call(clip: ExpectedClip, spectra: int) -> ClipCall:
    """The call under way, as the watcher knows calls."""
    group = clip.group
    measured = group.meter.of_copy(clip.handed_over(), spectra)
    call = ClipCall(CLIP, group.call_site, [(group, measured)], clip.time, clip.max_norm, None, clip.norm_type)
    call.total_norm = clip.total_norm
    call.returned = clip.returned_norm if clip.total_norm is None else take_down(clip.total_norm)
    call.witness = witness_of(clip)
    call.weight_norms = [] if clip.weight_norms is None else [clip.weight_norms]
    return call
