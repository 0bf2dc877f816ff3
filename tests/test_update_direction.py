"""How far clipping turns Adam's update, against the parameters that torch.optim really moves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch
from numpy.typing import NDArray

from gradscope import results
from gradscope.optimizer_state import AdamMoments
from gradscope.simulation import simulate
from gradscope.sources import open_source
from gradscope.views.choices import ViewChoices
from gradscope.views.csv_view import simulation_csv
from gradscope.views.json_view import json_text
from gradscope.views.markdown import markdown_text
from gradscope.views.simulate_screen import simulate_screen
from tests.in_memory_source import Arrays, InMemorySource, angle_deg, flatten

Clip = Callable[[Arrays], Arrays]

SHAPES = {"body.weight": (6, 5), "body.bias": (6,), "head.weight": (2, 6), "head.bias": (2,)}
GROUPS = {"one": ["body.weight", "body.bias"], "two": ["head.weight", "head.bias"]}
LAYERS = {"body": ["body.weight", "body.bias"], "head": ["head.weight", "head.bias"]}


class WithMoments(InMemorySource):
    """Gradients beside what a checkpoint's optimizer holds."""

    def __init__(self, steps: list[Arrays], moments: Mapping[str, AdamMoments] | None, **settings: Any) -> None:
        super().__init__(steps, **settings)
        self._moments = moments

    def adam_moments(self) -> Mapping[str, AdamMoments] | None:
        return self._moments


class Trained:
    """A float64 model some steps into its training, and its checkpoint as gradscope reads it."""

    def __init__(self, tmp_path: Path, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, **hyper: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"body": torch.nn.Linear(5, 6), "head": torch.nn.Linear(6, 2)}).double()
        rates = hyper.pop("rates", (1e-2, 1e-2))
        groups = [
            {"params": list(part.parameters()), "lr": lr} for part, lr in zip(self.model.values(), rates, strict=True)
        ]
        self.optimizer = optimizer(groups, **hyper)
        self.rng = np.random.default_rng(7)
        for _ in range(5):
            self.step_with(self.model, self.optimizer, self.gradient())
        self.path = tmp_path / "checkpoint.pt"
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.path)

    def gradient(self, size: float = 1.0) -> Arrays:
        return {name: size * self.rng.standard_normal(shape) for name, shape in SHAPES.items()}

    @property
    def weights(self) -> Arrays:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.model.named_parameters()}

    def source(self, steps: list[Arrays]) -> WithMoments:
        moments = open_source(str(self.path)).adam_moments()
        return WithMoments(steps, moments, groups=GROUPS, weights=self.weights)

    def step_with(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradient: Arrays) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradient[name].copy()) if name in gradient else None
        optimizer.step()

    def update(self, gradient: Arrays) -> NDArray[np.float64]:
        """What torch.optim moves the parameters by, from where the training stands."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        self.step_with(model, optimizer, gradient)
        moved = {name: p.detach().numpy() - self.weights[name] for name, p in model.named_parameters()}
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                for name, parameter in model.named_parameters():
                    if any(parameter is own for own in group["params"]):
                        moved[name] += group["lr"] * group["weight_decay"] * self.weights[name]
        return flatten(list(moved.values()))

    def turned(self, raw: Arrays, clipped: Arrays) -> float:
        return angle_deg(self.update(raw), self.update(clipped))


def by_unit(limit: float, units: Mapping[str, list[str]]) -> Clip:
    def clip(gradient: Arrays) -> Arrays:
        clipped = dict(gradient)
        for members in units.values():
            norm = float(np.linalg.norm(flatten([gradient[name] for name in members])))
            clipped |= {name: gradient[name] * min(1.0, limit / norm) for name in members}
        return clipped

    return clip


def block_rms(gradient: Arrays) -> Arrays:
    return {name: g * min(1.0, 0.5 / float(np.sqrt(np.mean(g**2)))) for name, g in gradient.items()}


POLICIES: dict[str, Clip] = {
    "norm:0.5": by_unit(0.5, GROUPS),
    "joint-norm:0.5": by_unit(0.5, {"all": list(SHAPES)}),
    "per-layer-norm:0.8": by_unit(0.8, LAYERS),
    "per-tensor-norm:0.3": by_unit(0.3, {name: [name] for name in SHAPES}),
    "value:0.2": lambda gradient: {name: np.clip(g, -0.2, 0.2) for name, g in gradient.items()},
    "block-rms:0.5": block_rms,
}


def change(simulation: results.Simulation, policy: int = 0) -> results.Spread:
    found = simulation.results[policy].update_direction_change_deg
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-2}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"rates": (1e-2, 3e-4)}),
    ],
)
def test_the_update_is_torchs_own_for_every_policy(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    trained = Trained(tmp_path, optimizer, **hyper)
    steps = [trained.gradient(size) for size in (0.1, 1.0, 30.0)]
    simulation = simulate(trained.source(steps), list(POLICIES))
    for i, clip in enumerate(POLICIES.values()):
        angles = [trained.turned(step, clip(step)) for step in steps]
        assert change(simulation, i).max == pytest.approx(max(angles), abs=1e-6)
        assert change(simulation, i).mean == pytest.approx(np.mean(angles), abs=1e-6)
        assert max(angles) > 0.1


def test_agc_scales_each_unit_before_the_update(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    step = trained.gradient(2.0)
    agc = optax.adaptive_grad_clip(0.01, 1e-3)
    transposed, weights = ({n: a.T for n, a in arrays.items()} for arrays in (step, trained.weights))
    clipped, _ = agc.update(transposed, agc.init(weights), weights)
    expected = trained.turned(step, {name: np.asarray(array, np.float64).T for name, array in clipped.items()})
    assert change(simulate(trained.source([step]), "agc:0.01")).max == pytest.approx(expected, abs=1e-3)


def test_a_moving_limit_is_that_of_the_step(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    steps = [trained.gradient(size) for size in (1.0, 3.0, 0.5, 8.0)]
    norms = {name: [float(np.linalg.norm(flatten([s[n] for n in own]))) for s in steps] for name, own in GROUPS.items()}
    angles = []
    for t, step in enumerate(steps):
        limits = {name: np.percentile(series[: t + 1], 40) for name, series in norms.items()}
        clipped = {
            n: step[n] * min(1.0, limits[name] / norms[name][t]) for name, members in GROUPS.items() for n in members
        }
        angles.append(trained.turned(step, clipped))
    found = change(simulate(trained.source(steps), "autoclip:40"))
    assert found.max == pytest.approx(max(angles), abs=1e-6)
    assert found.mean == pytest.approx(np.mean(angles), abs=1e-6)


def test_zclip_goes_on_after_its_warmup(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    sizes = [*np.linspace(0.01, 0.02, 25), 0.2]
    steps = [trained.gradient(size) for size in sizes]
    simulation = simulate(trained.source(steps), "zclip:2.5")
    assert simulation.results[0].clipped_steps == 1
    scales = {group.name: group.scale.min for group in simulation.results[0].groups}
    clipped = {n: steps[-1][n] * scales[name] for name, members in GROUPS.items() for n in members}
    assert change(simulation).max == pytest.approx(trained.turned(steps[-1], clipped), abs=1e-6)


def test_a_dropped_step_has_no_update(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    source = trained.source([trained.gradient(0.01), trained.gradient(50.0)])
    simulation = simulate(source, ["skip:1", "skip:1e-6"])
    assert change(simulation).max == 0.0
    assert simulation.results[0].clipped_steps == 1
    assert simulation.results[1].update_direction_change_deg is None


def test_a_common_factor_turns_the_update_by_hand() -> None:
    # m = (1, 0), v = (0, 0), betas (0.5, 0), eps 0, t = 1: u = (0.5 + 0.5 g1, 0.5 g2)/|g|, elementwise.
    held = AdamMoments(lambda: np.array([1.0, 0.0]), lambda: np.zeros(2), 1.0, 0.1, (0.5, 0.0), 0.0)
    source = WithMoments([{"w": np.array([3.0, 4.0])}], {"w": held})
    # raw: (2/3, 1/2); clipped to norm 0.5, (0.3, 0.4): (0.65/0.3, 1/2).
    raw, clipped = math.atan2(1 / 2, 2 / 3), math.atan2(1 / 2, 0.65 / 0.3)
    simulation = simulate(source, "norm:0.5")
    assert change(simulation).max == pytest.approx(math.degrees(raw - clipped))
    kept = simulation.results[0].direction_change_deg
    assert kept is not None
    assert kept.max == 0.0


def test_small_angles_survive() -> None:
    held = AdamMoments(lambda: np.zeros(2), lambda: np.zeros(2), 0.0, 0.1, (0.0, 0.0), 1e9)
    source = WithMoments([{"w": np.array([1.0, 1e-9])}], {"w": held})
    # So large an eps leaves u = g/eps: clipping the first element by 1e-10 turns it by 1e-19 radians.
    found = change(simulate(source, f"value:{1 - 1e-10!r}"))
    assert found.max == pytest.approx(math.degrees(1e-19), rel=1e-4)


def test_a_tensor_without_a_gradient_is_not_updated(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    full = trained.gradient(3.0)
    step = full | {"head.weight": np.zeros((2, 6))}
    present = np.array([name != "head.weight" for name in SHAPES])
    source = trained.source([step])
    read_steps = source.read_steps
    source.read_steps = lambda *given: (replace(s, present=present) for s in read_steps(*given))  # type: ignore[method-assign]
    without = {name: array for name, array in step.items() if name != "head.weight"}
    clipped = POLICIES["value:0.2"](without)
    assert change(simulate(source, "value:0.2")).max == pytest.approx(trained.turned(without, clipped), abs=1e-6)


def test_a_parameter_that_was_never_updated_starts_at_zero(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    trained.optimizer.state.pop(trained.model["head"].bias)
    torch.save({"model": trained.model.state_dict(), "optimizer": trained.optimizer.state_dict()}, trained.path)
    step = trained.gradient(2.0)
    clipped = POLICIES["value:0.2"](step)
    found = change(simulate(trained.source([step]), "value:0.2"))
    assert found.max == pytest.approx(trained.turned(step, clipped), abs=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adam, {"maximize": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_another_update_is_not_available(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    trained = Trained(tmp_path, optimizer, **hyper)
    assert open_source(str(trained.path)).adam_moments() is None
    simulation = simulate(trained.source([trained.gradient()]), "norm:0.5")
    assert json.loads(json_text(simulation))["results"][0]["update_direction_change_deg"] is None


def test_moments_of_some_tensors_only_are_not_enough(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    source = trained.source([trained.gradient() | {"new.weight": np.ones(3)}])
    assert simulate(source, "norm:0.5").results[0].update_direction_change_deg is None


def test_tables_and_sentences_show_it_where_it_is_known(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    steps = [trained.gradient(size) for size in (1.0, 30.0)]
    for source in (trained.source(steps), trained.source(steps[:1])):
        simulation = simulate(source, ["norm:0.5"])
        assert "| update turned |" in markdown_text(simulate_screen(simulation, ViewChoices()))
        assert any(line.startswith("Adam's next update turns") for line in simulation.findings)
        assert f",{change(simulation).p50!r},{change(simulation).max!r}" in simulation_csv(simulation)
    unknown = simulate(InMemorySource(steps), ["norm:0.5"])
    assert "update turned" not in markdown_text(simulate_screen(unknown, ViewChoices()))
    assert not any("Adam" in line for line in unknown.findings)
