"""Which part of an actor-critic a tensor belongs to, told from its name."""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["actor", "critic"]

# SB3: mlp_extractor.policy_net, action_net, pi_features_extractor, log_std, actor.mu; rsl_rl: actor.*, std.
_ACTOR = re.compile(r"(^|[._])(actor|policy_net|action_net|pi_features_extractor|log_std|std|std_param)([._]|$)")
_CRITIC = re.compile(r"(^|[._])(critic|value_net|vf_features_extractor|qf\d+|q_net)([._]|$)")


def role_of(name: str) -> Role | None:
    """``"actor"``, ``"critic"``, or None for what is shared, or in no actor-critic.  ``name`` is a tensor or layer."""
    actor, critic = _ACTOR.search(name), _CRITIC.search(name)
    if bool(actor) == bool(critic):
        return None
    return "actor" if actor else "critic"
