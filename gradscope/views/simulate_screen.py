"""What ``gradscope simulate`` shows: what each policy would have done, when in the run, and which max_norm to use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gradscope import results
from gradscope.findings import is_skip, policy_words, run_words, step_word
from gradscope.notation import count, number, percent, setting
from gradscope.views.cells import factor
from gradscope.views.choices import ViewChoices
from gradscope.views.nonfinite_sentences import nonfinite_sentences
from gradscope.views.policy_tables import group_table, layer_table, one_step_table, phase_table, policy_table
from gradscope.views.screen import Block, Column, Histogram, Row, Screen, Sentence, Table

# Fewer norms than this are no distribution to look at.
FEWEST_FOR_HISTOGRAM = 10
MOST_MARKS = 4
# In the order in which they are wanted, in percent.
_SHARES = {"0.10": 10, "0.05": 5, "0.01": 1, "0.50": 50}
_WHOLE_NORM_POLICIES = {"norm", "joint-norm", "skip"}


Suggested = Mapping[str, float | tuple[int, int]]


def simulate_screen(simulation: results.Simulation, choices: ViewChoices) -> Screen:
    """The screen of one simulation."""
    return Screen(tuple(_blocks(simulation, choices)))


def _blocks(simulation: results.Simulation, choices: ViewChoices) -> Iterator[Block]:
    yield Sentence(_opening(simulation, choices), tone="strong")
    yield from (Sentence(finding, finding=True) for finding in simulation.findings)
    yield from nonfinite_sentences(simulation.nonfinite)
    # That a log is a sample, and of what, comes before its numbers.
    log = simulation.source.kind == "norm-log"
    notes = [Sentence(note, tone="plain" if log else "quiet") for note in simulation.notes]
    if log:
        yield from notes
    if not simulation.results:
        yield _norm_table(simulation)
    yield from _policy_blocks(simulation, choices)
    # The norms of several phases are no one distribution.
    phased = any(len(policy.phases) > 1 for policy in simulation.results)
    if sum(simulation.norm_histogram.counts) >= FEWEST_FOR_HISTOGRAM and not phased:
        yield _histogram(simulation)
    if simulation.sweep:
        yield _ladder(simulation)
    yield from (Sentence(text, finding=True) for text in _suggestions(simulation))
    if not log:
        yield from notes
    if simulation.skipped:
        yield Sentence(f"Skipped: {', '.join(simulation.skipped[:5])}.", tone="quiet")
    if not simulation.results and not simulation.sweep:
        yield Sentence(
            "Next: add a policy, for example --max-norm 0.5"
            f"{'' if log else ' or --clip-value 0.01'}; each takes several values."
        )
    yield Sentence("Replay: another threshold would have trained another policy.")


def _opening(simulation: results.Simulation, choices: ViewChoices) -> str:
    start = choices.opening or simulation.source.path
    steps = step_word(simulation.source)
    steps = steps.removesuffix("s") if simulation.steps == 1 else steps
    return f"{start}: {count(simulation.steps)} {steps}, {run_words(simulation.source)}"


def _norm_table(simulation: results.Simulation) -> Table:
    norm = simulation.norm
    values = {"min": norm.min, "median": norm.p50, "mean": norm.mean, "p95": norm.p95, "p99": norm.p99, "max": norm.max}
    spares = {"p99": 4, "mean": 3, "p95": 2, "min": 1}
    columns = (Column("", "left"), *(Column(title, spare=spares.get(title, 0)) for title in values))
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
        yield phase_table(simulation, choices.width)
    if any(len(policy.groups) > 1 for policy in policies):
        yield group_table(simulation, choices.width)
    layers = layer_table(simulation)
    if layers is not None:
        yield layers


def _histogram(simulation: results.Simulation) -> Histogram:
    histogram = simulation.norm_histogram
    marks = [
        (
            f"{policy_words(policy.policy)} {'drops' if is_skip(policy) else 'clips'} {percent(policy.clip_rate)}",
            policy.threshold,
        )
        for policy in simulation.results
        if policy.threshold is not None and policy.policy.split(":")[0] in _WHOLE_NORM_POLICIES
    ]
    return Histogram(
        title=f"norms of {count(sum(histogram.counts))} {step_word(simulation.source)}, from small to large",
        edges=histogram.edges,
        counts=histogram.counts,
        smallest=histogram.smallest,
        largest=histogram.largest,
        marks=tuple(marks[:MOST_MARKS]),
    )


def _ladder(simulation: results.Simulation) -> Table:
    all_recent = _recent_is_all(simulation)
    columns = [Column("max_norm"), Column("clipped"), *[Column("recently", spare=1)] * (not all_recent)]
    columns.append(Column("length kept", spare=2))
    rows = []
    for rung in simulation.sweep:
        recently = [] if all_recent else [percent(rung.recent_clip_rate)]
        cells = [setting(rung.max_norm), percent(rung.clip_rate), *recently, factor(rung.scale)]
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
    steps = step_word(simulation.source)
    recent, overall = simulation.suggested_max_norm, simulation.suggested_max_norm_overall
    if _recent_is_all(simulation):
        yield from _thresholds(simulation, overall, f"To clip {{}} of the {steps} use {{}}")
        return
    yield from _thresholds(simulation, recent, f"To clip {{}} of recent {steps} use {{}}")
    yield from _thresholds(simulation, overall, "Over the whole run: {}: {}")


def _recent_is_all(simulation: results.Simulation) -> bool:
    return simulation.recent_steps >= simulation.steps


def _thresholds(simulation: results.Simulation, suggested: Suggested, start: str) -> Iterator[str]:
    """The suggestions in three digits, rounded up: rounded down, they would clip more than they promise.

    A share that is less than one step gets the largest norm, which clips nothing, and is marked so.
    """
    span = suggested["steps"]
    values = {
        percents: value for share, percents in _SHARES.items() if isinstance(value := suggested.get(share), float | int)
    }
    if not isinstance(span, tuple) or not values or not all(map(math.isfinite, values.values())):
        return
    length = simulation.recent_steps if suggested is simulation.suggested_max_norm else simulation.steps
    finite = length - sum(span[0] <= step.step <= span[1] for step in simulation.nonfinite)
    told = {
        percents: number(_rounded_up(value)) + ("" if finite * percents >= 100 else " (the largest seen)")
        for percents, value in values.items()
    }
    first, *others = told
    parts = [start.format(f"{first} %", told[first]), *(f"{percents} %: {told[percents]}" for percents in others)]
    yield "; ".join(parts) + "."


def _rounded_up(value: float) -> float:
    if value <= 0:
        return value
    rounded = float(f"{value:.2e}")
    step = 10.0 ** (math.floor(math.log10(rounded)) - 2)
    return rounded if rounded >= value else float(f"{rounded + step:.2e}")
