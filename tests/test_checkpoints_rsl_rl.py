"""rsl_rl checkpoints of real trainings in both layouts, and the max_norm of their params/agent.yaml."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from real_training import PolicyOfRslRl3, rsl_rl_3_run, rsl_rl_run

from gradscope.errors import GradscopeError
from gradscope.forensics import analyse
from gradscope.results import OptimizerReport
from gradscope.sources import open_source
from gradscope.sources.checkpoints.rsl_rl import max_grad_norm_in


def first_report(path: Path, max_norm: float | None = None) -> OptimizerReport:
    return analyse(open_source(str(path)).optimizers()[0], max_norm)


def energies(state: dict[str, Any]) -> list[float]:
    """r² of every parameter of an Adam, in float64."""
    beta2 = state["param_groups"][0]["betas"][1]
    return [
        float(entry["exp_avg_sq"].double().sum()) / (1 - beta2 ** float(entry["step"]))
        for entry in state["state"].values()
    ]


def test_since_4_actor_and_critic_are_clipped_apart() -> None:
    run = rsl_rl_run()
    source = open_source(str(run / "model_11.pt"))
    assert (source.info.format, source.notes) == ("rsl_rl PPO", ())
    stored = torch.load(run / "model_11.pt", weights_only=True)
    squares = energies(stored["optimizer_state_dict"])
    actors = sum(name.split(".")[0] != "obs_normalizer" for name in stored["actor_state_dict"])
    report = first_report(run / "model_11.pt")
    actor, critic = report.groups
    assert (actor.name, actor.max_norm, critic.name, critic.max_norm) == ("actor", 1.0, "critic", 1.0)
    assert actor.saturation == pytest.approx(sum(squares[:actors]), rel=1e-9)
    assert critic.saturation == pytest.approx(sum(squares[actors:]), rel=1e-9)
    assert report.recent_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)
    assert report.saturation is None
    assert report.qualifications == ()
    assert [t.recent_norm for t in report.tensors] == pytest.approx([math.sqrt(e) for e in squares], rel=1e-9)


def test_names_are_those_of_the_two_networks() -> None:
    run = rsl_rl_run()
    stored = torch.load(run / "model_11.pt", weights_only=True)
    expected = [
        f"{part}.{name}"
        for part in ("actor", "critic")
        for name in stored[f"{part}_state_dict"]
        if "normalizer" not in name
    ]
    source = open_source(str(run / "model_11.pt"))
    (state,) = source.optimizers()
    assert [parameter.name for parameter in state.parameters] == expected
    weights = source.weights()
    assert weights is not None
    assert [tensor.name for tensor in weights.tensors] == expected
    assert any(said.startswith("actor.obs_normalizer._mean") for said in source.skipped)


def test_a_saturated_clip_shows_in_one_network() -> None:
    report = first_report(rsl_rl_run(0.05, curious=True))
    assert report.groups[0].saturation == pytest.approx(1.0, abs=1e-4)
    assert report.groups[0].clipped_share_at_most == 1.0
    assert report.max_norm == 0.05


def test_up_to_3_one_clip_covers_the_policy() -> None:
    run = rsl_rl_3_run()
    report = first_report(run / "model_60.pt")
    (group,) = report.groups
    assert (group.name, group.max_norm) == ("policy", 1.0)
    stored = torch.load(run / "model_60.pt", weights_only=True)
    squares = energies(stored["optimizer_state_dict"])
    assert report.saturation == pytest.approx(sum(squares), rel=1e-9)
    assert report.saturation == pytest.approx(1.0, abs=1e-4)
    assert [tensor.name for tensor in report.tensors] == [name for name, _ in PolicyOfRslRl3().named_parameters()]


def test_a_run_directory_gives_its_newest_checkpoint() -> None:
    source = open_source(str(rsl_rl_run()))
    assert source.info.path.endswith("model_11.pt")
    found = len(list(rsl_rl_run().glob("model_*.pt")))
    assert source.info.picked == f"model_11.pt, newest of {found} in {rsl_rl_run()}"


def test_random_network_distillation_steps_without_a_clip() -> None:
    source = open_source(str(rsl_rl_run(0.05, curious=True) / "model_11.pt"))
    policy, rnd = source.optimizers()
    assert (policy.name, rnd.name) == ("optimizer", "rnd_optimizer")
    assert all(parameter.name.startswith("rnd.predictor.") for parameter in rnd.parameters)
    report = analyse(rnd)
    assert report.recent_norm is not None
    assert (report.max_norm, report.saturation) == (None, None)


def test_a_shared_encoder_qualifies_both_groups() -> None:
    report = first_report(rsl_rl_run(image=True))
    for group in report.groups:
        assert any("actor and critic share parameters" in said for said in group.qualifications)
        # PyTorch's Adam updates a parameter twice a step when it is listed twice.
        assert any("different numbers of steps" in said for said in group.qualifications)
    names = [tensor.name for tensor in report.tensors]
    assert len(names) == len(set(names))
    assert not any(name.startswith("param[") for name in names)


def test_without_agent_yaml_max_norm_is_unknown_and_can_be_given(tmp_path: Path) -> None:
    alone = tmp_path / "model_11.pt"
    shutil.copy(rsl_rl_run() / "model_11.pt", alone)
    source = open_source(str(alone))
    assert any("params/agent.yaml" in note for note in source.notes)
    assert all(group.saturation is None for group in first_report(alone).groups)
    given = first_report(alone, max_norm=1.0)
    assert given.groups == first_report(rsl_rl_run() / "model_11.pt").groups


# --- params/agent.yaml -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("algorithm:\n  max_grad_norm: 0.5\n", 0.5),
        ("algorithm: {max_grad_norm: 1e-1}", 0.1),
        ("algorithm:\n  max_grad_norm: null\n", None),
        ("algorithm:\n  max_grad_norm: .inf\n", math.inf),
        ("algorithm:\n  max_grad_norm: -1\n", -1.0),
        ("algorithm:\n  max_grad_norm: [1.0]\n", "no number"),
        ("algorithm:\n  max_grad_norm: half\n", "half"),
        ("algorithm: PPO\n", None),
        ("max_grad_norm: 1.0\n", None),
        ("- 1\n", None),
        ("", None),
        ("algorithm: !!python/object:some.Class\n  max_grad_norm: 2.0\n", 2.0),
        ("x: !!python/object/apply:os.system ['exit 1']\nalgorithm:\n  max_grad_norm: 3.0\n", 3.0),
    ],
)
def test_max_grad_norm_is_read_without_constructing_anything(tmp_path: Path, text: str, expected: object) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    assert max_grad_norm_in(path) == expected


@pytest.mark.parametrize(
    "content", [b"a: [1, 2", b"\x00\x01", b"a: b: c", b"[" * 5000, b"\xff\xfe\xfa", b"x" * (2 << 20)]
)
def test_a_damaged_agent_yaml_is_an_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.yaml"
    path.write_bytes(content)
    with pytest.raises(GradscopeError) as raised:
        max_grad_norm_in(path)
    assert "\n" not in str(raised.value)


def test_a_damaged_agent_yaml_leaves_a_note(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rsl_rl_run(), run)
    (run / "params" / "agent.yaml").write_text("a: [1")
    source = open_source(str(run / "model_11.pt"))
    assert any("agent.yaml" in note for note in source.notes)
    assert source.optimizers()[0].clip_groups[0].max_norm is None


# --- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("since_4", [True, False])
def test_distillation_trains_the_student_only(tmp_path: Path, since_4: bool) -> None:
    student, teacher = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(student.parameters())
    student(torch.ones(3, 4)).sum().backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
    optimizer.step()
    networks = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    stored: dict[str, Any] = {f"{part}_state_dict": state for part, state in networks.items()}
    if not since_4:
        both = {f"{part}.{name}": tensor for part, state in networks.items() for name, tensor in state.items()}
        stored = {"model_state_dict": both}
    path = tmp_path / "model_1.pt"
    torch.save({**stored, "optimizer_state_dict": optimizer.state_dict(), "iter": 1, "infos": {}}, path)
    assert open_source(str(path)).info.format == "rsl_rl Distillation"
    report = first_report(path, max_norm=0.5)
    assert [tensor.name for tensor in report.tensors] == ["student.weight", "student.bias"]
    assert [group.name for group in report.groups] == ["student"]
    assert report.saturation == pytest.approx(1.0, abs=1e-4)
