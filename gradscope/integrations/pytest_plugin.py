"""The pytest fixture ``gradscope``: ``assert gradscope.check(model, batch, loss)``.

Every pytest that finds gradscope installed loads this file, so it imports nothing but pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os

    import torch

    from gradscope.check_results import Check
    from gradscope.errors import GradscopeError
    from gradscope.health.settings import CheckSettings

SECTION = "gradscope check"
_CHECKS = pytest.StashKey["list[Check]"]()
_NARROWEST, _WIDEST = 60, 100


@pytest.fixture
def gradscope(request: pytest.FixtureRequest) -> HealthCheck:
    """Gradient health: ``assert gradscope.check(model, batch, loss)``, or ``gradscope.check(path)``.

    In a test that takes this fixture the name hides the package; ``import gradscope as gs`` outside of it has both.
    """
    return HealthCheck(request.node, request.config.rootpath)


class HealthCheck:
    """``gradscope check`` for tests, with ``[tool.gradscope.check]`` of the project that pytest runs in."""

    def __init__(self, item: pytest.Item, root: Path) -> None:
        self._checks: list[Check] = item.stash.setdefault(_CHECKS, [])
        self._root = root

    def __repr__(self) -> str:
        return "gradscope"

    def check(
        self,
        source: torch.nn.Module | str | os.PathLike[str] | Any,
        batch: Any = None,
        loss: Callable[..., Any] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        minibatch_size: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        rules: Mapping[str, float | str] | None = None,
        select: Iterable[str] | None = None,
        ignore: Iterable[str] = (),
        strict: bool | None = None,
        fail_on: str | None = None,
        baseline: str | os.PathLike[str] | None = None,
    ) -> Check:
        """The health of the gradients of ``loss`` on ``batch``; true where it is good.

        ``source`` is a module, whose weights, buffers, gradients and modes are left as they are, with a ``batch`` and
        a ``loss`` as ``gradscope.backward.in_memory.gradients_in_memory`` takes them.  Without these it is the path of
        a recorded run, of gradients or of a checkpoint, or a module after ``backward()``.

        ``rules`` are limits and severities (``{"clip-rate.max": 0.5}``); they and the others come on top of what
        ``[tool.gradscope.check]`` of the project says.

        Raises:
            GradscopeError: one line, for whatever is wrong with the model, the batch, the loss or the settings.
        """
        __tracebackhide__ = True
        from gradscope.errors import GradscopeError
        from gradscope.health.project_settings import project_settings

        try:
            settings = project_settings(self._root).with_choice(
                rules=rules or {}, select=select, ignore=ignore, strict=strict, fail_on=fail_on, baseline=baseline
            )
            if batch is None and loss is None:
                for name, given in (("optimizer", optimizer), ("minibatch_size", minibatch_size)):
                    if given is not None:
                        raise GradscopeError(name, "goes with a batch and a loss: check(model, batch, loss)")
                check = _check_source(source, settings)
            else:
                options = {"optimizer": optimizer, "minibatch_size": minibatch_size, "epochs": epochs, "seed": seed}
                check = _check_model(source, batch, loss, options, settings)
        except GradscopeError as error:
            told = _told(error, self._root)
        else:
            self._checks.append(check)
            return check
        raise told


def _check_source(source: Any, settings: CheckSettings) -> Check:
    from gradscope.health.checking import check
    from gradscope.sources import open_source

    return check([open_source(source)], settings)


def _check_model(
    model: Any, batch: Any, loss: Callable[..., Any] | None, options: Mapping[str, Any], settings: CheckSettings
) -> Check:
    from gradscope.errors import GradscopeError
    from gradscope.health.checking import check

    if batch is None or loss is None:
        raise GradscopeError("batch" if batch is None else "loss", "is missing: check(model, batch, loss)")
    try:
        from gradscope.backward.in_memory import gradients_in_memory
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise GradscopeError("gradscope.check", "needs PyTorch", "pip install 'gradscope[torch]'") from None
    with gradients_in_memory(model, batch, loss, **options) as source:
        return check([source], settings)


# --- errors ----------------------------------------------------------------------------------------------------------


def _told(error: GradscopeError, root: Path) -> GradscopeError:
    """``error`` as a test's failure shows it: where the user's own code raised, and the hint on a second line."""
    from gradscope.errors import GradscopeError

    place = _own_line(error, root)
    told = GradscopeError(error.what, f"{error.why} ({place})" if place else error.why, error.hint)
    if error.hint:
        told.args = (f"{told}\nhint: {error.hint}",)
    return told


def _own_line(error: BaseException, root: Path) -> str | None:
    """``test_model.py:12``: the innermost line of the project in what the error was made of; None without one."""
    from gradscope.errors import GradscopeError

    cause: BaseException | None = error
    while isinstance(cause, GradscopeError):
        cause = cause.__cause__
    place, package = None, Path(__file__).parents[1]
    traceback = cause.__traceback__ if cause is not None else None
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.is_relative_to(root) and not file.is_relative_to(package) and "site-packages" not in file.parts:
            place = f"{file.relative_to(root)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """The screen of a check goes into the report: of one that failed with its test, of others where passes are shown.

    In a failure's own text, so that no --show-capture hides it, and JUnit and pytest-xdist carry it along.
    """
    checks = item.stash.get(_CHECKS, [])
    if checks and call.excinfo is not None and isinstance(call.excinfo.value, AssertionError):
        _without_arguments(call.excinfo.value, checks)
    outcome = yield
    report = outcome.get_result()
    if not checks or call.when == "teardown":
        return
    if report.failed:
        shown = [check for check in checks if not check] or checks[-1:]
        add = getattr(report.longrepr, "addsection", None) or _section_of(report)
    elif report.passed and {"P", "A"} & set(item.config.option.reportchars) and call.when == "call":
        shown, add = checks, _section_of(report)
    else:
        return
    for check in shown:
        add(SECTION, _screen(check, item.config))


def _section_of(report: pytest.TestReport) -> Callable[[str, str], None]:
    return lambda title, text: report.sections.append((title, text))


def _without_arguments(error: AssertionError, checks: Iterable[Check]) -> None:
    """Keep what was asserted; take away how pytest explains it: by the module and the batch, element by element."""
    message = str(error)
    for check in checks:
        message, where, _ = message.partition(f"\n +  where {check!r} = ")
        if where:
            error.args = (message,)


def _screen(check: Check, config: pytest.Config) -> str:
    from gradscope.views.check_screen import check_screen
    from gradscope.views.choices import ViewChoices
    from gradscope.views.terminal import terminal_text

    width = max(_NARROWEST, min(config.get_terminal_writer().fullwidth, _WIDEST))
    choices = ViewChoices(width=width, unicode=_carries_unicode())
    return terminal_text(check_screen(check, choices), choices).rstrip("\n")


def _carries_unicode() -> bool:
    """Whether standard output, as it was before pytest captured it, can show what the screen is made of."""
    try:
        "▸█…°×–".encode(getattr(sys.__stdout__, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
