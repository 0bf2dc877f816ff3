"""A model in memory with a batch and a loss: the right gradients, and everything left as it was."""

from __future__ import annotations

import functools
import itertools
import random
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradscope.backward.batch_parts import MOST_BATCHES
from gradscope.backward.in_memory import gradients_in_memory
from gradscope.errors import GradscopeError
from gradscope.health.checking import check

Pair = namedtuple("Pair", ["inputs", "targets"])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.ReLU(), nn.Linear(8, 2)).double()


def _rows(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 4, generator=generator, dtype=torch.float64),
        torch.randint(0, 2, (count,), generator=generator),
    )


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model = model.train()
    loss = nn.functional.cross_entropy(model(x), y)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _read(source: Any) -> list[list[Tensor]]:
    steps = source.read_steps(range(source.info.steps))
    return [[torch.from_numpy(np.array(step.read(i))) for i in range(len(source.tensors))] for step in steps]


X, Y = _rows()
ENTROPY = nn.functional.cross_entropy


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        ((X, Y), nn.CrossEntropyLoss()),
        ([X, Y], ENTROPY),
        (Pair(X, Y), functools.partial(ENTROPY, reduction="none")),
        ((X, Y), lambda model, batch: ENTROPY(model(batch[0]), batch[1])),
        (Pair(X, Y), lambda model, batch: ENTROPY(model(batch.inputs), batch.targets)),
        ({"x": X.numpy(), "y": Y}, lambda model, batch: ENTROPY(model(batch["x"]), batch["y"], reduction="none")),
        ({"in": {"x": X}, "out": [Y]}, lambda model, batch: ENTROPY(model(batch["in"]["x"]), batch["out"][0])),
        (torch.cat([X, Y[:, None]], 1), lambda model, rows: ENTROPY(model(rows[:, :4]), rows[:, 4].long())),
        ([(X, Y)], nn.CrossEntropyLoss()),
    ],
)
def test_the_gradient_is_that_of_autograd(model: nn.Module, batch: Any, loss: Callable[..., Any]) -> None:
    with gradients_in_memory(model, batch, loss) as source:
        (step,) = _read(source)
    for read, expected in zip(step, _gradient(model, X, Y), strict=True):
        torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-15)


def test_the_file_of_a_captured_batch_serves(model: nn.Module, tmp_path: Any) -> None:
    save_file({"x": X, "y": Y}, tmp_path / "batch.safetensors")
    with gradients_in_memory(model, tmp_path / "batch.safetensors", lambda m, b: ENTROPY(m(b["x"]), b["y"])) as source:
        (step,) = _read(source)
    torch.testing.assert_close(step[0], _gradient(model, X, Y)[0], rtol=1e-12, atol=1e-15)


def test_a_step_is_a_minibatch_of_rows_none_of_which_two_have(model: nn.Module) -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[1])
        return ENTROPY(model(batch[0]), batch[1])

    number = torch.arange(24)
    with gradients_in_memory(model, (X, number % 2, number), lambda m, b: loss(m, (b[0], b[1])), minibatch_size=7) as s:
        assert [step.samples for step in s.read_steps(range(s.info.steps))] == [7, 7, 7, 3]
    assert sorted(map(len, seen)) == [3, 7, 7, 7]


def test_each_batch_of_a_loader_is_a_step(model: nn.Module) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=10)
    with gradients_in_memory(model, loader, nn.CrossEntropyLoss()) as source:
        steps = _read(source)
        assert source.notes == ()
    assert len(steps) == 3
    for rows, step in zip((slice(0, 10), slice(10, 20), slice(20, 24)), steps, strict=True):
        torch.testing.assert_close(step[0], _gradient(model, X[rows], Y[rows])[0], rtol=1e-12, atol=1e-15)


def test_batches_without_end_are_taken_from_the_beginning(model: nn.Module) -> None:
    with gradients_in_memory(model, itertools.repeat((X, Y)), nn.CrossEntropyLoss()) as source:
        assert source.info.steps == MOST_BATCHES
        assert source.notes == (f"Only the first {MOST_BATCHES} batches were taken.",)
    with pytest.raises(GradscopeError, match="go with one batch"):
        gradients_in_memory(model, [(X, Y), (X, Y)], ENTROPY, minibatch_size=4).__enter__()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda model, batch: model.forward("nothing of the kind")])
def test_everything_is_left_as_it_was(model: nn.Module, training: bool, loss: Callable[..., Any]) -> None:
    model.train(training)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    gradient = torch.ones_like(model[0].weight)
    model[0].weight.grad = gradient
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    random_states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=10, shuffle=True)
    try:
        with gradients_in_memory(model, loader, loss) as source:
            check([source])
    except GradscopeError as error:
        assert "raised TypeError" in str(error)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, kept) for name, (tensor, kept) in before.items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 5 + [False]
    assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert np.array_equal(np.random.get_state()[1], random_states[1])
    assert random.getstate() == random_states[2]


def test_parts_that_a_trained_model_keeps_in_eval_mode_stay_there(model: nn.Module) -> None:
    seen: list[tuple[bool, bool]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((model.training, model[1].training))
        return ENTROPY(model(batch[0]), batch[1])

    for mode in (True, False):
        model.train(mode)
        model[1].eval()
        with gradients_in_memory(model, (X, Y), loss) as source:
            _read(source)
    assert seen == [(True, False), (True, True)]


def test_a_loss_that_steps_is_refused_and_undone(model: nn.Module) -> None:
    before = model[0].weight.detach().clone()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            model[0].weight += 1.0
        return ENTROPY(model(batch[0]), batch[1])

    with (
        pytest.raises(GradscopeError, match="changed the model's weights"),
        gradients_in_memory(model, (X, Y), loss) as source,
    ):
        _read(source)
    assert torch.equal(model[0].weight, before)


def test_the_optimizer_is_read_as_a_checkpoint_is(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(list(reversed(parameters.values())), lr=1e-3)
    unused = parameters.pop("4.bias")
    for _ in range(3):
        optimizer.zero_grad()
        ENTROPY(model(X), Y).backward()
        unused.grad = None
        optimizer.step()
    kept = {key: value.clone() for key, value in optimizer.state[parameters["0.weight"]].items()}
    with gradients_in_memory(model, (X, Y), ENTROPY, optimizer=optimizer) as source:
        (state,) = source.optimizers()
        outcomes = {outcome.rule: outcome for outcome in check([source]).rules}
        moments = source.adam_moments()
    assert state.type == "Adam"
    assert [parameter.name for parameter in state.parameters] == ["4.bias", *reversed(parameters)]
    assert moments is not None and set(moments) >= set(parameters)
    assert outcomes["unused"].status == "fail"
    assert "4.bias" in outcomes["unused"].message
    assert all(torch.equal(optimizer.state[parameters["0.weight"]][key], value) for key, value in kept.items())


def test_a_loss_that_is_no_number_is_for_the_rules(model: nn.Module) -> None:
    with gradients_in_memory(model, (X * float("nan"), Y), nn.CrossEntropyLoss()) as source:
        result = check([source])
    assert [outcome.rule for outcome in result.rules if outcome.status == "fail"] == ["nonfinite"]
