"""What a reader may choose about a view, and what a view must know about where it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

By = Literal["tensor", "layer", "group"]
Sort = Literal["share", "norm", "name", "order"]


@dataclass(frozen=True, slots=True)
class ViewChoices:
    """``top`` None means: as many rows as hold nearly all of the squared norm.

    ``width`` is in terminal cells; ``unicode`` says whether the output's encoding can carry ▸, █ and °; ``opening`` is
    the sentence about a source that gradscope picked itself.
    """

    by: By = "layer"
    top: int | None = None
    sort: Sort = "share"
    width: int = 80
    colour: bool = False
    unicode: bool = True
    opening: str = ""
