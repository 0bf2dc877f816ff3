"""Every rule, in the order in which they are told."""

from __future__ import annotations

from gradscope.health.rule import Rule
from gradscope.health.rules.clip_lint import BAD_THRESHOLD, COVERAGE, DOUBLE_CLIP, SCALED_CLIP
from gradscope.health.rules.clip_rate import CLIP_RATE
from gradscope.health.rules.dead import DEAD
from gradscope.health.rules.depth_decay import DEPTH_DECAY
from gradscope.health.rules.direction_change import DIRECTION_CHANGE
from gradscope.health.rules.drift import DRIFT
from gradscope.health.rules.exploding import EXPLODING
from gradscope.health.rules.layer_dominance import LAYER_DOMINANCE
from gradscope.health.rules.noise_scale import NOISE_SCALE
from gradscope.health.rules.nonfinite import NONFINITE
from gradscope.health.rules.saturation import SATURATION
from gradscope.health.rules.spike import SPIKE
from gradscope.health.rules.underflow import UNDERFLOW
from gradscope.health.rules.unused import UNUSED
from gradscope.health.rules.update_ratio import UPDATE_RATIO
from gradscope.health.rules.vanishing import VANISHING

RULES: tuple[Rule, ...] = (
    NONFINITE,
    EXPLODING,
    SPIKE,
    VANISHING,
    DEPTH_DECAY,
    DEAD,
    UNUSED,
    CLIP_RATE,
    SATURATION,
    DIRECTION_CHANGE,
    LAYER_DOMINANCE,
    UPDATE_RATIO,
    UNDERFLOW,
    COVERAGE,
    SCALED_CLIP,
    BAD_THRESHOLD,
    DOUBLE_CLIP,
    NOISE_SCALE,
    DRIFT,
)
