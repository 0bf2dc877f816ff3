"""One norm over actor and critic: who decides it, and what the other would have met alone."""

from __future__ import annotations

import numpy as np
from in_memory_source import InMemorySource

from gradscope.simulation import simulate


def test_the_role_that_decides_the_norm_is_said() -> None:
    steps = [
        {"actor.0.weight": np.array([0.1 * k], np.float64), "critic.0.weight": np.array([30.0], np.float64)}
        for k in range(1, 11)
    ]
    simulation = simulate(InMemorySource(steps), ["norm:0.85", "per-layer-norm:0.85"])
    by_norm, by_layer = simulation.results
    assert by_layer.roles == ()
    actor, critic = by_norm.roles
    assert (actor.name, actor.clip_rate_alone, critic.clip_rate_alone) == ("actor", 0.2, 1.0)
    assert abs(actor.share + critic.share - 1.0) < 1e-12
    assert any(
        "The critic dominates: it holds 99.96 % of the squared norm; by itself the actor would have been clipped "
        "in 20.0 % of the steps instead of 100 %." in sentence
        for sentence in simulation.findings
    )


def test_groups_that_are_clipped_apart_have_no_such_sentence() -> None:
    steps = [{"actor.w": np.array([0.1], np.float64), "critic.w": np.array([30.0], np.float64)}]
    groups = {"actor": ["actor.w"], "critic": ["critic.w"]}
    (result,) = simulate(InMemorySource(steps, groups), ["norm:0.5"]).results
    assert result.roles == ()
