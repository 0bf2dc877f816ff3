"""Which series of a log is taken for the gradient norm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.errors import GradscopeError
from gradscope.sources import open_source
from gradscope.sources.norm_logs.tags import is_gradient_norm


@pytest.mark.parametrize(
    "name",
    [
        *(
            "grad_norm",
            "train/grad_norm",
            "grad-norm",
            "grad_norm/total",
            "gradient_norm",
            "gradients/norm",
            "norm/grad",
        ),
        *("total_norm", "global_norm", "gradient/global_norm", "gnorm", "train/gnorm", "gradNorm", "GradNorm"),
        *("grad_2.0_norm_total", "grad_2.0_norm/fc.weight", "gradients/layer.weight_norm", "grad norm (l2)"),
        *("actor/grad_norm", "learner/default_policy/gradients_default_optimizer_global_norm", "grad_norm_before_clip"),
        *("optim/total_grad_norm", "my run - train/grad_norm", "grads/encoder.norm.weight/norm", "gradnorm"),
    ],
)
def test_names_of_gradient_norms(name: str) -> None:
    assert is_gradient_norm(name)


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "norm", "grad", "weight_norm", "param_norm", "params/global_norm", "max_grad_norm", "clip_grad_norm"),
        *("grad_norm_clipped", "grad_norm/after_clip", "grad_inf_norm_total", "grad_1.0_norm_total", "normal_grade"),
        *("grad_norm_std", "run - grad_norm__MIN", "run - grad_norm__MAX", "update_norm", "obs_norm", "log_grad_norm"),
        *("grad_norm test - loss", "layernorm.weight", "total_normalized_reward", "gradual/norm", "lr"),
    ],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_gradient_norm(name)


def log_with(path: Path, *names: str) -> Path:
    """A log whose series hold 1, 2, 3 and so on."""
    rows = [{"step": step, **{name: float(i + 1) for i, name in enumerate(names)}} for step in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("loss", "grad_norm"), "grad_norm"),
        (("grad_2.0_norm/a.weight", "grad_2.0_norm/b.weight", "grad_2.0_norm_total"), "grad_2.0_norm_total"),
        (("grad-norm vs samples", "grad-norm"), "grad-norm"),
        (("grad_norm/global", "grad_norm/encoder"), "grad_norm/global"),
        (("max_grad_norm", "grad_norm", "weight_norm"), "grad_norm"),
        (("actor/grad_norm", "grad_norm_clipped"), "actor/grad_norm"),
    ],
)
def test_the_one_that_is_taken(tmp_path: Path, names: tuple[str, ...], taken: str) -> None:
    assert [info.name for info in open_source(log_with(tmp_path / "log", *names)).tensors] == [taken]


def test_no_telling_which(tmp_path: Path) -> None:
    path = log_with(tmp_path / "log", "actor/grad_norm", "critic/grad_norm", "loss")
    with pytest.raises(GradscopeError, match="2 series of gradient norms: actor/grad_norm, critic/grad_norm") as caught:
        open_source(path)
    assert caught.value.hint == (
        "pick one by --tag actor/grad_norm; '*/grad_norm' takes them all, as parts of one gradient"
    )
    source = open_source(path, tag="*/grad_norm")
    assert [info.name for info in source.tensors] == ["actor/grad_norm", "critic/grad_norm"]
    result = gradscope.simulate(source, ["norm:2.2"])
    assert result.norm.p50 == pytest.approx(np.sqrt(5))
    assert result.results[0].clip_rate == 1.0
    apart = gradscope.simulate(source, ["norm:2.2"], groups={"actor": "actor/*", "critic": "critic/*"})
    assert apart.results[0].clip_rate == 0.0


def test_runs_are_no_parts_of_one_gradient(tmp_path: Path) -> None:
    path = log_with(tmp_path / "log", "run-a - train/grad_norm", "run-b - train/grad_norm")
    with pytest.raises(GradscopeError) as caught:
        open_source(path)
    assert caught.value.hint == "pick one by --tag 'run-a - train/grad_norm'"
    with pytest.raises(GradscopeError, match="2 series"):
        open_source(path, tag="train/grad_norm")


def test_any_series_by_its_name(tmp_path: Path) -> None:
    source = open_source(log_with(tmp_path / "log", "grad_norm", "odd[name]", "odd2"), tag="odd[name]")
    assert [info.name for info in source.tensors] == ["odd[name]"]
    assert gradscope.inspect(tmp_path / "log", tag="odd2").source.format == "JSON Lines log of odd2"


def test_an_unknown_series(tmp_path: Path) -> None:
    path = log_with(tmp_path / "log", "train/grad_norm", "loss")
    with pytest.raises(GradscopeError, match="its series are train/grad_norm, loss") as caught:
        open_source(path, tag="train/gradnorm")
    assert caught.value.hint == "did you mean train/grad_norm?"
    with pytest.raises(GradscopeError, match="no such series"):
        open_source(path, tag="eval/*")


def test_no_series_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="its series are loss, lr") as caught:
        open_source(log_with(tmp_path / "log", "loss", "lr"))
    assert "--tag NAME" in str(caught.value.hint) and "gradscope record" in str(caught.value.hint)


def test_series_of_different_steps(tmp_path: Path) -> None:
    rows = [{"step": s, "g/a.norm": 1.0 + s, **({"g/b.norm": 2.0 + s} if s % 2 else {})} for s in range(6)]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path / "log", tag="g/*")
    steps = list(source.read_steps(range(3)))
    assert [step.index for step in steps] == [1, 3, 5]
    assert [np.sqrt(step.sum_squares).tolist() for step in steps] == [[2, 3], [4, 5], [6, 7]]
    assert any("3 of 6 steps lack some series" in note for note in source.notes)


@pytest.mark.parametrize("given", ["dump", "memory", "missing"])
def test_a_tag_goes_with_a_log(tmp_path: Path, given: str) -> None:
    np.save(tmp_path / "dump.npy", np.ones(3))
    source = {"dump": tmp_path / "dump.npy", "memory": {"w": np.ones(2)}, "missing": tmp_path / "none"}[given]
    with pytest.raises(GradscopeError, match="no such file" if given == "missing" else "goes with a log of norms"):
        open_source(source, tag="grad_norm")


@pytest.mark.parametrize("as_", ["gradients", "weights"])
def test_a_log_is_no_mapping_of_tensors(tmp_path: Path, as_: str) -> None:
    with pytest.raises(GradscopeError, match="is a log of norms"):
        open_source(log_with(tmp_path / "log", "grad_norm"), as_=as_)
    with pytest.raises(GradscopeError, match="goes with gradient dumps"):
        open_source(log_with(tmp_path / "log", "grad_norm"), weights={"w": np.ones(2)})
