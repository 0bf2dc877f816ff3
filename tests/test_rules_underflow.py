"""``underflow``: float16 with and without loss scaling, for real, and against a count of the elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import SAMPLES, judged
from recorded import record
from torch import nn

from gradscope.health.rules.underflow import SMALLEST, lost_elements
from gradscope.spectrum import MagnitudeSpectrum
from tests.in_memory_source import InMemorySource, NormSource

# Makes the gradients of these small networks as small as those of large ones.
SMALL = 1e-4


@pytest.fixture(autouse=True)
def errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def trained(directory: Path, kind: str, steps: int = 21) -> Path:
    """``kind``: "half" (the model is float16), "autocast" (without loss scaling), "scaled" (with), "float32"."""
    model = network().half() if kind == "half" else network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=kind == "scaled")

    def train() -> None:
        for _ in range(steps):
            x = torch.randn(64, 32).to(next(model.parameters()).dtype)
            target = x[:, :4].float().argmax(1)
            with torch.autocast("cpu", dtype=torch.float16, enabled=kind in ("autocast", "scaled")):
                out = model(x)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(out.float(), target) * SMALL).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    return record(directory, train).path


@pytest.mark.parametrize("kind", ["half", "autocast"])
def test_float16_without_loss_scaling_fails(tmp_path: Path, kind: str) -> None:
    verdict = judged("underflow", trained(tmp_path, kind))
    assert {found.where for found in verdict.violations} >= {"2"}
    worst = verdict.violations[0]
    assert worst.value == max(found.value or 0.0 for found in verdict.violations)
    assert worst.steps == (0, 20)
    assert "rounded to zero in float16" in worst.message
    assert "GradScaler" in worst.message


@pytest.mark.parametrize("kind", ["scaled", "float32"])
def test_loss_scaling_and_float32_pass(tmp_path: Path, kind: str) -> None:
    verdict = judged("underflow", trained(tmp_path, kind))
    assert verdict.status == "pass"
    assert verdict.value == 0.0
    assert "float16 without loss scaling would round" in verdict.message


def small_normal(shape: tuple[int, ...], size: float, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0.0, size, shape)


@pytest.mark.parametrize("size", [1e-8, 6e-8, 2.4e-7, 1e-6])
@pytest.mark.parametrize("wide", [False, True])
def test_what_is_lost_is_at_least_what_is_told(size: float, wide: bool) -> None:
    true = small_normal((200, 300), size)
    rounded = true.astype(np.float16)
    lost = int(((rounded == 0) & (true != 0)).sum())
    stored = rounded.astype(np.float32) if wide else rounded
    told, standing = lost_elements(MagnitudeSpectrum.of(stored), SMALLEST["float16"])
    assert standing == int((np.abs(rounded) == 2.0**-24).sum())
    assert 0 < told <= lost
    if size >= 2.4e-7:
        assert told > 0.8 * lost
    dumps = InMemorySource([{"a.weight": stored}, {"a.weight": stored}])
    verdict = judged("underflow", dumps)
    assert verdict.violations
    assert (verdict.violations[0].value or 0.0) <= lost / true.size


def test_zeros_alone_are_no_underflow() -> None:
    dead = small_normal((100, 100), 1e-3).astype(np.float16)
    dead[:90] = 0
    for array in (dead, dead.astype(np.float32)):
        verdict = judged("underflow", InMemorySource([{"embedding.weight": array}]))
        assert verdict.status == "pass"
        assert verdict.value == pytest.approx(0.0, abs=1e-3)


def test_no_more_is_lost_than_there_are_zeros() -> None:
    array = np.full((40, 40), 2.0**-24, np.float16)
    array[0, :5] = 0
    assert lost_elements(MagnitudeSpectrum.of(array), 2.0**-24) == (5.0, 1595)


def test_a_tiny_float32_gradient_shows_no_format() -> None:
    array = small_normal((100, 100), 6e-8).astype(np.float32)
    array[:50] = 0
    assert lost_elements(MagnitudeSpectrum.of(array), 2.0**-24) == (0.0, 0)


def test_a_few_elements_are_not_enough() -> None:
    array = np.array([2.0**-24, 0.0, 0.0, 2.0**-24, 1e-3, 1e-2], np.float16)
    assert judged("underflow", InMemorySource([{"a.bias": array}])).status == "pass"


@pytest.mark.parametrize(("format_", "least"), [("float16", 2.0**-25), ("bfloat16", 2.0**-134)])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_format_can_be_asked_about(format_: str, least: float, scale: float) -> None:
    array = small_normal((200, 100), 1e-7)
    living = np.abs(array).ravel()
    source = InMemorySource([{"a.weight": array}])
    found = judged("underflow", source, format=format_, loss_scale=scale)
    assert found.value == pytest.approx(float((living * scale < least).mean()), abs=0.005)


@pytest.mark.parametrize(
    ("format_", "dtype"), [("float8_e4m3fn", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)]
)
def test_float8_loses_what_torch_rounds_to_zero(format_: str, dtype: torch.dtype) -> None:
    array = small_normal((200, 100), 2e-3).astype(np.float32)
    expected = float((torch.from_numpy(array).to(dtype).float() == 0).double().mean())
    found = judged("underflow", InMemorySource([{"a.weight": array}]), format=format_)
    assert found.value == pytest.approx(expected, abs=0.01)


def test_sources_without_magnitudes_cannot_tell() -> None:
    assert judged("underflow", NormSource(np.ones((5, 2)))).status == "skipped"
    assert judged("underflow", SAMPLES / "ppo_cartpole.zip").status == "skipped"
    assert judged("underflow", SAMPLES / "ppo_cartpole.gradscope").status == "pass"
    assert judged("underflow", InMemorySource([{"a.weight": np.zeros((3, 3))}])).status == "skipped"
