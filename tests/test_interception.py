"""What the interception of clip calls and optimizer steps sees, in every way that training code spells them."""

from __future__ import annotations

import functools
import importlib
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from recorded import Recorded, norm, read_rows, record
from torch import nn
from torch.nn.utils import clip_grad_norm_ as bound_before
from torch.nn.utils import get_total_norm

from gradscope.recording import naming
from gradscope.recording.recorder import Recorder

STEPS = 12


@pytest.fixture(autouse=True)
def errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Training:
    """A plain loop that keeps an independent float64 norm of every gradient before ``clip`` sees it."""

    def __init__(self, model: nn.Module, clip: Any, optimizer: Any = None) -> None:
        self.model = model
        self.clip = clip
        self.optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-2)
        self.norms: list[float] = []
        self.returned: list[Any] = []

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(16, 4)).pow(2).sum()
        loss.backward()
        return loss

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.backward()
            self.norms.append(float64_norm(self.model.parameters()))
            self.returned.append(self.clip(self.model))
            self.optimizer.step()


def float64_norm(parameters: Any) -> float:
    squares = [p.grad.detach().to_dense().double().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def assert_recorded(recorded: Recorded, training: Training, max_norm: float | None = 0.5) -> None:
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [norm(row) for row in recorded.rows] == pytest.approx(training.norms, rel=1e-6)
    assert [row["max_norm"] for row in recorded.rows] == [max_norm] * STEPS
    assert all(row["stepped"] for row in recorded.rows)
    if max_norm is not None:
        assert [row["returned_norm"] for row in recorded.rows] == [float(x) for x in training.returned]
        assert [row["norm_type"] for row in recorded.rows] == [2.0] * STEPS
    assert not recorded.metadata["findings"]


def by_attribute(model: nn.Module) -> Any:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def by_alias(model: nn.Module) -> Any:
    import torch.nn.utils as u

    return u.clip_grad_norm_(list(model.parameters()), max_norm=0.5)


def by_name_bound_before(model: nn.Module) -> Any:
    return bound_before(model.parameters(), torch.tensor(0.5), norm_type="2")


def by_partial(model: nn.Module, clip: Any = functools.partial(bound_before, max_norm=0.5)) -> Any:  # noqa: B008
    return clip(p for p in model.parameters() if p.requires_grad)


def by_unpickled_name(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(bound_before))(tuple(model.parameters()), 0.5, foreach=False)


def in_two_calls(model: nn.Module) -> Any:
    parameters = list(model.parameters())
    total = get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, total)
    return total


@pytest.mark.parametrize(
    "clip", [by_attribute, by_alias, by_name_bound_before, by_partial, by_unpickled_name, in_two_calls]
)
def test_every_spelling_of_a_clip_call(tmp_path: Any, model: nn.Module, clip: Any) -> None:
    training = Training(model, clip)
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training)
    assert recorded.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [group["name"] for group in recorded.metadata["groups"]] == ["all"]


def test_torch_is_as_it_was_afterwards(tmp_path: Any, model: nn.Module) -> None:
    optimizer_module = importlib.import_module("torch.optim.optimizer")
    cell = bound_before.__closure__[0]
    implementation, step = cell.cell_contents, torch.amp.GradScaler.step
    record(tmp_path, Training(model, by_attribute))
    assert cell.cell_contents is implementation
    assert torch.amp.GradScaler.step is step
    assert not optimizer_module._global_optimizer_pre_hooks
    assert not optimizer_module._global_optimizer_post_hooks


def test_weights_are_bit_identical(tmp_path: Any) -> None:
    def train(recorded: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
        training = Training(model, by_attribute)
        record(tmp_path, training) if recorded else training()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_training_that_never_clips(tmp_path: Any, model: nn.Module) -> None:
    training = Training(model, lambda model: None)
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training, max_norm=None)
    assert recorded.metadata["groups"][0]["function"] is None
    assert recorded.metadata["groups"][0]["optimizer"] == "Adam"


def test_clip_by_value(tmp_path: Any, model: nn.Module) -> None:
    training = Training(model, lambda m: torch.nn.utils.clip_grad_value_(m.parameters(), 0.1))
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training, max_norm=None)
    assert {row["clip_value"] for row in recorded.rows} == {0.1}


def test_norm_then_value_is_one_row(tmp_path: Any, model: nn.Module) -> None:
    def clip(model: nn.Module) -> Any:
        total = by_attribute(model)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        return total

    training = Training(model, clip)
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training)
    assert {row["clip_value"] for row in recorded.rows} == {0.1}


def test_other_norm_types_keep_the_l2_norm_apart(tmp_path: Any, model: nn.Module) -> None:
    training = Training(model, lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5, norm_type=float("inf")))
    recorded = record(tmp_path, training)
    assert {row["norm_type"] for row in recorded.rows} == {float("inf")}
    assert [norm(row) for row in recorded.rows] == pytest.approx(training.norms, rel=1e-6)
    assert [row["returned_norm"] for row in recorded.rows] == [float(x) for x in training.returned]


def test_two_groups_on_one_line_are_two(tmp_path: Any, model: nn.Module) -> None:
    def clip(model: nn.Module) -> None:
        for part in (model[0], model[2]):
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)

    recorded = record(tmp_path, Training(model, clip))
    assert [group["name"] for group in recorded.metadata["groups"]] == ["0", "2"]
    assert [(row["step"], row["group"]) for row in recorded.rows] == [(s, g) for s in range(STEPS) for g in (0, 1)]
    assert not recorded.metadata["findings"]


def test_one_combined_norm_is_one_group(tmp_path: Any, model: nn.Module) -> None:
    def clip(model: nn.Module) -> Any:
        parts = [list(model[0].parameters()), list(model[2].parameters())]
        norms = [get_total_norm([p.grad for p in part]) for part in parts]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for part in parts:
            torch.nn.utils.clip_grads_with_norm_(part, 0.5, total)
        return total

    training = Training(model, clip)
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training)
    assert len(recorded.metadata["groups"]) == 1


def test_parameters_without_gradient_come_and_go(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms = []

    def train() -> None:
        for i in range(STEPS):
            optimizer.zero_grad()
            (model[i % 2](torch.randn(5, 3)).sum() + model[2](torch.ones(1, 3)).sum()).backward()
            norms.append(float64_norm(model.parameters()))
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
            optimizer.step()

    recorded = record(tmp_path, train)
    assert len(recorded.metadata["groups"]) == 1
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    assert not recorded.metadata["findings"]


def test_frozen_and_sparse_gradients(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms = []

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randint(50, (8,))).pow(2).sum().backward()
            norms.append(float64_norm(model.parameters()))
            optimizer.step()

    recorded = record(tmp_path, train)
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    weight = recorded.names.index("0.weight")
    assert all(row["zeros"][weight] >= 42 * 4 for row in recorded.rows)
    assert not recorded.metadata["findings"]


def test_gradient_accumulation_is_one_step_per_update(tmp_path: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms = []

    def train() -> None:
        for _ in range(STEPS):
            for _ in range(3):
                model(torch.randn(16, 4)).pow(2).sum().backward()
            norms.append(float64_norm(model.parameters()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    recorded = record(tmp_path, train)
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    assert not recorded.metadata["findings"]


def test_optimizers_of_one_iteration_share_a_step(tmp_path: Any) -> None:
    torch.manual_seed(0)
    actor, critic = nn.Linear(3, 1), nn.Linear(3, 1)
    temperature = nn.Parameter(torch.zeros(()))
    actor_optimizer = torch.optim.Adam(actor.parameters())
    critic_optimizer = torch.optim.Adam(critic.parameters())
    temperature_optimizer = torch.optim.Adam([temperature])

    def train() -> None:
        for i in range(STEPS):
            for optimizer in (actor_optimizer, critic_optimizer, temperature_optimizer):
                optimizer.zero_grad()
            x = torch.randn(5, 3)
            (actor(x).pow(2).sum() + critic(x).pow(2).sum() + temperature).backward()
            critic_optimizer.step()
            if i % 2:
                actor_optimizer.step()
            temperature_optimizer.step()

    recorded = record(tmp_path, train)
    assert sorted(recorded.names) == ["actor.bias", "actor.weight", "critic.bias", "critic.weight", "temperature"]
    steps = {name: [row["step"] for row in recorded.group_rows(name)] for name in ("actor", "critic", "temperature")}
    assert steps == {
        "actor": list(range(1, STEPS, 2)),
        "critic": list(range(STEPS)),
        "temperature": list(range(STEPS)),
    }


def test_one_clip_call_over_two_optimizers(tmp_path: Any, model: nn.Module) -> None:
    optimizers = [torch.optim.SGD(model[i].parameters(), 0.01) for i in (0, 2)]

    def train() -> None:
        for _ in range(STEPS):
            model.zero_grad()
            model(torch.randn(16, 4)).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()

    recorded = record(tmp_path, train)
    assert [(row["step"], row["group"]) for row in recorded.rows] == [(i, 0) for i in range(STEPS)]
    assert not recorded.metadata["findings"]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD])
@pytest.mark.parametrize("clips", [True, False])
def test_the_gradient_inside_a_closure(tmp_path: Any, model: nn.Module, kind: Any, clips: bool) -> None:
    optimizer = kind(model.parameters(), lr=0.01)
    norms: list[float] = []

    def train() -> None:
        for _ in range(STEPS):
            x, first = torch.randn(16, 4), []

            def closure(x: torch.Tensor = x, first: list[float] = first) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).pow(2).sum()
                loss.backward()
                first.append(float64_norm(model.parameters()))
                if clips:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                return loss

            optimizer.step(closure)
            norms.append(first[0])

    recorded = record(tmp_path, train)
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    assert {row["max_norm"] for row in recorded.rows} == {0.5 if clips else None}
    assert not recorded.metadata["findings"]


class ScaledTraining(Training):
    """Mixed precision on the CPU; ``unscales`` before it clips; at step 4 the loss overflows."""

    def __init__(self, model: nn.Module, clip: Any, fused: bool, unscales: bool) -> None:
        super().__init__(model, clip, torch.optim.Adam(model.parameters(), 1e-2, fused=fused))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.unscales = unscales

    def __call__(self) -> None:
        for i in range(STEPS):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 4)).pow(2).sum() * (float("inf") if i == 4 else 1.0)
            scale = self.scaler.get_scale() if self.scaler._scale is not None else 1024.0
            self.scaler.scale(loss).backward()
            self.norms.append(float64_norm(self.model.parameters()) / scale)
            if self.unscales:
                self.scaler.unscale_(self.optimizer)
            self.returned.append(self.clip(self.model))
            self.scaler.step(self.optimizer)
            self.scaler.update()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_scaled_gradients_are_recorded_unscaled(tmp_path: Any, model: nn.Module, fused: bool, clips: bool) -> None:
    training = ScaledTraining(model, by_attribute if clips else lambda model: None, fused, unscales=clips)
    recorded = record(tmp_path, training)
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [row["stepped"] for row in recorded.rows] == [i != 4 for i in range(STEPS)]
    finite = [i for i in range(STEPS) if i != 4]
    expected = [training.norms[i] for i in finite]
    assert [norm(recorded.rows[i]) for i in finite] == pytest.approx(expected, rel=1e-6)
    assert any(recorded.rows[4]["nan"]) or any(recorded.rows[4]["inf"])
    assert not recorded.metadata["findings"]


@pytest.mark.parametrize("fused", [False, True])
def test_clipping_scaled_gradients_is_a_finding(tmp_path: Any, model: nn.Module, fused: bool) -> None:
    training = ScaledTraining(model, by_attribute, fused, unscales=False)
    recorded = record(tmp_path, training)
    assert "scaled-clip" in recorded.rules
    assert "1024" in recorded.message("scaled-clip")
    finite = [i for i in range(STEPS) if i != 4]
    expected = [training.norms[i] for i in finite]
    assert [norm(recorded.rows[i]) for i in finite] == pytest.approx(expected, rel=1e-6)


def test_a_compiled_module_keeps_its_names(tmp_path: Any, model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    training = Training(compiled, by_attribute)
    recorded = record(tmp_path, training)
    assert_recorded(recorded, training)
    assert recorded.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_clip_inside_compiled_code_is_left_alone(tmp_path: Any, model: nn.Module) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def clip(grads: list[torch.Tensor]) -> torch.Tensor:
        total = get_total_norm(grads)
        return total

    parameters = list(model.parameters())

    @torch.compile(backend="eager", fullgraph=True)
    def clip_all() -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, 0.5, foreach=False)

    training = Training(model, lambda m: (clip([p.grad for p in m.parameters()]), clip_all()))
    recorded = record(tmp_path, training)
    assert [row["max_norm"] for row in recorded.rows] == [None] * STEPS
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [norm(row) for row in recorded.rows] == pytest.approx([min(n, 0.5) for n in training.norms], rel=1e-3)


def test_every_start_and_max_steps(tmp_path: Any, model: nn.Module) -> None:
    training = Training(model, by_attribute)
    recorded = record(tmp_path, training, every=2, start=3, max_steps=3)
    assert [row["step"] for row in recorded.rows] == [3, 5, 7]
    assert [norm(row) for row in recorded.rows] == pytest.approx([training.norms[i] for i in (3, 5, 7)], rel=1e-6)


def test_include_keeps_what_the_globs_name(tmp_path: Any, model: nn.Module) -> None:
    recorded = record(tmp_path, Training(model, by_attribute), include=["*.weight"])
    assert recorded.names == ["0.weight", "2.weight"]
    assert all(len(row["sum_squares"]) == 2 for row in recorded.rows)


def test_stopping_at_the_first_nonfinite_gradient(tmp_path: Any, model: nn.Module) -> None:
    training = Training(model, lambda m: m[0].weight.grad.fill_(float("nan")) if len(training.norms) == 5 else None)
    with pytest.raises(FloatingPointError, match=r"step 4: the gradient of 0\.weight"):
        record(tmp_path, training, stop_on="nonfinite")
    assert len(training.norms) == 5


def test_weight_and_update_norms_at_every_tenth_step(tmp_path: Any, model: nn.Module) -> None:
    before: list[list[torch.Tensor]] = []
    after: list[list[torch.Tensor]] = []

    def clip(model: nn.Module) -> Any:
        before.append([p.detach().double().clone() for p in model.parameters()])
        return by_attribute(model)

    training = Training(model, clip)
    training.optimizer.register_step_post_hook(
        lambda *_: after.append([p.detach().double().clone() for p in model.parameters()])
    )
    recorded = record(tmp_path, training)
    for i, row in enumerate(recorded.rows):
        if i % 10:
            assert row["weight_norm"] == [] and row["update_norm"] == []
            continue
        assert row["weight_norm"] == pytest.approx([float(p.norm()) for p in before[i]], rel=1e-9)
        changes = [float((b - a).norm()) for a, b in zip(before[i], after[i], strict=True)]
        assert row["update_norm"] == pytest.approx(changes, rel=1e-6)


def test_one_clip_over_two_optimizers_knows_the_updates_of_the_first_alone(tmp_path: Any, model: nn.Module) -> None:
    first = torch.optim.Adam(model[0].parameters(), 1e-2)
    second = torch.optim.Adam(model[2].parameters(), 1e-2)
    changes: list[list[float]] = []

    def train() -> None:
        for _ in range(STEPS):
            model.zero_grad()
            model(torch.randn(16, 4)).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = [p.detach().double().clone() for p in model[0].parameters()]
            first.step()
            changes.append([float((p.detach() - b).norm()) for p, b in zip(model[0].parameters(), before, strict=True)])
            second.step()

    for i, row in enumerate(record(tmp_path, train).rows):
        if i % 10 == 0:
            assert row["update_norm"] == pytest.approx([*changes[i], math.nan, math.nan], rel=1e-6, nan_ok=True)


def test_an_optimizer_that_is_not_torchs(tmp_path: Any, model: nn.Module) -> None:
    norms = []

    def train() -> None:
        for _ in range(STEPS):
            model.zero_grad()
            model(torch.randn(16, 4)).pow(2).sum().backward()
            norms.append(float64_norm(model.parameters()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)

    recorded = record(tmp_path, train)
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    assert [row["stepped"] for row in recorded.rows] == [None] * STEPS


def test_a_model_built_again_goes_on_under_its_names(tmp_path: Any) -> None:
    def train() -> None:
        for seed in range(2):
            torch.manual_seed(seed)
            Training(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), by_attribute)()

    recorded = record(tmp_path, train)
    assert recorded.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [row["step"] for row in recorded.rows] == list(range(2 * STEPS))


def test_every_short_training_has_steps_of_its_own(tmp_path: Any) -> None:
    def train() -> None:
        for _ in range(30):
            model = nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            model(torch.ones(3)).sum().backward()
            optimizer.step()

    recorded = record(tmp_path, train)
    assert [row["step"] for row in recorded.rows] == list(range(30))
    assert recorded.names == ["weight", "bias"]


def test_complex_gradients_are_left_out_by_name(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.real = nn.Parameter(torch.randn(3))
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model.real * model.phase).abs().sum().backward()
            norms.append(float(model.real.grad.double().norm()))
            optimizer.step()

    recorded = record(tmp_path, train)
    assert [norm(row) for row in recorded.rows] == pytest.approx(norms, rel=1e-6)
    assert recorded.metadata["notes"] == [
        "The gradient of phase is left out: it is complex64, and complex numbers are not measured."
    ]


def test_clipping_parameter_by_parameter_names_them_at_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    alive = naming._alive
    monkeypatch.setattr(naming, "_alive", lambda: looked.append(0) or alive())
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))
    training = Training(model, lambda m: [torch.nn.utils.clip_grad_norm_(p, 0.5) for p in m.parameters()])
    recorded = record(tmp_path, training)
    assert len(looked) == 1
    assert recorded.names == [name for name, _ in model.named_parameters()]
    assert len(recorded.rows) == 80 * STEPS
    joint = [sum(norm(row) ** 2 for row in recorded.rows if row["step"] == step) ** 0.5 for step in range(STEPS)]
    assert joint == pytest.approx(training.norms, rel=1e-6)


class Lookahead(torch.optim.Optimizer):
    """As in the wild: an optimizer around another."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_around_another(tmp_path: Any, model: nn.Module, with_closure: bool) -> None:
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.01))
    training = Training(model, None, optimizer)

    def train() -> None:
        for _ in range(STEPS):
            if not with_closure:
                training.backward()
                training.norms.append(float64_norm(model.parameters()))
            optimizer.step(closure if with_closure else None)

    def closure() -> torch.Tensor:
        loss = training.backward()
        training.norms.append(float64_norm(model.parameters()))
        return loss

    recorded = record(tmp_path, train)
    assert [row["step"] for row in recorded.rows] == list(range(STEPS))
    assert [norm(row) for row in recorded.rows] == pytest.approx(training.norms, rel=1e-6)


def test_trainings_in_threads_lose_no_row(tmp_path: Any) -> None:
    trainings = [Training(nn.Linear(4, 2), by_attribute) for _ in range(3)]

    def train() -> None:
        threads = [threading.Thread(target=training) for training in trainings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    recorded = record(tmp_path, train)
    expected = sorted(x for training in trainings for x in training.norms)
    assert sorted(norm(row) for row in recorded.rows) == pytest.approx(expected, rel=1e-6)


def test_steps_that_cannot_be_seen(tmp_path: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    training = Training(model, by_attribute, optimizer)
    recorded = record(tmp_path, training)
    assert [norm(row) for row in recorded.rows] == pytest.approx(training.norms, rel=1e-6)
    assert {row["max_norm"] for row in recorded.rows} == {0.5}


def test_trainings_one_after_the_other_share_no_step(tmp_path: Any) -> None:
    trainings = [Training(nn.Linear(4, 2), by_attribute) for _ in range(3)]
    recorded = record(tmp_path, lambda: [training() for training in trainings])
    assert [row["step"] for row in recorded.rows] == list(range(3 * STEPS))


def test_two_passes_of_one_step_are_two_groups(tmp_path: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms: list[list[float]] = [[], []]
    # fmt: off
    passes = [lambda: bound_before(model.parameters(), 0.5), lambda: bound_before(model.parameters(), 0.5)]
    # fmt: on

    def train() -> None:
        for _ in range(STEPS):
            for i in (0, 1):
                model.zero_grad()
                (model(torch.randn(16, 4)).pow(2).sum() * (i + 1)).backward()
                norms[i].append(float64_norm(model.parameters()))
                passes[i]()
            optimizer.step()

    recorded = record(tmp_path, train)
    names = [group["name"] for group in recorded.metadata["groups"]]
    assert len(set(names)) == 2
    assert [[norm(row) for row in recorded.group_rows(name)] for name in names] == [
        pytest.approx(norms[0], rel=1e-6),
        pytest.approx(norms[1], rel=1e-6),
    ]


def test_recorders_may_end_in_any_order(tmp_path: Any, model: nn.Module) -> None:
    cell = bound_before.__closure__[0]
    implementation, scaler_step = cell.cell_contents, torch.amp.GradScaler.step
    first, second = (Recorder(tmp_path / f"{name}.gradscope", quiet=True) for name in ("first", "second"))
    training = Training(model, by_attribute)
    first.start()
    second.start()
    training()
    first.stop()
    training()
    second.stop()
    assert cell.cell_contents is implementation
    assert torch.amp.GradScaler.step is scaler_step
    assert [norm(row) for row in read_rows(first.path)] == pytest.approx(training.norms[:STEPS], rel=1e-6)
    rows = read_rows(second.path)
    assert [norm(row) for row in rows] == pytest.approx(training.norms, rel=1e-6)
    assert {row["max_norm"] for row in rows} == {0.5}


def test_what_is_clipped_in_compiled_code_is_said_to_be(tmp_path: Any, model: nn.Module) -> None:
    parameters = list(model.parameters())

    @torch.compile(backend="eager", fullgraph=True)
    def clip() -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, 0.25, foreach=False)

    recorded = record(tmp_path, Training(model, lambda _: clip()))
    assert "torch.compile compiled parts of this run" in recorded.metadata["notes"][0]
