"""Hand-made results, as the engine would return them, for the tests of the views."""

from __future__ import annotations

from dataclasses import replace

from gradscope import results
from gradscope.findings import inspection_findings, simulation_findings
from gradscope.spread import Spread

LAYERS = {
    "mlp_extractor.value_net.0": (0.444, 0.790),
    "mlp_extractor.value_net.2": (0.216, 0.186),
    "value_net": (0.073, 0.0215),
    "mlp_extractor.policy_net.0": (0.021, 0.0012),
    "mlp_extractor.policy_net.2": (0.012, 0.0008),
    "action_net": (0.010, 0.0005),
}


def spread(middle: float) -> Spread:
    return Spread(min=middle / 4, p50=middle, mean=middle * 1.1, p95=middle * 3, p99=middle * 5, max=middle * 9)


def checkpoint() -> results.Inspection:
    """An SB3 PPO checkpoint whose optimizer sat at the limit."""
    group = results.OptimizerGroup(
        name="policy",
        max_norm=0.5,
        recent_norm=0.5,
        mean_norm=0.031,
        consistency=0.004,
        saturation=1.0,
        clipped_share_at_most=1.0,
        at_limit_share_at_least={"0.99": 1.0, "0.9": 1.0},
        share=1.0,
        qualifications=(),
    )
    optimizer = results.OptimizerReport(
        name="policy.optimizer",
        type="Adam",
        steps=63488,
        lr=3e-4,
        max_norm=0.5,
        recent_norm=0.5,
        mean_norm=0.031,
        momentum_norm=None,
        consistency=0.004,
        window=1000.0,
        mean_window=10.0,
        saturation=1.0,
        clipped_share_at_most=1.0,
        at_limit_share_at_least={"0.99": 1.0, "0.9": 1.0},
        groups=(group,),
        tensors=tuple(
            results.OptimizerTensor(f"{layer}.{kind}", norm * part, norm * 0.06, 0.004, share * part**2)
            for layer, (norm, share) in LAYERS.items()
            for kind, part in (("weight", 0.8), ("bias", 0.6))
        ),
        qualifications=(),
        unavailable=None,
    )
    weights = results.WeightSummary(
        global_=results.WeightTotals(11.0, 9797),
        layers=tuple(results.LayerWeights(name, 4.0, 1632) for name in LAYERS),
        tensors=tuple(
            results.TensorWeights(f"{name}.{kind}", (64, 4), "float32", 816, 2.0, 0.07, 0.5, 0, 0)
            for name in LAYERS
            for kind in ("weight", "bias")
        ),
    )
    inspection = results.Inspection(
        schema="gradscope.inspect/1",
        source=results.Source("ppo.zip", "checkpoint", "SB3 PPO", 0),
        findings=(),
        notes=(),
        skipped=(),
        gradients=None,
        weights=weights,
        optimizers=(optimizer,),
    )
    return replace(inspection, findings=inspection_findings(inspection))


def gradients(steps: int = 128) -> results.Inspection:
    """A sequence of gradient dumps; one step holds a NaN."""
    one = steps == 1
    norm = Spread.constant if one else spread
    tensors = tuple(
        results.TensorNorm(
            name=f"{layer}.{kind}",
            layer=layer,
            group="all",
            shape=(64, 4),
            dtype="float32",
            numel=256,
            l2_norm=norm(value * part),
            rms=0.01,
            max_abs=0.3,
            zeros=0,
            nonfinite=1 if layer == "action_net" and not one else 0,
            share=share * part**2,
        )
        for layer, (value, share) in LAYERS.items()
        for kind, part in (("weight", 0.8), ("bias", 0.6))
    )
    summary = results.GradientSummary(
        global_=results.GradientTotals(norm(0.5), 0.3, 9797, 0, 0 if one else 2, 0 if one else 2),
        groups=(results.GroupNorm("all", norm(0.5), 9797, 1.0),),
        layers=tuple(results.LayerNorm(name, norm(value), 512, share) for name, (value, share) in LAYERS.items()),
        tensors=tensors,
        nonfinite=()
        if one
        else tuple(
            results.NonfiniteStep(step, f"step_{step:04}.safetensors", ("action_net.weight",), ("value_net.bias",))
            for step in (17, 90)
        ),
        at=None,
    )
    inspection = results.Inspection(
        schema="gradscope.inspect/1",
        source=results.Source("grads", "gradients", "gradient dumps (safetensors)", steps),
        findings=(),
        notes=(),
        skipped=("step: int64",),
        gradients=summary,
        weights=None,
        optimizers=(),
    )
    return replace(inspection, findings=inspection_findings(inspection))


def policy(label: str, threshold: float, turned: float = 0.0, error: float = 0.0) -> results.PolicyResult:
    change = Spread.constant(0.0) if turned == 0 else spread(turned)
    return results.PolicyResult(
        policy=label,
        threshold=threshold,
        clip_rate=0.75,
        clip_rate_ci95=(0.68, 0.81),
        effective_steps=141.3,
        clipped_steps=6000,
        scale=spread(0.1),
        norm_ratio=spread(0.1),
        direction_change_deg=change,
        direction_change_error_deg=error,
        clipped_elements=1234567.0,
        groups=(results.PolicyGroup("all", 0.75, spread(1.1), spread(0.1), change, 1.0),),
        phases=(
            results.Phase((0, 4799), 1.0, spread(21.29), spread(0.0235)),
            results.Phase((4800, 7999), 0.382, spread(0.4), Spread.constant(1.0)),
        ),
        recent=results.RecentClipping((7000, 7999), 0.25, (0.17, 0.35), 96.0, 1000),
        layers=tuple(
            results.PolicyLayer(name, 0.5, 1 - share, turned * share, 1000.0 * share)
            for name, (_, share) in LAYERS.items()
        ),
        roles=(),
    )


def simulation(*policies: results.PolicyResult, sweep: bool = False) -> results.Simulation:
    """A long PPO run whose gradients shrink on the way."""
    result = results.Simulation(
        schema="gradscope.simulate/1",
        source=results.Source("cartpole.gradscope", "trace", "SB3 PPO", 8000),
        convention="exact",
        findings=(),
        notes=(),
        skipped=(),
        steps=8000,
        nonfinite_steps=0,
        nonfinite=(),
        norm=spread(1.1),
        norm_histogram=results.NormHistogram(
            tuple(0.1 * 1.5**i for i in range(13)), (3, 40, 900, 1500, 700, 300, 100, 20, 5, 400, 2000, 1), 0.112, 12.1
        ),
        results=policies,
        sweep=tuple(results.SweepRow(x, 1 / (1 + x), 0.5 / (1 + x), min(1.0, x / 5)) for x in (0.1, 0.5, 1, 5, 10))
        if sweep
        else (),
        suggested_max_norm={"steps": (7000, 7999), "0.50": 0.31, "0.10": 0.8052, "0.05": 2.34, "0.01": 5.05},
        suggested_max_norm_overall={"steps": (0, 7999), "0.50": 1.1, "0.10": 37.8, "0.05": 44.0, "0.01": 61.0},
        recent_steps=1000,
    )
    return replace(result, findings=simulation_findings(result))
