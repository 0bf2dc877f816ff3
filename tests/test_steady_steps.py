"""The fast path for steps like the last records what the careful one does, whatever a training loop does next."""

from __future__ import annotations

import _thread
import contextlib
import functools
import math
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import Recorded, norm, read_rows, record
from torch import nn

from gradscope import Recorder
from gradscope.recording import watcher
from gradscope.recording.updates import UpdateNorms

STEPS = 60


class Unsteady:
    """Does the same for a while, and then something else."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = nn.ModuleDict({"actor": nn.Linear(4, 3), "critic": nn.Linear(4, 1)})
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.other = torch.optim.SGD(self.model["critic"].parameters(), 1e-4)
        self.max_norm = 0.5
        self.habit = self.whole

    def __call__(self) -> None:
        for _ in range(STEPS):
            if self.random.random() < 0.15:
                self.habit = self.random.choice([self.whole, self.apart])
            strange = self.random.random() < 0.2
            self.backward()
            (self.random.choice(self.strange) if strange else self.habit)(self)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(8, 4)
        (self.model["actor"](x).square().sum() + self.model["critic"](x).square().sum()).backward()

    def whole(self, _: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()

    def apart(self, _: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_(self.model["actor"].parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(self.model["critic"].parameters(), 1.0)
        self.optimizer.step()

    def unclipped(self) -> None:
        self.optimizer.step()

    def twice(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.whole()

    def by_value(self) -> None:
        torch.nn.utils.clip_grad_value_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def in_part(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model["actor"].parameters(), 1.0)
        self.optimizer.step()

    def without_a_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def without_backward(self) -> None:
        self.whole()
        self.whole()

    def another_threshold(self) -> None:
        self.max_norm *= 1.5
        self.whole()

    def another_optimizer(self) -> None:
        self.other.step()
        self.whole()

    def a_closure(self) -> None:
        self.optimizer.step(self.backward)

    def no_gradient_in_part(self) -> None:
        self.model["critic"].zero_grad()
        self.whole()

    def another_dtype(self) -> None:
        for parameter in self.model["critic"].parameters():
            parameter.grad = None
            parameter.data = parameter.data.to(torch.bfloat16 if parameter.dtype is torch.float32 else torch.float32)
            parameter.grad = torch.ones_like(parameter)
        self.other.step()
        for parameter in self.model["critic"].parameters():
            parameter.grad = None
            parameter.data = parameter.data.float()

    def an_error(self) -> None:
        try:
            self.optimizer.step(lambda: 1 / 0)
        except ZeroDivisionError:
            self.whole()

    def a_step_that_fails_and_is_made_again(self) -> None:
        failing = self.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            self.habit()
        failing.remove()
        self.optimizer.step()

    def one_more_parameter(self) -> None:
        extra = nn.Parameter(torch.ones(2))
        extra.grad = torch.ones(2)
        self.optimizer.add_param_group({"params": [extra]})
        self.whole()

    strange = (
        unclipped,
        twice,
        by_value,
        in_part,
        without_a_step,
        without_backward,
        another_threshold,
        another_optimizer,
        a_closure,
        no_gradient_in_part,
        another_dtype,
        an_error,
        a_step_that_fails_and_is_made_again,
        one_more_parameter,
    )


def as_recorded(recorded: Recorded) -> Any:
    rows = [{key: repr(value) for key, value in row.items() if key != "time"} for row in recorded.rows]
    return rows, recorded.metadata["groups"], recorded.metadata["tensors"], recorded.metadata["findings"]


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_path_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")
    (tmp_path / "fast").mkdir()
    (tmp_path / "careful").mkdir()
    fast = as_recorded(record(tmp_path / "fast", Unsteady(seed)))
    monkeypatch.setattr(watcher, "STEPS_TO_BELIEVE", 10**9)
    careful = as_recorded(record(tmp_path / "careful", Unsteady(seed)))
    assert fast == careful
    assert len(fast[0]) > STEPS / 2


def test_most_steps_of_a_plain_loop_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    careful = watcher.Watcher.before_clip
    monkeypatch.setattr(watcher.Watcher, "before_clip", lambda *args: looked_at.append(0) or careful(*args))
    loop = Unsteady(0)

    def train() -> None:
        for _ in range(STEPS):
            loop.backward()
            loop.apart()

    rows = record(tmp_path, train).rows
    assert len(rows) == 2 * STEPS
    assert len(looked_at) < 2 * STEPS / 4


# --- what the loop above does not -------------------------------------------------------------------------------------


class Around(torch.optim.Optimizer):
    """Steps the optimizer inside at every ``every``-th step, and does nothing at the others."""

    def __init__(self, inside: torch.optim.Optimizer, every: int) -> None:
        super().__init__(inside.param_groups, {})
        self.inside, self.every, self.steps = inside, every, 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.inside.step(closure)


class Steps:
    """A small training, and the norms that its clip calls met."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.norms: list[float] = []

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(5, 4)).square().sum().backward()

    def note_norm(self) -> None:
        """Of the finite elements, as a trace has it."""
        gradients = [p.grad.double().numpy() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum((g[np.isfinite(g)] ** 2).sum() for g in gradients)))

    def clip(self, **options: Any) -> None:
        self.note_norm()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5, **options)

    def __call__(self, steps: int = 10) -> None:
        for _ in range(steps):
            self.backward()
            self.clip()
            self.optimizer.step()


def around_another_at_every_seventh_step(steps: Steps) -> None:
    steps.optimizer = Around(steps.optimizer, 7)
    steps(40)


def around_another(steps: Steps) -> None:
    steps.optimizer = Around(steps.optimizer, 1)
    steps(20)


def a_step_fails_and_its_gradient_is_given_up(steps: Steps) -> None:
    for equal_ones in (1, 9):
        steps(equal_ones)
        failing = steps.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            steps(1)
        failing.remove()
        steps.norms.pop()
    steps(9)


def a_clip_raises(steps: Steps) -> None:
    for i in range(40):
        steps.backward()
        if i % 8 == 7:
            steps.model.bias.grad[0] = torch.nan  # type: ignore[index]
        try:
            steps.clip(error_if_nonfinite=True)
        except RuntimeError:
            # Some use the gradient nevertheless.
            if i % 16 == 7:
                steps.norms.pop()
                continue
        steps.optimizer.step()
        with torch.no_grad():
            steps.model.bias.nan_to_num_()


def an_interrupt_in_a_clip(steps: Steps) -> None:
    class Interrupting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.stack:
                raise KeyboardInterrupt
            return function(*args, **(kwargs or {}))

    steps()
    steps.backward()
    with contextlib.suppress(KeyboardInterrupt), Interrupting():
        steps.clip()
    steps.norms.pop()
    steps()


def gradients_of_inference_mode(steps: Steps) -> None:
    for i in range(30):
        # So for a while, and so for a while.
        with torch.inference_mode(i % 20 >= 10):
            for parameter in steps.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            steps.clip()
            steps.optimizer.step()


def a_tuple_of_parameters(steps: Steps) -> None:
    group = steps.optimizer.param_groups[0]
    group["params"] = tuple(group["params"])
    steps()


def a_clip_in_a_clip(steps: Steps) -> None:
    class Clipping(torch.overrides.TorchFunctionMode):
        inside = False

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.stack and not self.inside:
                self.inside = True
                torch.nn.utils.clip_grad_norm_(steps.model.parameters(), 1e9)
                torch.nn.utils.clip_grad_value_(steps.model.parameters(), 1e9)
            return function(*args, **(kwargs or {}))

    for _ in range(12):
        steps.backward()
        with Clipping():
            steps.clip()
        steps.optimizer.step()


def a_clip_that_no_python_code_calls(steps: Steps) -> None:
    steps()
    steps.backward()
    steps.note_norm()
    done = threading.Event()
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, list(steps.model.parameters()), 0.5)
    weakref.finalize(clip, done.set)
    _thread.start_new_thread(clip, ())
    del clip
    assert done.wait(10)
    steps.optimizer.step()
    steps()


def compiled_clips_between_others(steps: Steps) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def clip() -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(steps.model.parameters()), 0.5)

    steps()
    for _ in range(3):
        steps.backward()
        clip()
        # What is not seen to be clipped is recorded as the step meets it.
        steps.note_norm()
        steps.optimizer.step()
        steps(6)


def gradients_set_to_zero(steps: Steps) -> None:
    zero_grad = steps.optimizer.zero_grad
    steps.optimizer.zero_grad = functools.partial(zero_grad, set_to_none=False)  # type: ignore[method-assign]
    steps(20)


def half_precision(steps: Steps) -> None:
    steps.model.bfloat16()
    for _ in range(12):
        steps.optimizer.zero_grad()
        steps.model(torch.randn(5, 4).bfloat16()).square().sum().backward()
        steps.clip()
        steps.optimizer.step()


def optimizers_one_after_the_other(steps: Steps) -> None:
    for _ in range(5):
        steps.model = nn.Linear(4, 2)
        steps.optimizer = torch.optim.SGD(steps.model.parameters(), 1e-3)
        steps(7)


@pytest.mark.parametrize(
    "train",
    [
        around_another,
        around_another_at_every_seventh_step,
        a_step_fails_and_its_gradient_is_given_up,
        a_clip_raises,
        an_interrupt_in_a_clip,
        gradients_of_inference_mode,
        a_tuple_of_parameters,
        a_clip_in_a_clip,
        a_clip_that_no_python_code_calls,
        compiled_clips_between_others,
        gradients_set_to_zero,
        half_precision,
        optimizers_one_after_the_other,
    ],
)
def test_a_strange_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[[Steps], None]) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")
    found = []
    for how, believe in (("fast", watcher.STEPS_TO_BELIEVE), ("careful", 10**9)):
        monkeypatch.setattr(watcher, "STEPS_TO_BELIEVE", believe)
        (tmp_path / how).mkdir()
        steps = Steps()
        recorded = record(tmp_path / how, functools.partial(train, steps))
        assert [norm(row) for row in recorded.rows] == pytest.approx(steps.norms, rel=1e-6)
        assert [row["step"] for row in recorded.rows] == list(range(len(steps.norms)))
        found.append(as_recorded(recorded))
    assert found[0] == found[1]


def test_an_error_of_the_fast_path_ends_the_recording_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps()
    with Recorder(tmp_path / "run", quiet=True) as recorder:
        steps()
        assert recorder._watcher.steady.on
        # A step at which weights are measured, too.
        monkeypatch.setattr(UpdateNorms, "after", lambda _: 1 / 0)
        steps(20)
        assert not recorder._watcher.steady.on
    assert capsys.readouterr().err == "gradscope: recording stopped: ZeroDivisionError: division by zero\n"
    assert len(steps.norms) == 30
    assert [norm(row) for row in read_rows(tmp_path / "run.gradscope")] == pytest.approx(steps.norms[:10], rel=1e-6)


@pytest.mark.parametrize("most", [1, 4, 5, 23])
def test_no_more_steps_than_wanted(tmp_path: Path, most: int) -> None:
    loop = Unsteady(0)

    def train() -> None:
        for _ in range(30):
            loop.backward()
            loop.apart()

    rows = record(tmp_path, train, max_steps=most).rows
    assert [row["step"] for row in rows] == [step for step in range(most) for _ in "ab"]


MANY_STEPS = """
import resource, sys
from pathlib import Path
from gradscope import Recorder
from test_steady_steps import Steps

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

steps = Steps()
with Recorder(sys.argv[1], quiet=True) as recorder:
    steps(4000)
    before, blocks = resident_bytes(), sys.getallocatedblocks()
    steps(12000)
    # Of every step the norm that it notes stays.
    print(resident_bytes() - before, sys.getallocatedblocks() - blocks - 12000)
    print(recorder._watcher.steady.on, recorder.steps)
"""


def test_memory_does_not_grow(tmp_path: Path) -> None:
    paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"
    script = [sys.executable, "-c", MANY_STEPS, str(tmp_path / "run")]
    done = subprocess.run(script, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    more_bytes, more_objects, on, recorded = done.stdout.split()
    assert (on, recorded) == ("True", "16000")
    # As many copies as may wait to be measured stay, once, and the memory of the rows that waited for a busy machine.
    assert int(more_objects) < 5000
    assert int(more_bytes) < 32 << 20
