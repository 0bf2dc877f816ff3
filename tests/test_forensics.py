"""Optimizer forensics against the gradients themselves: real optimizers, float64, and the theorem's two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from gradscope.forensics import analyse, at_limit_share
from gradscope.optimizer_state import OptimizerState, ParameterState, StoredMoment
from gradscope.results import OptimizerReport
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import ClipGroup

SHAPES = {"actor.weight": (3, 4), "actor.bias": (3,), "critic.weight": (2, 3, 2)}
Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def state_of(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    groups: tuple[ClipGroup, ...] = (),
    type_: str | None = None,
) -> OptimizerState:
    """The state of a live optimizer, as a checkpoint source would hand it over."""
    stored = optimizer.state_dict()
    owner = {i: g for g, group in enumerate(stored["param_groups"]) for i in group["params"]}
    parameters = []
    for i, name in enumerate(names):
        entry = stored["state"].get(i, {})
        moments = {
            key: StoredMoment(
                tuple(value.shape),
                str(value.dtype).removeprefix("torch."),
                MagnitudeSpectrum.of(value.detach().double().numpy()),
            )
            for key, value in entry.items()
            if isinstance(value, torch.Tensor) and value.ndim
        }
        step = entry.get("step")
        parameters.append(
            ParameterState(name, SHAPES.get(name, ()), owner[i], None if step is None else float(step), moments)
        )
    return OptimizerState(
        "optimizer", type_ or type(optimizer).__name__, tuple(stored["param_groups"]), tuple(parameters), groups
    )


def gradients(steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Random gradients whose size drifts over three decades, so that a wrong weighting shows."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(-2, 1, size=(steps, 1))
    return [[size[0] * random.normal(0.3, 1.0, shape) for shape in SHAPES.values()] for size in sizes]


def train(factory: Factory, history: list[list[np.ndarray]]) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES.values()]
    optimizer = factory(parameters)
    for step in history:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    return optimizer


def exponential_weights(decay: float, steps: int) -> np.ndarray:
    weights = decay ** np.arange(steps - 1, -1, -1)
    return weights / weights.sum()


def adafactor_weights(steps: int) -> np.ndarray:
    weights = np.zeros(steps)
    for t in range(1, steps + 1):
        weights *= 1 - t**-0.8
        weights[t - 1] = t**-0.8
    return weights


def hugging_face_adafactor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return HuggingFaceAdafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


OPTIMIZERS: dict[str, tuple[Factory, Callable[[int], np.ndarray]]] = {
    "Adam": (torch.optim.Adam, lambda n: exponential_weights(0.999, n)),
    "amsgrad": (lambda p: torch.optim.Adam(p, amsgrad=True), lambda n: exponential_weights(0.999, n)),
    "tensor lr": (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)), lambda n: exponential_weights(0.999, n)),
    "AdamW": (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95)), lambda n: exponential_weights(0.95, n)),
    "NAdam": (torch.optim.NAdam, lambda n: exponential_weights(0.999, n)),
    "RAdam": (torch.optim.RAdam, lambda n: exponential_weights(0.999, n)),
    "RMSprop": (torch.optim.RMSprop, lambda n: exponential_weights(0.99, n)),
    "centered RMSprop": (lambda p: torch.optim.RMSprop(p, centered=True), lambda n: exponential_weights(0.99, n)),
    "RMSpropTFLike": (RMSpropTFLike, lambda n: exponential_weights(0.99, n)),
    "Adadelta": (torch.optim.Adadelta, lambda n: exponential_weights(0.9, n)),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), lambda n: np.full(n, 1 / n)),
    "Adafactor": (torch.optim.Adafactor, adafactor_weights),
    "Hugging Face Adafactor": (hugging_face_adafactor, adafactor_weights),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 7, 150])
def test_recent_norm_is_the_weighted_mean_of_the_squared_norms(name: str, steps: int) -> None:
    factory, weights_of = OPTIMIZERS[name]
    history = gradients(steps)
    report = analyse(state_of(train(factory, history), list(SHAPES)))
    energies = np.array([[np.sum(g**2) for g in step] for step in history])
    expected = weights_of(steps) @ energies
    assert report.recent_norm == pytest.approx(math.sqrt(expected.sum()), rel=1e-9)
    for tensor, energy in zip(report.tensors, expected, strict=True):
        assert tensor.recent_norm == pytest.approx(math.sqrt(energy), rel=1e-9)
        assert tensor.share == pytest.approx(energy / expected.sum(), rel=1e-9)
    assert (report.steps, report.unavailable, report.qualifications) == (steps, None, ())


@pytest.mark.parametrize(
    ("name", "decay"),
    [("Adam", 0.9), ("AdamW", 0.8), ("NAdam", 0.9), ("RAdam", 0.9), ("centered RMSprop", 0.99)],
)
def test_mean_norm_is_the_norm_of_the_weighted_mean_gradient(name: str, decay: float) -> None:
    history = gradients(400)
    report = analyse(state_of(train(OPTIMIZERS[name][0], history), list(SHAPES)))
    weights = exponential_weights(decay, 400)
    mean = [sum(w * step[i] for w, step in zip(weights, history, strict=True)) for i in range(len(SHAPES))]
    expected = math.sqrt(sum(float(np.sum(m**2)) for m in mean))
    assert report.mean_norm == pytest.approx(expected, rel=1e-9)
    floor = (1 - decay) / (1 + decay)
    assert report.recent_norm is not None
    assert report.consistency == pytest.approx(((expected / report.recent_norm) ** 2 - floor) / (1 - floor), rel=1e-6)
    assert report.mean_window == pytest.approx(1 / (1 - decay), rel=1e-12)
    assert type(report.steps) is int


@pytest.mark.parametrize(("decay", "window"), [(0.999, 1000), (0.99, 100), (0.9, 10), (0.0, 1), (0.9999, 10_000)])
def test_windows_are_whole_where_their_decay_says_so(decay: float, window: int) -> None:
    state = state_of(train(partial(torch.optim.Adam, betas=(0.5, decay)), gradients(3)), list(SHAPES))
    assert analyse(state).window == window


def test_adamax_knows_the_mean_gradient_only() -> None:
    history = gradients(50)
    report = analyse(state_of(train(torch.optim.Adamax, history), list(SHAPES)), max_norm=1.0)
    weights = exponential_weights(0.9, 50)
    mean = [sum(w * step[i] for w, step in zip(weights, history, strict=True)) for i in range(len(SHAPES))]
    assert report.mean_norm == pytest.approx(math.sqrt(sum(float(np.sum(m**2)) for m in mean)))
    assert report.recent_norm is None
    assert report.saturation is None
    assert report.unavailable is not None
    assert "Adamax" in report.unavailable


def test_momentum_sgd_knows_its_buffer_only() -> None:
    optimizer = train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), gradients(20))
    report = analyse(state_of(optimizer, list(SHAPES)), max_norm=1.0)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]
    assert report.momentum_norm == pytest.approx(math.sqrt(sum(float(b.square().sum()) for b in buffers)))
    assert (report.recent_norm, report.saturation) == (None, None)
    assert report.unavailable == "SGD keeps a momentum buffer only, no squared gradients"


def test_plain_sgd_keeps_nothing() -> None:
    report = analyse(state_of(train(lambda p: torch.optim.SGD(p, lr=0.1), gradients(3)), list(SHAPES)))
    assert report.unavailable == "SGD without momentum keeps nothing of its gradients"
    assert report.momentum_norm is None


@pytest.mark.parametrize("type_", ["Lion", "Muon", "8-bit", "Sophia"])
def test_states_without_energy_say_so(type_: str) -> None:
    state = state_of(train(OPTIMIZERS["Adam"][0], gradients(3)), list(SHAPES), type_=type_)
    report = analyse(state, max_norm=0.5)
    assert report.recent_norm is None
    assert report.saturation is None
    assert report.unavailable
    assert type_ in report.unavailable


def test_an_optimizer_that_never_stepped_says_so() -> None:
    report = analyse(state_of(train(OPTIMIZERS["Adam"][0], []), list(SHAPES)))
    assert report.unavailable == "the optimizer has taken no step on it"
    assert [tensor.name for tensor in report.tensors] == list(SHAPES)


# --- saturation ------------------------------------------------------------------------------------------------------


def clipped_run(norms: Sequence[float], max_norm: float, factory: Factory) -> tuple[torch.optim.Optimizer, np.ndarray]:
    """Train on gradients of these norms, clipped by PyTorch; the norms that the optimizer saw come back."""
    random = np.random.default_rng(1)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES.values()]
    optimizer = factory(parameters)
    seen = []
    for norm in norms:
        step = [random.normal(size=shape) for shape in SHAPES.values()]
        scale = norm / math.sqrt(sum(float(np.sum(g**2)) for g in step))
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient * scale)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
        optimizer.step()
    return optimizer, np.array(seen)


@settings(max_examples=60, deadline=None)
@given(
    norms=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40),
    max_norm=st.floats(0.1, 10.0),
    rule=st.sampled_from([("Adam", 0.999), ("AdamW", 0.95), ("RMSprop", 0.99)]),
)
def test_both_bounds_hold_whatever_the_norms(norms: list[float], max_norm: float, rule: tuple[str, float]) -> None:
    name, decay = rule
    optimizer, seen = clipped_run(norms, max_norm, OPTIMIZERS[name][0])
    report = analyse(state_of(optimizer, list(SHAPES)), max_norm=max_norm)
    weights = exponential_weights(decay, len(norms))
    assert report.saturation == pytest.approx(float(weights @ seen**2) / max_norm**2, rel=1e-9)
    assert report.clipped_share_at_most is not None
    assert report.at_limit_share_at_least is not None
    clipped_share = float(weights @ (np.array(norms) > max_norm))
    assert clipped_share <= report.clipped_share_at_most + 1e-4
    for name_of_c, least in report.at_limit_share_at_least.items():
        at_limit = float(weights @ (seen >= float(name_of_c) * max_norm * (1 - 1e-4)))
        assert at_limit >= least - 1e-2


@given(shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), c=st.sampled_from([0.9, 0.99]))
def test_the_at_limit_bound_is_the_best_there_is(shares: list[float], c: float) -> None:
    """Norms of just below c and of exactly 1 reach the bound, so no better one exists."""
    at_limit = sum(shares) / len(shares)
    saturation = at_limit * 1.0 + (1.0 - at_limit) * c * c
    assert at_limit_share(saturation, c) == pytest.approx(at_limit, abs=1e-12)


def test_a_saturated_run_counts_as_all_clipped() -> None:
    optimizer, _ = clipped_run([3.0] * 30, 0.5, OPTIMIZERS["Adam"][0])
    report = analyse(state_of(optimizer, list(SHAPES), (ClipGroup("policy", tuple(SHAPES), 0.5),)))
    assert report.saturation == pytest.approx(1.0, abs=1e-5)
    assert report.clipped_share_at_most == 1.0
    assert report.at_limit_share_at_least == {"0.99": 1.0, "0.9": 1.0}
    assert report.groups[0].qualifications == ()
    assert report.max_norm == 0.5


def test_gradients_beyond_the_clip_are_said() -> None:
    optimizer, _ = clipped_run([3.0] * 30, 3.0, OPTIMIZERS["Adam"][0])
    report = analyse(state_of(optimizer, list(SHAPES), (ClipGroup("policy", tuple(SHAPES)),)), max_norm=0.5)
    assert report.saturation == pytest.approx(36.0, rel=1e-4)
    assert report.max_norm == 0.5
    assert any("unclipped" in said for said in report.qualifications)
    assert (report.clipped_share_at_most, report.at_limit_share_at_least) == (1.0, None)


@settings(max_examples=60, deadline=None)
@given(
    norms=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40),
    trained=st.floats(0.1, 10.0),
    asked=st.floats(0.1, 10.0),
)
def test_another_max_norm_than_the_files_keeps_only_what_holds(
    norms: list[float], trained: float, asked: float
) -> None:
    optimizer, _ = clipped_run(norms, trained, OPTIMIZERS["Adam"][0])
    report = analyse(state_of(optimizer, list(SHAPES), (ClipGroup("policy", tuple(SHAPES), trained),)), max_norm=asked)
    (group,) = report.groups
    assert group.clipped_share_at_most is not None
    weights = exponential_weights(0.999, len(norms))
    assert float(weights @ (np.array(norms) > asked)) <= group.clipped_share_at_most + 1e-4
    assert (group.max_norm, group.trained_max_norm) == (asked, None if asked == trained else trained)
    if asked != trained:
        assert group.at_limit_share_at_least is None
        assert not any("unclipped" in said for said in report.qualifications)


def test_each_clip_group_has_its_own_saturation() -> None:
    groups = (
        ClipGroup("actor", ("actor.weight", "actor.bias"), 0.5),
        ClipGroup("critic", ("critic.weight",), 2.0),
    )
    history = gradients(100)
    report = analyse(state_of(train(OPTIMIZERS["Adam"][0], history), list(SHAPES), groups))
    energies = exponential_weights(0.999, 100) @ np.array([[np.sum(g**2) for g in step] for step in history])
    actor, critic = report.groups
    assert actor.saturation == pytest.approx((energies[0] + energies[1]) / 0.25)
    assert critic.saturation == pytest.approx(energies[2] / 4.0)
    assert critic.share == pytest.approx(energies[2] / energies.sum())
    assert (report.saturation, report.max_norm) == (None, None)


@pytest.mark.parametrize("max_norm", [0.0, math.inf, None])
def test_no_clipping_means_no_saturation(max_norm: float | None) -> None:
    state = state_of(
        train(OPTIMIZERS["Adam"][0], gradients(5)), list(SHAPES), (ClipGroup("all", tuple(SHAPES), max_norm),)
    )
    report = analyse(state)
    assert (report.max_norm, report.saturation, report.clipped_share_at_most) == (None, None, None)
    assert report.recent_norm is not None


# --- where the premise fails -----------------------------------------------------------------------------------------


def qualified(factory: Factory, **changes: Any) -> OptimizerReport:
    return analyse(state_of(train(factory, gradients(30)), list(SHAPES), **changes), max_norm=0.5)


@pytest.mark.parametrize(
    ("factory", "is_qualified"),
    [
        (lambda p: torch.optim.Adam(p, weight_decay=0.01), True),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.01), True),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.01), True),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.01), False),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.01, decoupled_weight_decay=True), False),
        (lambda p: torch.optim.RAdam(p, weight_decay=0.01, decoupled_weight_decay=True), False),
        (lambda p: torch.optim.Adafactor(p, weight_decay=0.01), False),
    ],
)
def test_weight_decay_inside_the_gradient_is_qualified(factory: Factory, is_qualified: bool) -> None:
    report = qualified(factory)
    assert any("Weight decay 0.01" in said for said in report.groups[0].qualifications) is is_qualified
    assert report.saturation is not None


def test_unequal_step_counts_are_qualified() -> None:
    optimizer = train(OPTIMIZERS["Adam"][0], gradients(30))
    late = optimizer.param_groups[0]["params"][2]
    optimizer.state[late]["step"] -= 10
    report = analyse(state_of(optimizer, list(SHAPES)), max_norm=0.5)
    assert any("different numbers of steps (20 to 30)" in said for said in report.qualifications)
    assert report.steps == 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_optimizer_state_is_qualified(dtype: torch.dtype) -> None:
    optimizer = train(OPTIMIZERS["Adam"][0], gradients(30))
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to(dtype)
    report = analyse(state_of(optimizer, list(SHAPES)), max_norm=0.5)
    name = str(dtype).removeprefix("torch.")
    assert any(f"state is {name}" in said for said in report.qualifications)


def test_clip_groups_that_share_parameters_are_qualified() -> None:
    groups = (ClipGroup("actor", tuple(SHAPES)[:2], 1.0), ClipGroup("critic", tuple(SHAPES)[1:], 1.0))
    report = qualified(OPTIMIZERS["Adam"][0], groups=groups)
    assert all(any("share parameters" in said for said in group.qualifications) for group in report.groups)


def test_a_square_average_that_is_mostly_its_start_is_qualified() -> None:
    def single_precision(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        return RMSpropTFLike(parameters)

    tiny = [[(gradient * 1e-4).astype(np.float32) for gradient in step] for step in gradients(30)]
    early = analyse(state_of(train(single_precision, tiny), list(SHAPES)))
    assert early.recent_norm is None
    assert early.unavailable == "square_avg started at ones and still holds little else"
    later = analyse(state_of(train(single_precision, tiny * 28), list(SHAPES)))
    assert later.recent_norm is not None
    assert any("started at ones" in said for said in later.qualifications)


def test_nonfinite_state_is_not_averaged_away() -> None:
    optimizer = train(OPTIMIZERS["Adam"][0], gradients(30))
    optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg_sq"][0] = math.nan
    report = analyse(state_of(optimizer, list(SHAPES)), max_norm=0.5)
    assert (report.recent_norm, report.saturation) == (None, None)
    assert report.unavailable is not None
    assert "exp_avg_sq holds 1 NaN or infinite elements (actor.bias, 1 of 3 parameters)" in report.unavailable
    assert report.tensors[0].recent_norm is not None


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"betas": "0.9"},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9, math.nan)},
        {"betas": (0.9, None)},
    ],
)
def test_unusable_hyperparameters_leave_a_reason_not_a_traceback(hyper: dict[str, Any]) -> None:
    state = state_of(train(OPTIMIZERS["Adam"][0], gradients(3)), list(SHAPES))
    report = analyse(OptimizerState("optimizer", "Adam", (hyper,), state.parameters, ()), max_norm=0.5)
    assert report.recent_norm is None
    assert report.unavailable is not None
    assert "betas" in report.unavailable


def test_mixed_learning_rates_are_not_summed_up() -> None:
    state = state_of(train(OPTIMIZERS["Adam"][0], gradients(3)), list(SHAPES))
    groups = (dict(state.param_groups[0], lr=0.1), dict(state.param_groups[0], lr=0.2))
    assert analyse(OptimizerState("optimizer", "Adam", groups, state.parameters, ())).lr is None
    assert analyse(OptimizerState("optimizer", "Adam", groups[:1], state.parameters, ())).lr == 0.1
