"""Any model and any loss on a captured batch: the gradients are those that torch itself gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gradscope
from gradscope.backward.batch_gradients import open_batch
from gradscope.backward.opening import open_with_batch
from gradscope.backward.options import BatchOptions, batch_options
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources import open_source

ROWS = 48


class Net(nn.Module):
    """A buffer that the forward needs, one that it changes, a tied weight, and a parameter that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.last.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("factor", torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.last(torch.tanh(self.norm(self.first(x))))) * self.factor


def per_row(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(dim=1)


def scalar(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return per_row(model, batch).mean()


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(7)
    net = Net()
    net.factor.mul_(1.5)
    net.norm.running_mean.add_(3.0)
    return net


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    torch.manual_seed(8)
    return {"x": torch.randn(ROWS, 5), "y": torch.randn(ROWS, 8)}


def gradients(source: GradientSource) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What each step holds, copied while it is there."""
    return [
        {info.name: np.array(step.read(i)) for i, info in enumerate(source.tensors)}
        for step in source.read_steps(range(source.info.steps))
    ]


def torchs(net: Net, batch: dict[str, Tensor], rows: Any = slice(None)) -> dict[str, np.ndarray[Any, Any]]:
    model = copy.deepcopy(net).train()
    model.zero_grad()
    scalar(model, {name: column[rows] for name, column in batch.items()}).backward()
    return {n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for n, p in model.named_parameters()}


def same(found: dict[str, np.ndarray[Any, Any]], expected: dict[str, np.ndarray[Any, Any]], prefix: str = "") -> None:
    assert list(found) == [prefix + name for name in expected]
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[prefix + name], gradient, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())


def lightning(net: Net) -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    state["metric.total"] = torch.ones(1)
    return {"pytorch-lightning_version": "2.4", "state_dict": state, "optimizer_states": []}


def adam(net: Net) -> dict[str, Any]:
    return torch.optim.Adam(net.parameters()).state_dict()


KINDS: dict[str, tuple[str, Callable[[Net], Any]]] = {
    "plain": ("", lambda net: net.state_dict()),
    "compiled": ("_orig_mod.", lambda net: {f"_orig_mod.{n}": t for n, t in net.state_dict().items()}),
    "nested model": ("model.", lambda net: {"model": net.state_dict(), "epoch": 3}),
    "state_dict": ("", lambda net: {"state_dict": net.state_dict()}),
    "training": ("", lambda net: {"model": net.state_dict(), "optimizer": adam(net)}),
    "ddp": ("module.", lambda net: {"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}),
    "lightning": ("model.", lightning),
    "rsl_rl": ("actor.", lambda net: {
        "actor_state_dict": net.state_dict(), "critic_state_dict": nn.Linear(2, 1).state_dict(),
        "optimizer_state_dict": adam(net), "iter": 1, "infos": None,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_of_checkpoint(kind: str, net: Net, batch: dict[str, Tensor], tmp_path: Path) -> None:
    prefix, make = KINDS[kind]
    torch.save(make(net), tmp_path / "c.pt")
    opened = open_with_batch(tmp_path / "c.pt", BatchOptions(batch, Net, per_row))
    (found,) = gradients(opened)
    same(found, torchs(net, batch), prefix)


def test_safetensors_that_keep_one_name_of_a_tied_weight(net: Net, batch: dict[str, Tensor], tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "last.weight"}
    save_file(state, tmp_path / "c.safetensors")
    (found,) = gradients(open_with_batch(tmp_path / "c.safetensors", BatchOptions(batch, Net, scalar)))
    same(found, torchs(net, batch))


def test_a_step_for_each_minibatch_and_every_row_once_an_epoch(net: Net, batch: dict[str, Tensor]) -> None:
    options = BatchOptions(batch, net, scalar, minibatch_size=20, epochs=2, seed=5)
    source = open_with_batch(net, options)
    assert [len(rows) for rows in source.minibatches] == [20, 20, 8] * 2
    epochs = np.split(np.concatenate(source.minibatches), 2)
    assert all(np.array_equal(np.sort(rows), np.arange(ROWS)) for rows in epochs)
    assert not np.array_equal(*epochs)
    assert [step.samples for step in source.read_steps(range(6))] == [20, 20, 8, None, None, None]
    for rows, found in zip(source.minibatches, gradients(source), strict=True):
        same(found, torchs(net, batch, rows))
    again = open_with_batch(net, options)
    assert all(map(np.array_equal, source.minibatches, again.minibatches))
    other = open_with_batch(net, BatchOptions(batch, net, scalar, minibatch_size=20, epochs=2, seed=6))
    assert not all(map(np.array_equal, source.minibatches, other.minibatches))


def test_nothing_of_the_callers_is_changed(net: Net, batch: dict[str, Tensor]) -> None:
    before = copy.deepcopy(net.state_dict())
    net.eval()
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    source = open_with_batch(net, BatchOptions(batch, net, scalar, minibatch_size=16))
    first, second = gradients(source), gradients(source)
    assert torch.equal(torch.rand(3), undisturbed)
    assert not net.training and all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    # The running mean of BatchNorm moves with each forward; the model that is read twice does not.
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_dropout_is_drawn_from_the_seed() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = {"x": torch.randn(6, 4)}

    def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).mean()

    def found(seed: int) -> np.ndarray[Any, Any]:
        return gradients(open_with_batch(model, BatchOptions(x, model, mean, seed=seed)))[0]["2.weight"]

    assert np.array_equal(found(1), found(1)) and not np.array_equal(found(1), found(2))
    assert (found(1) == 0.0).any()


def test_parameters_without_a_gradient_and_frozen_ones_are_named(net: Net, batch: dict[str, Tensor]) -> None:
    frozen = copy.deepcopy(net)
    frozen.first.bias.requires_grad_(False)
    found = gradscope.inspect(net, batch=batch, model=frozen, loss=scalar)
    assert "Frozen in the model, and so without gradient: first.bias." in found.notes
    assert "No gradient reaches unused." in found.notes
    assert "first.bias" not in {tensor.name for tensor in found.gradients.tensors}
    assert (
        "No gradient reaches unused." in gradscope.simulate(net, ["norm:1"], batch=batch, model=net, loss=scalar).notes
    )


def test_a_layer_that_nothing_reaches_is_not_clipped_with_the_rest(batch: dict[str, Tensor]) -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 8), "unused": nn.Linear(2, 2)})

    def loss(model: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
        return scalar(model["used"], batch)

    found = gradscope.simulate(model, ["norm:1e-3"], batch=batch, model=model, loss=loss, minibatch_size=16)
    rates = {layer.name: layer.clip_rate for layer in found.results[0].layers}
    assert rates["used"] == 1.0 and np.isnan(rates["unused"])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype(dtype: str, batch: dict[str, Tensor]) -> None:
    model = nn.Linear(5, 8)
    seen = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append((batch["x"].dtype, batch["row"].dtype, next(model.parameters()).dtype))
        return scalar(model, batch)

    source = open_with_batch(model, BatchOptions({**batch, "row": torch.arange(ROWS)}, model, loss, dtype=dtype))
    (found,) = gradients(source)
    assert {info.dtype for info in source.tensors} == {dtype}
    assert seen == [(getattr(torch, dtype), torch.int64, getattr(torch, dtype))]
    exact = model.double()
    scalar(exact, {name: column.double() for name, column in batch.items()}).backward()
    tolerance = 1e-12 if dtype == "float64" else 0.05
    scale = float(exact.weight.grad.abs().max())
    np.testing.assert_allclose(found["weight"], exact.weight.grad.numpy(), rtol=0, atol=tolerance * scale)


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    rows = {"i": torch.tensor([1, 1, 4])}
    (found,) = gradients(open_with_batch(table, BatchOptions(rows, table, lambda m, b: m(b["i"]).sum())))
    expected = np.zeros((10, 3))
    expected[1], expected[4] = 2.0, 1.0
    np.testing.assert_array_equal(found["weight"], expected)


def test_one_minibatch_is_in_memory_at_a_time(batch: dict[str, Tensor]) -> None:
    model, rows = nn.Linear(5, 8), []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        rows.append(len(batch["x"]))
        return scalar(model, batch)

    source = open_with_batch(model, BatchOptions(batch, model, loss, minibatch_size=16))
    told: list[tuple[int, int]] = []
    steps = source.read_steps(range(1, 3), lambda done, total: told.append((done, total)))
    assert rows == []
    next(steps)
    assert rows == [16]
    assert len(list(steps)) == 1
    assert told == [(16, 32), (32, 32)]


class TwoNets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target, self.online = nn.Linear(2, 1), nn.Linear(2, 1)


def test_of_two_that_fit_the_trained_one_is_taken(tmp_path: Path) -> None:
    both = TwoNets()
    optimizer = torch.optim.Adam(both.online.parameters())
    both.online(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": both.state_dict(), "online_optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    options = BatchOptions({"x": torch.ones(1, 2)}, lambda: nn.Linear(2, 1), lambda m, b: m(b["x"]).square().mean())
    source = open_with_batch(tmp_path / "c.pt", options)
    (found,) = gradients(source)
    expected = 2 * float(both.online(torch.ones(1, 2)))
    np.testing.assert_allclose(found["online.bias"], [expected], rtol=1e-6)
    assert "The model's weights are those under 'online.'; target. would fit it as well." in source.notes


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 9), nn.ModuleList(nn.Linear(1, 1) for _ in range(3))


@pytest.mark.parametrize(
    ("shapes", "model", "said"),
    [
        ({"weight": (2, 3)}, lambda: nn.Linear(3, 2), "of the model's tensors it lacks 1: bias"),
        ({"weight": (1, 1), "bias": (1,), "v": (1,)}, lambda: nn.Linear(1, 1), "of its tensors the model lacks 1: v"),
        (
            {"first.weight": (9, 5), "first.bias": (9,)},
            Wider,
            "lacks 6: head.0.weight, head.0.bias, head.1.weight and 3 more",
        ),
        (
            {"weight": (2, 3), "bias": (2,)},
            lambda: nn.Linear(3, 4),
            "2 shapes differ: weight is [2, 3], in the model [4, 3]; bias",
        ),
        ({"weight": (2, 3)}, lambda: nn.LazyLinear(4), "does not fit a lazy model"),
    ],
)
def test_weights_that_do_not_fit_are_named(shapes: Any, model: Any, said: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "c.pt")
    with pytest.raises(GradscopeError) as refused:
        open_with_batch(tmp_path / "c.pt", BatchOptions({"x": torch.ones(3)}, model, scalar))
    assert said in refused.value.why and refused.value.what == str(tmp_path / "c.pt")


def nothing(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return None


def stepping(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        model.weight.add_(1.0)
    return model(batch["x"]).mean()


def differentiating(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(batch["x"]).square().mean()
    loss.backward(retain_graph=True)
    return loss


class Ended(BaseException):
    """Of a library that ends what runs it, as a test's timeout does."""


def ending(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    raise Ended("enough")


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def speechless(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    raise SpeechlessError


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda m, b: m(b["x"]), "shape [4, 2], neither a scalar nor one loss for each of the 4 rows"),
        (lambda m, b: m(b["x"]).mean().item(), "returned a float, not a tensor"),
        (nothing, "returned nothing (None), not a tensor"),
        (lambda m, b: m(b["x"]).detach().mean(), "does not depend on the parameters"),
        (lambda m, b: torch.ones((), requires_grad=True) * 2, "no gradient of its loss reaches any parameter"),
        (lambda m, b: (m(b["x"]) > 0).sum(), "returned torch.int64, which has no gradient"),
        (lambda m, b: m(b["x"]).mean() * float("nan"), "returned nan"),
        (lambda m, b: m(b["x"]).mean() - float("inf"), "returned -inf"),
        (lambda m, b: m(b["y"]).mean(), "raised KeyError: 'y'"),
        (lambda m, b: m(b["x"].double()).mean(), "raised RuntimeError: "),
        (stepping, "changed the model's weights"),
        (differentiating, "called backward() itself"),
        (ending, "raised Ended: enough"),
        (speechless, "raised SpeechlessError"),
    ],
)  # fmt: skip
def test_losses_that_give_no_gradient(loss: Any, said: str) -> None:
    model = nn.Linear(3, 2)
    source = open_with_batch(model, BatchOptions({"x": torch.ones(4, 3)}, model, loss))
    with pytest.raises(GradscopeError) as refused:
        list(source.read_steps(range(1)))
    assert said in refused.value.why and "\n" not in str(refused.value)


def test_the_step_whose_loss_is_not_finite_is_named() -> None:
    model = nn.Linear(1, 1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) / batch["d"]).mean()

    columns = {"x": torch.ones(8, 1), "d": torch.ones(8, 1)}
    columns["d"][5] = 0.0
    source = open_with_batch(model, BatchOptions(columns, model, loss, minibatch_size=2))
    fault = next(i for i, rows in enumerate(source.minibatches) if 5 in rows)
    with pytest.raises(GradscopeError, match=rf"returned -?inf \(at step {fault}\)"):
        list(source.read_steps(range(4)))


def test_a_gradient_that_is_not_finite_is_counted_not_refused() -> None:
    model = nn.Linear(1, 1, bias=False)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) * 0.0).abs().sqrt().mean()

    found = gradscope.inspect(model, batch={"x": torch.ones(8, 1)}, model=model, loss=loss)
    assert found.gradients.global_.nonfinite_steps == 1


def test_options_that_do_not_serve(tmp_path: Path) -> None:
    model, x = nn.Linear(1, 1), {"x": torch.ones(2, 1)}
    checkpoint = open_source(model, as_="weights")
    for options, said in [
        ({"minibatch_size": 3}, "--minibatch-size 3: is more than the 2 rows of batch"),
        ({"device": "gpu"}, "--device gpu: is no device"),
        ({"device": "meta"}, "--device meta: computes nothing"),
        ({"dtype": "int8"}, "--dtype int8: must be one of float32"),
        ({"loss": None}, "--model: goes with --loss"),
        ({"model": None}, "--loss: goes with --model"),
        ({"model": None, "loss": None}, "does not say what model and loss it belongs to"),
        ({"loss": 3}, "loss int: is no function"),
        ({"model": dict}, "model dict: returned a dict, not a torch.nn.Module"),
        ({"model": nn.Identity}, "of its tensors the model lacks 2"),
    ]:
        with pytest.raises(GradscopeError) as refused:
            open_batch(checkpoint, BatchOptions(**{"batch": x, "model": model, "loss": scalar, **options}))  # type: ignore[arg-type]
        assert said in str(refused.value)
    for options, said in [
        ({"epochs": 0}, "--epochs 0: must be a whole number of at least 1"),
        ({"minibatch_size": 0}, "--minibatch-size 0: must be"),
        ({"seed": -1}, "--seed -1: must be"),
    ]:
        with pytest.raises(GradscopeError) as refused:
            batch_options(x, **options)
        assert said in str(refused.value)
    with pytest.raises(GradscopeError, match="--trust: goes with --batch"):
        gradscope.inspect(model, trust=True)


def test_a_model_with_nothing_to_train() -> None:
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(GradscopeError, match="no trainable parameters"):
        open_with_batch(model, BatchOptions({"x": torch.ones(2, 1)}, model, scalar))
