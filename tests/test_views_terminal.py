"""Terminal tables: nothing wraps or is cut at 80 columns, whatever the names and numbers are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from view_samples import LAYERS, checkpoint, gradients, policy, simulation

from gradscope import results
from gradscope.findings import simulation_findings
from gradscope.notation import number
from gradscope.printable import printable
from gradscope.spread import Spread
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices
from gradscope.views.screen import Column, Row, Screen, Table
from gradscope.views.terminal import bar_text, terminal_text
from gradscope.views.wrapping import shortened, wrapped

FLOATS = st.one_of(
    st.floats(0, 1e300), st.sampled_from([0.0, 5e-324, 1e-12, 0.5, 1.0, 999999.5, 1e18, float("nan"), float("inf")])
)
SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 1 - 1e-9, 1.0, float("nan")]))
COUNTS = st.integers(0, 10**12)
NAMES = st.one_of(
    st.text(min_size=1, max_size=120),
    st.sampled_from(["model.layers.31.self_attn.q_proj.weight", "層" * 60, "\x1b[31mred", "a\nb", "\ud800", ""]),
)
SPREADS = st.builds(Spread, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)


def table(result: results.Inspection | results.Simulation, **choices: object) -> str:
    return VIEWS["table"](result, ViewChoices(**choices))


def steady(simulation: results.Simulation) -> results.Simulation:
    """The same run without a change of size."""
    return replace(
        simulation, results=tuple(replace(result, phases=result.phases[:1]) for result in simulation.results)
    )


@st.composite
def simulations(draw: st.DrawFn) -> results.Simulation:
    labels = draw(st.lists(st.sampled_from(["norm:0.5", "value:1e-05", "agc:0.01,0.001", "zclip:2.5"]), max_size=3))
    made = tuple(
        replace(
            policy(label, 0.5),
            clip_rate=draw(SHARES),
            clip_rate_ci95=draw(st.one_of(st.none(), st.tuples(SHARES, SHARES))),
            norm_ratio=draw(SPREADS),
            scale=draw(SPREADS),
            direction_change_deg=draw(st.one_of(st.none(), SPREADS)),
            direction_change_error_deg=draw(FLOATS),
            clipped_elements=draw(st.floats(0, 1e15)),
            groups=tuple(
                results.PolicyGroup(
                    draw(NAMES), draw(SHARES), draw(SPREADS), draw(SPREADS), draw(SPREADS), draw(SHARES)
                )
                for _ in range(draw(st.integers(1, 3)))
            ),
            phases=tuple(
                results.Phase((draw(COUNTS), draw(COUNTS)), draw(SHARES), draw(SPREADS), draw(SPREADS))
                for _ in range(draw(st.integers(1, 3)))
            ),
            layers=tuple(
                results.PolicyLayer(draw(NAMES), draw(SHARES), draw(FLOATS), draw(FLOATS), draw(st.floats(0, 1e15)))
                for _ in range(draw(st.integers(0, 10)))
            ),
        )
        for label in labels
    )
    counts = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=24))
    suggestion = {"steps": (0, 99), "0.50": draw(FLOATS), "0.10": draw(FLOATS), "0.05": 1.0, "0.01": draw(FLOATS)}
    return replace(
        simulation(*made, sweep=draw(st.booleans())),
        norm=draw(SPREADS),
        source=results.Source(draw(NAMES), "gradients", draw(NAMES), 100),
        norm_histogram=results.NormHistogram(
            tuple(1.2**i for i in range(len(counts) + 1)), tuple(counts), draw(FLOATS), draw(FLOATS)
        ),
        suggested_max_norm=suggestion,
        findings=(draw(NAMES),),
        notes=(draw(NAMES),),
        skipped=(draw(NAMES),),
    )


@st.composite
def inspections(draw: st.DrawFn) -> results.Inspection:
    base = draw(st.sampled_from([checkpoint(), gradients(), gradients(1)]))
    summary = base.gradients
    if summary is not None:
        summary = replace(
            summary,
            layers=tuple(
                results.LayerNorm(draw(NAMES), draw(SPREADS), draw(COUNTS), draw(SHARES))
                for _ in range(draw(st.integers(0, 20)))
            ),
            tensors=tuple(
                replace(
                    tensor,
                    name=draw(NAMES),
                    l2_norm=draw(SPREADS),
                    max_abs=draw(FLOATS),
                    zeros=draw(COUNTS),
                    nonfinite=draw(COUNTS),
                    share=draw(SHARES),
                    shape=tuple(draw(st.lists(COUNTS, max_size=5))),
                )
                for tensor in summary.tensors
            ),
        )
    optimizers = tuple(
        replace(
            optimizer,
            name=draw(NAMES),
            mean_norm=draw(FLOATS),
            tensors=tuple(
                results.OptimizerTensor(draw(NAMES), draw(FLOATS), draw(FLOATS), draw(SHARES), draw(SHARES))
                for _ in range(draw(st.integers(0, 20)))
            ),
        )
        for optimizer in base.optimizers * draw(st.integers(1, 2))
    )
    return replace(base, gradients=summary, optimizers=optimizers, findings=(draw(NAMES),))


@settings(max_examples=60, deadline=None)
@given(result=simulations(), unicode=st.booleans())
def test_no_line_of_a_simulation_is_longer_than_80(result: results.Simulation, unicode: bool) -> None:
    for line in table(result, width=80, unicode=unicode).splitlines():
        assert cell_len(line) <= 80
        assert unicode or line.isascii()


@settings(max_examples=60, deadline=None)
@given(result=inspections(), by=st.sampled_from(["tensor", "layer", "group"]), unicode=st.booleans())
def test_no_line_of_an_inspection_is_longer_than_80(result: results.Inspection, by: str, unicode: bool) -> None:
    for line in table(result, width=80, by=by, unicode=unicode).splitlines():
        assert cell_len(line) <= 80
        assert unicode or line.isascii()


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=5), values=st.lists(FLOATS, min_size=5, max_size=5))
def test_a_number_is_never_cut(names: list[str], values: list[float]) -> None:
    columns = (Column("layer", "left"), Column("norm"), Column("max"), Column("min", spare=1))
    cells = [(name, *(number(value) for value in values[i : i + 3])) for i, name in enumerate(names[:3])]
    shown = terminal_text(Screen((Table(columns, tuple(Row(row, 0.5) for row in cells)),)), ViewChoices(width=50))
    for line, row in zip(shown.splitlines()[1:], cells, strict=True):
        numbers = line.rstrip(" █▉▊▋▌▍▎▏").split()
        assert numbers[-3:] == list(row[1:]) or numbers[-2:] == list(row[1:3])


def test_the_checkpoint_screen_shows_what_matters() -> None:
    text = table(checkpoint())
    assert text.startswith("SB3 PPO · 12 tensors · 9,797 parameters · Adam, 63,488 updates\n\n▸ All of the last ~1,000")
    assert re.search(r"mlp_extractor\.value_net\.0 +0\.444 +79\.0 % .*█{10}", text)
    assert re.search(r"3 actor layers +0\.0262 +0\.[23] %", text)
    assert re.search(r"all +0\.500", text)


def test_a_checkpoint_that_was_picked_is_named_first() -> None:
    source = replace(checkpoint().source, picked="model_149.pt, newest of 4 in run")
    assert table(replace(checkpoint(), source=source)).startswith("model_149.pt, newest of 4 in run · SB3 PPO · 12 ")


def test_the_way_on_from_a_checkpoint_is_to_record() -> None:
    assert table(checkpoint()).endswith("\nNext: gradscope record -- python train.py\n")


def test_noise_has_no_consistency() -> None:
    base = checkpoint()
    text = table(replace(base, optimizers=(replace(base.optimizers[0], consistency=-0.013),)))
    assert "consistency: none, of two windows" in text
    assert "consistency: 0.4 %, of two windows" in table(base)


def test_the_simulation_screen_of_one_policy_shows_its_phases() -> None:
    text = table(simulation(policy("norm:0.5", 0.5)), opening="Using cartpole.gradscope (newest, 2 min old)")
    assert text.startswith("Using cartpole.gradscope (newest, 2 min old): 8,000 updates, SB3 PPO\n")
    assert re.search(r"^ +0–4,799 +100 % +21\.3 +0\.02×$", text, re.M)
    assert re.search(r"^ +4,800–7,999 +38\.2 % +0\.400 +1\.00×$", text, re.M)
    assert "▸ To clip 10 % of recent updates use 0.806; 5 %: 2.34; 1 %: 5.05; 50 %: 0.310." in text
    assert "Over the whole run: 10 %: 37.8" in text
    assert text.endswith("Replay: another threshold would have trained another policy.\n")
    assert "max_norm 0.5" in text and "υ" not in text


def test_suggestions_are_rounded_up_so_that_they_clip_no_more_than_they_promise() -> None:
    result = replace(
        simulation(),
        suggested_max_norm={"steps": (0, 99), "0.50": 0.9991, "0.10": 1.001, "0.05": 9.996, "0.01": 12341.0},
    )
    assert "10 % of recent updates use 1.01; 5 %: 10.0; 1 %: 12,400; 50 %: 1.00." in table(result)


def test_a_share_of_less_than_one_step_gets_the_largest_norm_and_is_marked() -> None:
    few = {"steps": (7936, 7999), "0.50": 0.31, "0.10": 3.16, "0.05": 5.7, "0.01": 14.1}
    dumps = results.Source("grads", "gradients", "gradient dumps (safetensors)", 8000)
    text = " ".join(table(replace(simulation(), suggested_max_norm=few, recent_steps=64, source=dumps)).split())
    assert "To clip 10 % of recent steps use 3.16; 5 %: 5.70; 1 %: 14.1 (the largest seen); 50 %: 0.310." in text
    # One of the 20 steps is not finite: 5 % of the other 19 is less than one step.
    broken = (results.NonfiniteStep(7999, "step_7999", ("w",), ()),)
    few = {**few, "steps": (7980, 7999)}
    text = " ".join(table(replace(simulation(), suggested_max_norm=few, recent_steps=20, nonfinite=broken)).split())
    assert "use 3.16; 5 %: 5.70 (the largest seen); 1 %: 14.1 (the largest seen); 50 %: 0.310." in text


def test_dumps_are_steps_and_no_updates() -> None:
    dumps = results.Source("grads", "gradients", "gradient dumps (safetensors)", 8000)
    base = replace(simulation(policy("norm:0.5", 0.5), sweep=True), source=dumps)
    text = table(replace(base, findings=simulation_findings(base)))
    assert text.startswith("grads: 8,000 steps, gradient dumps (safetensors)\n")
    assert "of the last 1,000 steps (75.0 % overall)" in text
    assert re.search(r"^ +steps +clipped +median norm", text, re.M)
    assert "update" not in text
    assert "norms of 5,969 steps" in table(steady(base))


def test_several_policies_are_set_side_by_side() -> None:
    text = table(simulation(policy("norm:0.5", 0.5), policy("value:0.01", 0.01, turned=10.2, error=0.09), sweep=True))
    assert re.search(r"clip_value 0\.01 +25\.0 % +17–35 % +75\.0 % +0\.10× +10\.2° +91\.8°", text)
    assert "Layers under clip_value 0.01" in text
    assert re.search(r"^ +0\.5 +66\.7 % +33\.3 % +0\.10×", text, re.M)


def test_elements_are_counted_where_some_are_clipped() -> None:
    by_value = replace(policy("value:0.01", 0.01, turned=10.0), clipped_elements_error=7)
    by_layer = replace(policy("per-layer-norm:1", 1.0, turned=10.0), clipped_elements=0)
    by_layer = replace(by_layer, layers=tuple(replace(layer, clipped_elements=0) for layer in by_layer.layers))
    text = table(simulation(by_value, by_layer), width=140)
    assert re.search(r"clip_value 0\.01 .* ≈ 1,234,567 ", text)
    assert re.search(r"per-layer-norm:1 .* – +96$", text, re.M)
    assert "elements clipped" not in table(simulation(by_layer), width=140)


def test_what_does_not_fit_is_named() -> None:
    labels = ("norm:0.5", "value:0.01", "zclip:2.5", "per-layer-norm:1", "value:1")
    made = simulation(*(policy(label, 0.5, turned=1.0) for label in labels))
    text = " ".join(table(made, width=80).split())
    assert "under each policy: clipped; per-layer-norm:1, clip_value 1 with --format csv" in text
    assert "layers under per-layer-norm:1, clip_value 1 with --format csv" in text
    assert "| per-layer-norm:1 | clip_value 1 |" in VIEWS["markdown"](made, ViewChoices())


def test_a_narrow_table_of_phases_keeps_the_policies() -> None:
    made = simulation(*(policy(label, 0.5) for label in ("norm:0.5", "norm:1", "norm:2")))
    assert re.search(r"^ +updates +max_norm 0.5 +max_norm 1 +max_norm 2$", table(made, width=56), re.M)
    assert re.search(r"^ +updates +median norm +max_norm 0.5 +max_norm 1 +max_norm 2$", table(made, width=80), re.M)


def test_a_column_and_its_footnote_go_together() -> None:
    made = simulation(policy("per-tensor-norm:0.5", 0.5), policy("norm:1", 1.0))
    made = replace(made, results=tuple(replace(policy, layers=()) for policy in made.results))
    assert "scale" not in table(made, width=80)
    assert table(made, width=120).count("(g·c)/‖g‖²") == 1
    assert table(simulation(policy("value:0.01", 0.01, turned=10.0)), width=80).count("(g·c)/‖g‖²") == 1


@pytest.mark.parametrize("width", [40, 60])
def test_columns_go_before_policies_and_phases_are_cut(width: int) -> None:
    labels = ("norm:0.5", "value:0.01", "per-tensor-norm:0.5")
    text = table(simulation(*(policy(label, 0.5, turned=1.0) for label in labels), sweep=True), width=width)
    assert re.search(r"^  per-tensor-norm:0\.5 +25\.0 %", text, re.M)
    assert re.search(r"^ +4,800–7,999 ", text, re.M)
    assert max(map(cell_len, text.splitlines())) <= width


def test_the_histogram_names_the_smallest_and_the_largest_norm() -> None:
    text = table(steady(simulation(policy("norm:0.5", 0.5))))
    assert re.search(r"^  0\.112 +12\.1$", text, re.M)
    assert "▲ max_norm 0.5 clips 75.0 %" in text
    assert "▲ skip:0.5 drops 75.0 %" in table(steady(simulation(policy("skip:0.5", 0.5))))


def test_the_norms_of_several_phases_are_no_one_distribution() -> None:
    assert "from small to large" not in table(simulation(policy("norm:0.5", 0.5)))


def test_without_a_policy_the_norms_and_the_way_on_are_shown() -> None:
    text = table(simulation())
    assert re.search(r"norm +0\.275 +1\.10 +1\.21 +3\.30 +5\.50 +9\.90", text)
    assert "--max-norm" in text


def test_non_finite_steps_are_named() -> None:
    text = table(gradients())
    assert "Step 17 (step_0017.safetensors): NaN or Inf in action_net.weight" in text
    assert "Step 90" in text


def test_top_sort_and_by() -> None:
    text = table(gradients(), by="tensor", sort="name", top=3)
    assert [line.split()[0] for line in text.splitlines() if "_net." in line and line.startswith("  ") and "%" in line][
        :3
    ] == [
        "action_net.bias",
        "action_net.weight",
        "mlp_extractor.policy_net.0.bias",
    ]
    assert "9 more tensors" in text


def test_order_keeps_the_modules_order() -> None:
    lines = table(gradients(), sort="order", top=6).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in LAYERS]
    assert shown == list(LAYERS)


@pytest.mark.parametrize("width", [80, 120])
def test_a_wider_terminal_shows_more(width: int) -> None:
    text = table(gradients(), width=width)
    assert ("p99" in text) == (width == 120)


def test_colours_appear_only_when_wanted_and_change_no_character() -> None:
    plain, coloured = table(checkpoint()), table(checkpoint(), colour=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in uncoloured.splitlines()] == plain.splitlines()
    # No bright or white shades: they vanish on a light background.
    assert not re.search(r"\x1b\[[0-9;]*\b(3[37]|9[0-7])\b", coloured)


def test_escapes_in_names_do_not_reach_the_terminal() -> None:
    layers = (results.LayerNorm("\x1b]0;owned\x07layer", Spread.constant(1.0), 1, 1.0),)
    base = gradients(1)
    assert base.gradients is not None
    text = table(replace(base, gradients=replace(base.gradients, layers=layers)))
    assert "\x1b" not in text and "\x07" not in text
    assert "owned" in text


@given(text=st.text())
def test_printable_text_is_printable(text: str) -> None:
    assert printable(text).replace("\u00a0", "").isprintable()


@given(name=st.text(st.characters(codec="utf-8", exclude_categories=("C", "M")), max_size=60), width=st.integers(1, 60))
def test_shortened_names_fit_and_keep_both_ends(name: str, width: int) -> None:
    short = shortened(name, width)
    assert cell_len(short) <= width
    assert short == name or (name.startswith(short.split("…")[0]) and name.endswith(short.split("…")[-1]))


@given(text=st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)), width=st.integers(8, 60))
def test_wrapping_loses_nothing(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("value", "bar"), [(0.0, ""), (1.0, "██████████"), (0.5, "█████"), (0.0125, "▏"), (float("nan"), "")]
)
def test_bars(value: float, bar: str) -> None:
    assert bar_text(value, 10) == bar
