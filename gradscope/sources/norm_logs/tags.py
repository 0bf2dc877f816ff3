"""Which of a log's series are gradient norms: those that ``--tag`` names, else those whose name says so.

By default a name counts if it speaks of a gradient and of a norm (``grad_norm``, ``train/grad_norm``, ``grad-norm``,
``gradients/layer.weight_norm``, ``grad_2.0_norm_total``), or is one of ``gnorm``, ``global_norm`` and ``total_norm``,
alone or behind slashes.  Not meant are thresholds (``max_grad_norm``), norms after clipping, other norms than L2
(``grad_inf_norm``), and statistics of norms (``grad_norm_std``, W&B's ``grad_norm__MIN``).  Of several the one that
says total, global or overall is taken, else the one that says nothing more than gradient norm; anything else is for
``--tag`` to settle.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gradscope.errors import GradscopeError

GRADIENT = frozenset({"grad", "grads", "gradient", "gradients"})
NORM = frozenset({"norm", "norms", "l2norm"})
BOTH = frozenset({"gnorm", "gradnorm"})
OF_SOMETHING_ELSE = frozenset({"param", "params", "weight", "weights", "update", "updates", "activation"})
WHOLE = frozenset({"total", "global", "overall", "all"})
PLAIN = GRADIENT | NORM | BOTH | {"l2", "2", "0", "train", "training", "trainer", "optim", "optimizer"}
# Thresholds, what is left after the clip, and statistics over steps or layers.
NOT_MEANT = frozenset(
    {
        *("threshold", "limit", "coef", "clipped", "postclip", "post", "after", "ratio", "log", "log10", "count"),
        *("std", "var", "variance", "min", "max", "ema", "inf"),
    }
)
MOST_NAMED, LONGEST_NAME = 8, 50


@dataclass(frozen=True, slots=True)
class Tags:
    """The choice among the tags of the log at ``path``: those that match ``tag``, by default gradient norms."""

    path: str
    tag: str | None

    def wants(self, name: str) -> bool:
        """Whether the series called ``name`` may be one of those to take."""
        if self.tag is None:
            return is_gradient_norm(name)
        return any(part == self.tag or fnmatchcase(part, self.tag) for part in (name, _without_run(name)))

    def choose(self, wanted: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
        """The tags to take from a log that holds ``wanted`` and ``others``.

        Raises:
            GradscopeError: there is none, or no telling which.
        """
        if not wanted:
            raise self._nothing(others)
        if self.tag is not None:
            exact = tuple(name for name in wanted if self.tag in (name, _without_run(name)))
            chosen = exact if len(exact) == 1 else tuple(wanted)
            if len(chosen) > 1 and not _is_glob(self.tag):
                raise self._several(chosen)
            return chosen
        for preferred in (_is_whole, _is_plain):
            named = [name for name in wanted if preferred(name)]
            if len(named) == 1:
                return (named[0],)
        if len(wanted) == 1:
            return (wanted[0],)
        raise self._several(wanted)

    def _nothing(self, others: Sequence[str]) -> GradscopeError:
        if not others:
            return GradscopeError(self.path, "holds no series of numbers")
        series = f"its series are {_some(others)}"
        if self.tag is None:
            return GradscopeError(
                self.path,
                f"logs nothing that is called a gradient norm: {series}",
                "--tag NAME picks another series; gradscope record -- python train.py records the gradients themselves",
            )
        close = difflib.get_close_matches(self.tag, list(others), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else None
        return GradscopeError(f"--tag {self.tag}", f"{self.path} holds no such series: {series}", hint)

    def _several(self, found: Sequence[str]) -> GradscopeError:
        heads, leaves = {name.rpartition("/")[0] for name in found}, {name.rpartition("/")[2] for name in found}
        pattern = f"{heads.pop()}/*" if len(heads) == 1 else f"*/{leaves.pop()}" if len(leaves) == 1 else "/*"
        # Several runs are no parts of one gradient.
        alike = pattern != "/*" and not any(" - " in name for name in found)
        together = f"; {shlex.quote(pattern)} takes them all, as parts of one gradient" if alike else ""
        return GradscopeError(
            self.path,
            f"logs {len(found)} series of gradient norms: {_some(found)}",
            f"pick one by --tag {shlex.quote(found[0])}{together}",
        )


def is_gradient_norm(name: str) -> bool:
    """Whether a series of this name is taken for a gradient norm."""
    if name.endswith(("__MIN", "__MAX")):
        return False
    words = _words(name)
    joined, held = " ".join(words), set(words)
    # Lightning names the order of the norm: grad_2.0_norm.
    order = re.search(r"grad_(\d+(?:\.\d+)?)_norm", name)
    if (order and float(order[1]) != 2.0) or held & NOT_MEANT or re.search(r"\bclip (?:grad|gradient|norm)", joined):
        return False
    if held & GRADIENT:
        return bool(held & (NORM | BOTH))
    return bool(held & BOTH) or (joined.endswith(("global norm", "total norm")) and not held & OF_SOMETHING_ELSE)


def _is_whole(name: str) -> bool:
    return bool(WHOLE.intersection(_words(name)))


def _is_plain(name: str) -> bool:
    return PLAIN.issuperset(_words(name))


def _words(name: str) -> list[str]:
    """The words of a name, lower case: ``train/gradNorm`` has three."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", _without_run(name))
    return re.findall(r"[a-z]+\d*[a-z]*|\d+", apart.lower())


def _without_run(name: str) -> str:
    """A column of W&B's chart export is called ``RUN - TAG``."""
    return name.rsplit(" - ", 1)[-1]


def _is_glob(tag: str) -> bool:
    return any(character in tag for character in "*?[")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"
