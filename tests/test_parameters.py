"""Parameters in memory: their gradients are ``.grad``, their values the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradscope
from gradscope.errors import GradscopeError
from gradscope.sources import open_source


def trained(frozen: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    if frozen:
        model[0].bias.requires_grad_(False)
    model(torch.ones(3)).square().sum().backward()
    return model


FORMS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "module": lambda model: model,
    "mapping": lambda model: dict(model.named_parameters()),
    "pairs": lambda model: list(model.named_parameters()),
    "nested": lambda model: {str(i): dict(model[i].named_parameters()) for i in (0, 2)},
    "kept variables": lambda model: model.state_dict(keep_vars=True),
    "one step": lambda model: [dict(model.named_parameters())],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_gradients_and_weights(form: str) -> None:
    model = trained()
    source = open_source(FORMS[form](model))
    (step,) = source.read_steps(range(1))
    named = dict(model.named_parameters())
    assert [info.name for info in source.tensors] == list(named)
    expected = [float(p.grad.double().square().sum()) for p in named.values()]
    np.testing.assert_allclose(step.sum_squares, expected, rtol=1e-12)
    weights = source.weights()
    assert weights is not None
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights.read(name), parameter.detach().numpy())


def test_the_report_is_of_the_gradients() -> None:
    model = trained()
    report = gradscope.inspect(dict(model.named_parameters()))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert report.gradients is not None and report.weights is not None
    assert report.gradients.global_.l2_norm.mean == pytest.approx(float(norm), rel=1e-6)


def test_parameters_without_names_are_numbered() -> None:
    model = trained()
    source = open_source(list(model.parameters()))
    assert [info.name for info in source.tensors] == ["0", "1", "2", "3"]
    (step,) = source.read_steps(range(1))
    assert step.sum_squares[1] == pytest.approx(float(model[0].bias.grad.double().square().sum()))


def test_a_single_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    (step,) = open_source(parameter).read_steps(range(1))
    assert step.sum_squares.tolist() == [25.0]


@pytest.mark.parametrize("form", ["module", "mapping", "pairs"])
def test_a_parameter_without_a_gradient_is_named(form: str) -> None:
    source = open_source(FORMS[form](trained(frozen=True)))
    assert source.skipped == ("0.bias: None (no gradient)",)


def test_buffers_among_parameters_are_no_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model(torch.ones(4, 2)).sum().backward()
    source = open_source(model.state_dict(keep_vars=True))
    assert [info.name for info in source.tensors] == [name for name, _ in model.named_parameters()]
    assert "1.running_mean: no parameter" in source.skipped


@pytest.mark.parametrize("form", FORMS)
def test_without_any_gradient_it_says_so_unless_the_values_are_wanted(form: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    with pytest.raises(GradscopeError, match="none of its parameters has a gradient") as raised:
        open_source(FORMS[form](model))
    assert 'as_="weights"' in str(raised.value.hint)
    weights = open_source(FORMS[form](model), as_="weights").weights()
    assert weights is not None and len(weights.tensors) == 4


def test_gradients_by_name_beside_parameters_are_taken_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    for given in (
        {"w": parameter, "w.grad": torch.tensor([3.0, 4.0])},
        {"params": {"w": parameter}, "grads": {"w": torch.tensor([3.0, 4.0])}},
    ):
        source = open_source(given)
        (step,) = source.read_steps(range(1))
        assert ([info.name for info in source.tensors], step.sum_squares.tolist()) == (["w"], [25.0])


def test_tensors_that_are_no_parameters_are_gradients_themselves() -> None:
    model = trained()
    gradients = torch.autograd.grad(model(torch.ones(3)).sum(), list(model.parameters()), create_graph=True)
    names = [name for name, _ in model.named_parameters()]
    (step,) = open_source(dict(zip(names, gradients, strict=True))).read_steps(range(1))
    assert step.sum_squares[0] == pytest.approx(float(gradients[0].detach().double().square().sum()))


@pytest.mark.parametrize("given", [lambda model: model.named_parameters(), lambda model: model.parameters()])
def test_a_generator_is_refused_with_the_way_out(given: Callable[[torch.nn.Module], Any]) -> None:
    with pytest.raises(GradscopeError, match="only once") as raised:
        gradscope.inspect(given(trained()))
    assert "list(module.named_parameters())" in str(raised.value.hint)


def test_two_pairs_of_one_name() -> None:
    with pytest.raises(GradscopeError, match="two tensors named 'w'"):
        open_source([("w", np.ones(2)), ("w", np.ones(2))])
