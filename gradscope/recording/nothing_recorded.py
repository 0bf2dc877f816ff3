"""Why a recording holds nothing, in a line."""

from __future__ import annotations

NO_STEP_SEEN = "no optimizer step was seen"
NOT_WHERE_IT_CAN_BE_SEEN = "no torch.optim optimizer stepped where it can be seen (not in torch.compile)"


def why_no_step(stepped: bool, started: bool, include: tuple[str, ...] | None, named: bool) -> str:
    """The reason where no step was recorded, and nothing failed.

    ``stepped``: an optimizer has stepped; ``started``: at a step that was to be recorded; ``include`` are the globs
    asked for, if any, and ``named`` says that they named a tensor.
    """
    if not stepped:
        return f"{NO_STEP_SEEN}: {NOT_WHERE_IT_CAN_BE_SEEN}"
    if not started:
        return "training ended before the first step to record"
    if include is not None and not named:
        return f"no tensor that was trained has a name like {' or '.join(include)}"
    return "no gradient was there to be measured"
