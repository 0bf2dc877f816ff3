"""The same tensors clipped by PyTorch and by optax, in float64, and by ``simulate``."""

from __future__ import annotations

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_source import Arrays, InMemorySource, angle_deg, flatten
from numpy.typing import NDArray

from gradscope import results
from gradscope.simulation import simulate

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
# A fixed list, because optax compiles for every shape it meets.
SHAPES = [(), (1,), (9,), (4, 7), (5, 1), (1, 6), (2, 3, 4), (3, 2, 2, 3)]


@st.composite
def networks(draw: st.DrawFn) -> Arrays:
    """Random tensors of one dtype, heavy-tailed, of any size that the dtype holds, with exact zeros among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    arrays = {}
    for i, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))):
        values = rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * 10.0 ** rng.uniform(-3, 2)
        values = np.where(rng.random(shape) < 0.1, 0.0, values)
        arrays[f"layer{i // 2}.p{i}"] = np.asarray(np.clip(values, -6e4, 6e4)).astype(dtype)
    return arrays


def magnitude(arrays: Arrays, share: float) -> float:
    """A threshold within the range of the elements: often an element itself, so that ties occur."""
    magnitudes = np.sort(np.abs(flatten(list(arrays.values()))))
    return max(float(magnitudes[int(share * (len(magnitudes) - 1))]), 1e-6)


def torch_clipped(arrays: Arrays, clip: Callable[[list[torch.nn.Parameter]], object]) -> NDArray[np.float64]:
    parameters = []
    for array in arrays.values():
        parameter = torch.nn.Parameter(torch.zeros(array.shape, dtype=torch.float64))
        parameter.grad = torch.from_numpy(array.astype(np.float64).copy())
        parameters.append(parameter)
    clip(parameters)
    return flatten([parameter.grad.numpy() for parameter in parameters if parameter.grad is not None])


def optax_clipped(
    arrays: Arrays, transformation: optax.GradientTransformation, weights: Arrays | None = None
) -> NDArray[np.float64]:
    """Axes are reversed on the way in and out: PyTorch keeps the output units first, optax last."""
    with jax.enable_x64(True):
        updates = [jax.numpy.asarray(array.astype(np.float64).T) for array in arrays.values()]
        params = [jax.numpy.asarray(array.astype(np.float64).T) for array in (weights or arrays).values()]
        clipped, _ = transformation.update(updates, transformation.init(params), params)
        return flatten([np.asarray(array).T for array in clipped])


def agrees(result: results.PolicyResult, arrays: Arrays, clipped: NDArray[np.float64], within: float = 1e-6) -> None:
    gradient = flatten(list(arrays.values()))
    energy = float(gradient @ gradient)
    if energy == 0.0:
        assert (result.scale.max, result.norm_ratio.max) == (1.0, 1.0)
        return
    assert result.norm_ratio.max == pytest.approx(np.linalg.norm(clipped) / np.sqrt(energy), rel=within)
    assert result.scale.max == pytest.approx(float(gradient @ clipped) / energy, rel=within)
    assert result.direction_change_deg is not None
    error = result.direction_change_error_deg
    assert abs(result.direction_change_deg.max - angle_deg(gradient, clipped)) <= error + 1e-9
    assert error <= 0.1


@settings(max_examples=80, deadline=None)
@given(networks(), st.floats(0.01, 2.0))
def test_norms_and_global_clipping(arrays: Arrays, share: float) -> None:
    gradient = flatten(list(arrays.values()))
    norm = float(np.linalg.norm(gradient))
    max_norm = max(share * norm, 1e-6)
    source = InMemorySource([arrays])
    exact = simulate(source, [f"norm:{max_norm!r}", f"joint-norm:{max_norm!r}"])
    assert exact.norm.max == pytest.approx(norm, rel=1e-12)
    for result in exact.results:
        agrees(result, arrays, optax_clipped(arrays, optax.clip_by_global_norm(max_norm)))
    torch_way = simulate(source, [f"norm:{max_norm!r}"], convention="torch")
    clipped = torch_clipped(arrays, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    agrees(torch_way.results[0], arrays, clipped)


@settings(max_examples=60, deadline=None)
@given(networks(), st.floats(0.01, 2.0))
def test_a_norm_for_each_group(arrays: Arrays, share: float) -> None:
    names = list(arrays)
    halves = {"actor": names[::2], "critic": names[1::2]}
    groups = {name: members for name, members in halves.items() if members}
    max_norm = max(share * float(np.linalg.norm(flatten(list(arrays.values())))), 1e-6)
    result = simulate(InMemorySource([arrays], groups=groups), [f"norm:{max_norm!r}"], convention="torch").results[0]

    def clip(parameters: list[torch.nn.Parameter]) -> None:
        for members in (parameters[::2], parameters[1::2]):
            torch.nn.utils.clip_grad_norm_(members, max_norm)

    agrees(result, arrays, torch_clipped(arrays, clip))


@settings(max_examples=120, deadline=None)
@given(networks(), st.floats(0.0, 1.0))
def test_clipping_by_value(arrays: Arrays, share: float) -> None:
    clip_value = magnitude(arrays, share)
    result = simulate(InMemorySource([arrays]), [f"value:{clip_value!r}"]).results[0]
    clipped = torch_clipped(arrays, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, clip_value))
    np.testing.assert_array_equal(clipped, optax_clipped(arrays, optax.clip(clip_value)))
    exact = next(iter(arrays.values())).dtype.itemsize <= 2
    # The bin that holds clip_value is 0.8 % wide; of a 16-bit type every value is known.
    agrees(result, arrays, clipped, within=1e-6 if exact else 4e-3)
    gradient = flatten(list(arrays.values()))
    assert result.clip_rate == float((np.abs(gradient) > clip_value).any())
    if exact:
        assert result.clipped_elements == (np.abs(gradient) > clip_value).sum()
        assert result.direction_change_error_deg <= 1e-5


@settings(max_examples=60, deadline=None)
@given(networks(), st.floats(0.01, 3.0))
def test_block_rms(arrays: Arrays, share: float) -> None:
    rms = max(share * float(np.sqrt(np.mean(flatten(list(arrays.values())) ** 2))), 1e-6)
    result = simulate(InMemorySource([arrays]), [f"block-rms:{rms!r}"]).results[0]
    agrees(result, arrays, optax_clipped(arrays, optax.clip_by_block_rms(rms)))


@settings(max_examples=80, deadline=None)
@given(networks(), st.floats(0.001, 3.0), st.sampled_from([0.0, 1e-3, 0.1]), st.integers(0, 2**32 - 1))
def test_adaptive_gradient_clipping(arrays: Arrays, clipping: float, eps: float, seed: int) -> None:
    # optax reads three dimensions as a multi-head projection, whose heads are units of their own.
    arrays = {name: array for name, array in arrays.items() if array.ndim != 3} or {"w": np.ones((2, 3))}
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=array.shape) * 10.0 ** rng.uniform(-3, 1) for name, array in arrays.items()}
    result = simulate(InMemorySource([arrays], weights=weights), [f"agc:{clipping!r},{eps!r}"]).results[0]
    agrees(result, arrays, optax_clipped(arrays, optax.adaptive_grad_clip(clipping, eps), weights))


def test_adaptive_gradient_clipping_of_three_dimensions_is_optax_with_its_axes_named() -> None:
    rng = np.random.default_rng(0)
    arrays = {"conv.weight": rng.normal(size=(4, 3, 5))}
    weights = {"conv.weight": rng.normal(size=(4, 3, 5)) * np.array([1.0, 0.01, 3.0, 0.1])[:, None, None]}
    result = simulate(InMemorySource([arrays], weights=weights), ["agc:0.5"]).results[0]
    assert 0.0 < result.scale.max < 1.0
    agrees(result, arrays, optax_clipped(arrays, optax.adaptive_grad_clip(0.5, axis=(0, 1)), weights))
