"""The fast path for steps like the last records what the careful one does, whatever a training loop does next."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import Recorded, record
from torch import nn

from gradscope.recording import watcher

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
