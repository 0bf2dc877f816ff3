"""What ``gradscope simulate`` shows: what each policy would have done, when in the run, and which max_norm to use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gradscope import results
from gradscope.findings import policy_words
from gradscope.notation import count, number, percent, setting
from gradscope.views.cells import factor, share
from gradscope.views.choices import ViewChoices
from gradscope.views.nonfinite_sentences import nonfinite_sentences
from gradscope.views.policy_tables import group_table, layer_table, one_step_table, phase_table, policy_table
from gradscope.views.screen import Block, Column, Histogram, Row, Screen, Sentence, Table

# Fewer norms than this are no distribution to look at.
FEWEST_FOR_HISTOGRAM = 10
MOST_MARKS = 4
_WHOLE_NORM_POLICIES = {"norm", "joint-norm", "skip"}


def simulate_screen(simulation: results.Simulation, choices: ViewChoices) -> Screen:
    """The screen of one simulation."""
    return Screen(tuple(_blocks(simulation, choices)))


def _blocks(simulation: results.Simulation, choices: ViewChoices) -> Iterator[Block]:
    yield Sentence(_opening(simulation, choices), tone="strong")
    yield from (Sentence(finding, finding=True) for finding in simulation.findings)
    yield from nonfinite_sentences(simulation.nonfinite)
    if not simulation.results:
        yield _norm_table(simulation)
    yield from _policy_blocks(simulation, choices)
    if sum(simulation.norm_histogram.counts) >= FEWEST_FOR_HISTOGRAM:
        yield _histogram(simulation)
    if simulation.sweep:
        yield _ladder(simulation)
    yield from (Sentence(text, finding=True) for text in _suggestions(simulation))
    yield from (Sentence(note, tone="quiet") for note in simulation.notes)
    if simulation.skipped:
        yield Sentence(f"Skipped: {', '.join(simulation.skipped[:5])}.", tone="quiet")
    if not simulation.results and not simulation.sweep:
        yield Sentence(
            "Next: add a policy, for example --max-norm 0.5 or --clip-value 0.01; each takes several values."
        )
    yield Sentence("Replay: another threshold would have trained another policy.")


def _opening(simulation: results.Simulation, choices: ViewChoices) -> str:
    start = choices.opening or simulation.source.path
    return f"{start}: {count(simulation.steps)} update{'s' * (simulation.steps != 1)}, {simulation.source.format}"


def _norm_table(simulation: results.Simulation) -> Table:
    norm = simulation.norm
    values = {"min": norm.min, "median": norm.p50, "mean": norm.mean, "p95": norm.p95, "p99": norm.p99, "max": norm.max}
    columns = (Column("", "left"), *(Column(title) for title in values))
    return Table(columns, (Row(("norm", *(number(value) for value in values.values()))),))


def _policy_blocks(simulation: results.Simulation, choices: ViewChoices) -> Iterator[Block]:
    policies = simulation.results
    if not policies or simulation.steps == simulation.nonfinite_steps:
        return
    phased = any(len(policy.phases) > 1 for policy in policies)
    if simulation.steps == 1:
        yield one_step_table(policies)
    elif len(policies) > 1 or not phased:
        yield policy_table(simulation)
    if phased:
        yield phase_table(policies, choices.width)
    if any(len(policy.groups) > 1 for policy in policies):
        yield group_table(policies, choices.width)
    layers = layer_table(policies)
    if layers is not None:
        yield layers


def _histogram(simulation: results.Simulation) -> Histogram:
    histogram = simulation.norm_histogram
    marks = [
        (f"{policy_words(policy.policy)} clips {percent(policy.clip_rate)}", policy.threshold)
        for policy in simulation.results
        if policy.threshold is not None and policy.policy.split(":")[0] in _WHOLE_NORM_POLICIES
    ]
    return Histogram(
        title=f"norms of {count(sum(histogram.counts))} updates, from small to large",
        edges=histogram.edges,
        counts=histogram.counts,
        marks=tuple(marks[:MOST_MARKS]),
    )


def _ladder(simulation: results.Simulation) -> Table:
    all_recent = _recent_is_all(simulation)
    columns = [Column("max_norm"), Column("clipped"), *[Column("recently")] * (not all_recent), Column("length kept")]
    rows = []
    for rung in simulation.sweep:
        recently = [] if all_recent else [share(rung.recent_clip_rate)]
        cells = [setting(rung.max_norm), share(rung.clip_rate), *recently, factor(rung.scale)]
        rows.append(Row(tuple(cells), bar=rung.clip_rate))
    return Table(tuple(columns), tuple(rows))


def _suggestions(simulation: results.Simulation) -> Iterator[str]:
    """The thresholds that clip a given share, of the recent part, and of the whole run where they differ."""
    if simulation.steps == 1:
        if simulation.norm.max == 0:
            yield "No max_norm clips this gradient: it is zero."
        elif math.isfinite(simulation.norm.max):
            yield f"Any max_norm below {number(simulation.norm.max, 4)} clips this gradient."
        return
    recent, overall = _thresholds(simulation.suggested_max_norm), _thresholds(simulation.suggested_max_norm_overall)
    if not recent:
        return
    whole = _recent_is_all(simulation)
    which = "the updates" if whole else "recent updates"
    yield f"To clip 10 % of {which} use {recent['0.10']}; 5 %: {recent['0.05']}; " + _last_two(recent)
    if overall and not whole and overall != recent:
        yield f"Over the whole run: 10 %: {overall['0.10']}; 5 %: {overall['0.05']}; " + _last_two(overall)


def _recent_is_all(simulation: results.Simulation) -> bool:
    span = simulation.suggested_max_norm["steps"]
    return not isinstance(span, tuple) or span[1] - span[0] + 1 >= simulation.steps


def _last_two(thresholds: Mapping[str, str]) -> str:
    return f"1 %: {thresholds['0.01']}; 50 %: {thresholds['0.50']}."


def _thresholds(suggested: Mapping[str, float | tuple[int, int]]) -> dict[str, str]:
    """The suggestions in three digits, rounded up: rounded down, they would clip more than they promise."""
    values = {share: value for share, value in suggested.items() if share != "steps"}
    if not values or not all(isinstance(value, float | int) and math.isfinite(value) for value in values.values()):
        return {}
    return {share: number(_rounded_up(float(value))) for share, value in values.items() if not isinstance(value, tuple)}


def _rounded_up(value: float) -> float:
    if value <= 0:
        return value
    rounded = float(f"{value:.2e}")
    step = 10.0 ** (math.floor(math.log10(rounded)) - 2)
    return rounded if rounded >= value else float(f"{rounded + step:.2e}")
