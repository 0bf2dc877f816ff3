"""PyTorch training checkpoints of any making, and the optimizer states in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.errors import GradscopeError
from gradscope.forensics import analyse
from gradscope.sources import open_source
from gradscope.sources.checkpoints.optimizer_types import class_name, optimizer_type

Optimize = Callable[[Any], torch.optim.Optimizer]


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 2)
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs)) * self.temperature


def trained(optimize: Optimize, network: torch.nn.Module | None = None, steps: int = 30) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    network = network or Network()
    optimizer = optimize(network)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    return optimizer


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def adam(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters())


@pytest.mark.parametrize(
    ("model_key", "optimizer_key"),
    [
        ("model", "optimizer"),
        ("state_dict", "optimizer"),
        ("model_state_dict", "optimizer_state_dict"),
        ("net", "optim"),
        ("network", "opt_state"),
    ],
)
def test_a_model_and_its_optimizer(tmp_path: Path, model_key: str, optimizer_key: str) -> None:
    network = Network()
    optimizer = trained(adam, network)
    content = {"epoch": 3, model_key: network.state_dict(), optimizer_key: optimizer.state_dict(), "loss": 0.1}
    source = open_source(saved(tmp_path / "checkpoint.pt", content))
    assert (source.info.format, source.info.kind) == ("PyTorch checkpoint", "checkpoint")
    (state,) = source.optimizers()
    assert state.name == optimizer_key
    assert [parameter.name for parameter in state.parameters] == [name for name, _ in network.named_parameters()]
    report = analyse(state)
    entries = optimizer.state.values()
    expected = sum(float(entry["exp_avg_sq"].double().sum()) / (1 - 0.999**30) for entry in entries)
    assert report.recent_norm == pytest.approx(math.sqrt(expected), rel=1e-9)
    weights = source.weights()
    assert weights is not None
    for name, parameter in network.named_parameters():
        assert np.array_equal(weights.read(name), parameter.detach().numpy())
    assert "body.1.running_mean: buffer" in source.skipped


def test_an_optimizer_alone(tmp_path: Path) -> None:
    optimizer = trained(adam)
    source = open_source(saved(tmp_path / "optimizer.pt", optimizer.state_dict()))
    (state,) = source.optimizers()
    assert source.weights() is None
    assert [parameter.name for parameter in state.parameters] == [f"param[{i}]" for i in range(7)]
    assert analyse(state, max_norm=1.0).saturation is not None


def test_names_that_the_optimizer_itself_holds(tmp_path: Path) -> None:
    network = Network()
    optimizer = trained(lambda model: torch.optim.Adam(model.named_parameters()), network)
    (state,) = open_source(saved(tmp_path / "optimizer.pt", optimizer.state_dict())).optimizers()
    assert [parameter.name for parameter in state.parameters] == [name for name, _ in network.named_parameters()]


def test_a_state_keyed_by_names(tmp_path: Path) -> None:
    """FSDP's full optimizer state names parameters where others number them."""
    network = Network()
    plain = trained(adam, network).state_dict()
    names = [name for name, _ in network.named_parameters()]
    plain["state"] = {names[i]: entry for i, entry in plain["state"].items()}
    plain["param_groups"][0]["params"] = names
    (state,) = open_source(saved(tmp_path / "optimizer.pt", plain)).optimizers()
    assert [parameter.name for parameter in state.parameters] == names
    assert analyse(state).recent_norm is not None


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    actor, critic = Network(), Network()
    content = {
        "actor": actor.state_dict(),
        "critic": critic.state_dict(),
        "actor_optimizer": trained(adam, actor).state_dict(),
        "optimizers": {"critic": trained(adam, critic).state_dict()},
    }
    first, second = open_source(saved(tmp_path / "sac.pt", content)).optimizers()
    names = [name for name, _ in actor.named_parameters()]
    assert (first.name, second.name) == ("actor_optimizer", "optimizers.critic")
    assert [parameter.name for parameter in first.parameters] == [f"actor.{name}" for name in names]
    assert [parameter.name for parameter in second.parameters] == [f"critic.{name}" for name in names]


def test_two_models_of_one_shape_are_not_told_apart(tmp_path: Path) -> None:
    one, other = Network(), Network()
    content = {"left": one.state_dict(), "right": other.state_dict(), "optimizer": trained(adam, one).state_dict()}
    (state,) = open_source(saved(tmp_path / "pair.pt", content)).optimizers()
    assert state.parameters[0].name == "param[0]"


def test_a_moving_average_of_the_model_is_not_what_is_trained(tmp_path: Path) -> None:
    network = Network()
    optimizer = trained(adam, network)
    content = {"ema": network.state_dict(), "model": network.state_dict(), "optimizer": optimizer.state_dict()}
    content["ema"] = {name: tensor.clone() for name, tensor in content["ema"].items()}
    (state,) = open_source(saved(tmp_path / "ema.pt", content)).optimizers()
    assert [parameter.name for parameter in state.parameters] == [f"model.{n}" for n, _ in network.named_parameters()]


def test_frozen_parameters(tmp_path: Path) -> None:
    network = Network()
    optimizer = trained(lambda model: torch.optim.Adam(model.head.parameters()), network)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    (state,) = open_source(saved(tmp_path / "head.pt", content)).optimizers()
    assert [parameter.name for parameter in state.parameters] == ["head.weight", "head.bias"]


def test_parameters_that_never_stepped_keep_their_place(tmp_path: Path) -> None:
    network = Network()
    network.body.requires_grad_(False)
    optimizer = trained(adam, network)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    (state,) = open_source(saved(tmp_path / "part.pt", content)).optimizers()
    report = analyse(state, max_norm=1.0)
    assert [tensor.name for tensor in report.tensors] == [name for name, _ in network.named_parameters()]
    assert {t.name for t in report.tensors if t.recent_norm is None} == {f"body.{i}" for i in BODY}
    assert report.saturation is not None


BODY = ("0.weight", "0.bias", "1.weight", "1.bias")


def test_a_state_dict_without_an_optimizer_is_weights(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "weights.pt", {"epoch": 1, "state_dict": Network().state_dict()}))
    assert source.info.format == "PyTorch checkpoint"
    assert source.weights() is not None
    assert source.optimizers() == ()


def test_a_bare_mapping_of_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "gradients.pt", {"a.weight": torch.ones(3), "b": {"weight": torch.ones(2)}})
    assert open_source(path).info.kind == "gradients"


# --- every optimizer of PyTorch is told by its state -----------------------------------------------------------------


OPTIMIZERS: dict[str, Optimize] = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), momentum=0.9),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]),
}
WITHOUT_ENERGY = {"Adamax", "SGD", "Rprop", "ASGD", "Muon"}


@pytest.mark.parametrize(("name", "steps"), itertools.product(OPTIMIZERS, [0, 5]))
def test_the_optimizers_class_is_told(tmp_path: Path, name: str, steps: int) -> None:
    network = Network()
    optimizer = trained(OPTIMIZERS[name], network, steps)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    (state,) = open_source(saved(tmp_path / "checkpoint.pt", content)).optimizers()
    report = analyse(state)
    # Without a state, only its hyper-parameters are left of Adamax, and they are those of others too.
    assert report.type == name or (name, steps) == ("Adamax", 0)
    assert (report.recent_norm is None) is (steps == 0 or name in WITHOUT_ENERGY)
    assert (report.unavailable is None) is (report.recent_norm is not None)
    assert report.lr == pytest.approx(float(optimizer.param_groups[0]["lr"]))
    if steps and name not in ("Muon",):
        assert state.parameters[0].name == "temperature"


@pytest.mark.parametrize(
    ("state_keys", "hyper", "expected"),
    [
        ({"state1", "state2", "qmap1", "absmax1", "step"}, {"betas", "lr"}, "8-bit"),
        ({"exp_avg"}, {"betas", "lr", "weight_decay"}, "Lion"),
        ({"exp_avg", "exp_avg_sq", "step", "exp_avg_diff"}, {"betas"}, "unknown"),
        ({"exp_avg", "exp_avg_var", "step"}, {"betas"}, "unknown"),
        ({"exp_avg", "exp_avg_sq"}, {"betas", "bias_correction", "step"}, "Adam"),
        ({"exp_avg", "exp_avg_sq", "step"}, {"betas", "correct_bias"}, "AdamW"),
        ({"whatever"}, set(), "unknown"),
    ],
)
def test_states_of_other_libraries(state_keys: set[str], hyper: set[str], expected: str) -> None:
    assert optimizer_type(state_keys, hyper, decoupled=False) == expected


def test_class_names_come_out_of_their_repr() -> None:
    assert class_name("<class 'torch.optim.adam.Adam'>") == "Adam"
    assert class_name("Adam") is None
    assert class_name(3) is None


def test_eight_bit_state_is_not_available(tmp_path: Path) -> None:
    """The layout of bitsandbytes: quantised moments, tables to decode them, and a plain step."""
    entry = {"step": 7, "state1": torch.zeros(8, 4, dtype=torch.uint8), "state2": torch.zeros(8, 4, dtype=torch.uint8)}
    entry |= {"qmap1": torch.zeros(256), "absmax1": torch.zeros(1)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    content = {"model": {"weight": torch.zeros(8, 4)}, "optimizer": {"state": {0: entry}, "param_groups": [group]}}
    (state,) = open_source(saved(tmp_path / "eight.pt", content)).optimizers()
    report = analyse(state, max_norm=1.0)
    assert (report.recent_norm, report.saturation, report.steps) == (None, None, 7.0)
    assert report.unavailable is not None
    assert report.unavailable.startswith("8-bit")
    assert state.parameters[0].name == "weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moments_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    optimizer = trained(lambda m: torch.optim.Adam(m.parameters()), Network().to(torch.float32))
    stored = optimizer.state_dict()
    for entry in stored["state"].values():
        entry["exp_avg_sq"] = (entry["exp_avg_sq"] * 1e4).to(dtype)
    expected = sum(float(entry["exp_avg_sq"].double().sum()) for entry in stored["state"].values()) / (1 - 0.999**30)
    (state,) = open_source(saved(tmp_path / "half.pt", stored)).optimizers()
    report = analyse(state, max_norm=1e3)
    assert report.recent_norm == pytest.approx(math.sqrt(expected), rel=1e-9)
    assert bool(report.groups[0].qualifications) is (dtype != torch.float64)


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7], dtype=torch.int32)])
def test_steps_are_stored_in_many_ways(tmp_path: Path, step: Any) -> None:
    entry = {"step": step, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "params": [0]}
    (state,) = open_source(saved(tmp_path / "o.pt", {"state": {0: entry}, "param_groups": [group]})).optimizers()
    assert state.parameters[0].step == 7.0
    assert analyse(state).recent_norm == pytest.approx(math.sqrt(3 / (1 - 0.999**7)))


# --- damaged and hostile states --------------------------------------------------------------------------------------


GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False}
ENTRY = {"step": 7, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}


@pytest.mark.parametrize(
    "params", ["0", {"a": 1}, [0.5], [None], [[0]], [(0, 1)]], ids=["text", "dict", "float", "none", "list", "tuple"]
)
def test_parameters_that_are_not_numbered(tmp_path: Path, params: Any) -> None:
    path = saved(tmp_path / "o.pt", {"state": {0: ENTRY}, "param_groups": [{**GROUP, "params": params}]})
    with pytest.raises(GradscopeError, match="not numbered"):
        open_source(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "seven"},
        {"step": 10**150},
        {"step": -3},
        {"step": math.nan},
        {"step": torch.ones(2)},
        {"exp_avg_sq": torch.ones(3, dtype=torch.int64)},
        {"exp_avg_sq": [1.0]},
        {"exp_avg_sq": None},
        {"exp_avg_sq": torch.tensor([1.0, math.inf, 1.0])},
        {"exp_avg": torch.ones(2, 2)},
    ],
)
def test_odd_states_are_told_in_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = {"state": {0: ENTRY | changes}, "param_groups": [{**GROUP, "params": [0]}]}
    (state,) = open_source(saved(tmp_path / "o.pt", content)).optimizers()
    report = analyse(state, max_norm=0.5)
    assert report.recent_norm is not None or report.unavailable
    assert report.recent_norm is None or math.isfinite(report.recent_norm)


@pytest.mark.parametrize("value", ["0.9", None, [], math.inf, {"a": 1}])
def test_odd_hyperparameters_are_told_in_words(tmp_path: Path, value: Any) -> None:
    group = {**GROUP, "params": [0], "lr": value, "betas": (value, value), "weight_decay": value}
    (state,) = open_source(saved(tmp_path / "o.pt", {"state": {0: ENTRY}, "param_groups": [group]})).optimizers()
    report = analyse(state, max_norm=0.5)
    assert report.lr is None
    assert report.unavailable is not None
    assert "betas" in report.unavailable
