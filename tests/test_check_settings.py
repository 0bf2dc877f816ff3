"""Rules, limits and severities as they are written: in pyproject.toml, on the command line and in Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.errors import GradscopeError
from gradscope.health.catalogue import RULES
from gradscope.health.checking import chosen_rules, rule_texts
from gradscope.health.project_settings import project_settings
from gradscope.health.settings import CheckSettings

NAMES = [rule.name for rule in RULES]


def in_project(folder: Path, text: str) -> CheckSettings:
    (folder / "pyproject.toml").write_text(text)
    return project_settings(folder)


def names(settings: CheckSettings) -> list[str]:
    return [rule.name for rule in chosen_rules(settings)]


def error_of(folder: Path, text: str) -> GradscopeError:
    with pytest.raises(GradscopeError) as caught:
        in_project(folder, f"[tool.gradscope.check]\n{text}\n")
    assert "\n" not in str(caught.value)
    return caught.value


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_rule_is_documented_and_its_defaults_are_allowed() -> None:
    assert len(set(NAMES)) == len(NAMES)
    settings = CheckSettings()
    for rule in RULES:
        assert rule.about and rule.formula and rule.source
        for limit in rule.limits:
            assert limit.about
            settings = settings.with_rule(f"{rule.name}.{limit.name}", limit.default)
        settings = settings.with_rule(f"{rule.name}.severity", rule.severity)
    assert rule_texts(settings) == rule_texts(CheckSettings())


# --- pyproject.toml --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[tool.gradscope.check]\nclip-rate.max = 0.5\nclip-rate.severity = 'error'\n",
        "[tool.gradscope.check]\n'clip-rate.max' = 0.5\n\"clip-rate.severity\" = 'error'\n",
        "[tool.gradscope.check.clip-rate]\nmax = 0.5\nseverity = 'error'\n",
        "[tool.gradscope.check]\nclip-rate = {max = 0.5, severity = 'error'}\n",
    ],
)
def test_three_ways_to_write_a_limit(tmp_path: Path, text: str) -> None:
    settings = in_project(tmp_path, text)
    assert settings.limits == {"clip-rate": {"max": 0.5}}
    assert settings.severities == {"clip-rate": "error"}
    (told,) = [rule for rule in rule_texts(settings) if rule.rule == "clip-rate"]
    assert told.severity == "error"
    assert {limit.name: limit.value for limit in told.limits}["max"] == 0.5


def test_every_other_key(tmp_path: Path) -> None:
    settings = in_project(
        tmp_path,
        "[tool.gradscope.check]\nselect = ['spike', 'dead']\nignore = ['dead']\nstrict = true\nfail-on = 'warn'\n"
        "baseline = 'ci/base.json'\n",
    )
    assert names(settings) == ["spike"]
    assert (settings.strict, settings.fail_on, settings.baseline) == (True, "warn", tmp_path / "ci" / "base.json")


@pytest.mark.parametrize("text", ["", "[tool.gradscope]\nsource = 'x'\n", "[tool.gradscope.check]\n"])
def test_without_settings_the_defaults_hold(tmp_path: Path, text: str) -> None:
    assert in_project(tmp_path, text) == CheckSettings()
    assert names(CheckSettings()) == NAMES


def test_no_project_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.health.project_settings.nearest_project", lambda directory: None)
    assert project_settings(tmp_path) == CheckSettings()


@pytest.mark.parametrize(
    ("text", "key", "why", "hint"),
    [
        ("clip-rte.max = 0.5", "clip-rte", "is no rule and no setting", "did you mean clip-rate?"),
        ("'clip-rte.max' = 0.5", "clip-rte.max", "no rule is called clip-rte", "did you mean clip-rate?"),
        ("clip-rate.maxx = 0.5", "clip-rate.maxx", "clip-rate has no limit 'maxx'", "did you mean max?"),
        ("clip-rate.max = '0.5'", "clip-rate.max", "must be a number from 0 to 1, not '0.5'", None),
        ("clip-rate.max = true", "clip-rate.max", "must be a number from 0 to 1, not True", None),
        ("clip-rate.max = 1.01", "clip-rate.max", "must be a number from 0 to 1, not 1.01", None),
        ("clip-rate.max = nan", "clip-rate.max", "must be a number from 0 to 1, not nan", None),
        ("clip-rate.max.x = 1", "clip-rate.max", "must be a number from 0 to 1, not {'x': 1}", None),
        ("coverage = 0.5", "coverage", "must be a table", 'for example coverage.severity = "warn"'),
        ("coverage.max = 0.5", "coverage.max", "coverage has no limit 'max'", "coverage has severity"),
        ("clip-rate.severity = 'fatal'", "clip-rate.severity", "must be error or warn, not 'fatal'", None),
        ("spike.severity = 'warning'", "spike.severity", "must be error or warn, not 'warning'", "did you mean warn?"),
        ("fail_on = 'warn'", "fail_on", "is no rule and no setting", "did you mean fail-on?"),
        ("fail-on = 'never'", "fail-on", "must be error or warn, not 'never'", None),
        ("fail-on = 1", "fail-on", "must be a text", None),
        ("strict = 'yes'", "strict", "must be true or false", None),
        ("strict = 1", "strict", "must be true or false", None),
        ("select = 'spike'", "select", "must be a list of rules", None),
        ("select = [1]", "select", "must be a list of rules", None),
        ("select = ['spke']", "spke", "no such rule", "did you mean spike?"),
        ("ignore = ['x']", "x", "no such rule", "gradscope check --list-rules prints every rule"),
        ("select = []", "rules", "select and ignore leave none", "gradscope check --list-rules prints every rule"),
        ("baseline = 3", "baseline", "must be a text", None),
        ("direction-change.policy = 'valu:1'", "direction-change.policy", "no policy is called 'valu'",
         "did you mean value?"),
        (f"direction-change.policy = 0x{'f' * 5000}", "direction-change.policy", "must be a text, not a huge number",
         None),
        ("direction-change.policy = 3", "direction-change.policy", "must be a text, not 3", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_and_key(
    tmp_path: Path, text: str, key: str, why: str, hint: str | None
) -> None:
    error = error_of(tmp_path, text)
    assert error.what == f"{tmp_path / 'pyproject.toml'}: {key} in [tool.gradscope.check]"
    assert (error.why, error.hint) == (why, hint)


def test_a_check_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match=r"check in \[tool.gradscope\] must be a table"):
        in_project(tmp_path, "[tool.gradscope]\ncheck = true\n")


def test_a_number_beyond_floats_is_infinite(tmp_path: Path) -> None:
    settings = in_project(tmp_path, f"[tool.gradscope.check]\nexploding.max = {'9' * 400}\n")
    assert settings.limits == {"exploding": {"max": math.inf}}
    assert "must be a number" in error_of(tmp_path, f"exploding.max = -{'9' * 400}").why


# --- RULE.LIMIT=VALUE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule", "limit", "value"),
    [
        ("clip-rate.max=0.5", "clip-rate", "max", 0.5),
        (" clip-rate.max = 5e-1 ", "clip-rate", "max", 0.5),
        ("exploding.max=inf", "exploding", "max", math.inf),
        ("direction-change.policy=value:0.5", "direction-change", "policy", "value:0.5"),
        ("direction-change.policy=", "direction-change", "policy", ""),
    ],
)
def test_a_written_limit(text: str, rule: str, limit: str, value: float | str) -> None:
    assert CheckSettings().with_written_rule(text).limits == {rule: {limit: value}}


def test_a_written_severity() -> None:
    assert CheckSettings().with_written_rule("spike.severity=warn").severities == {"spike": "warn"}


@pytest.mark.parametrize(
    "text",
    ["", "=", ".", ".=", "clip-rate", "clip-rate.max", "clip-rate=1", "clip-rate.=1", "clip-rate.max=",
     "clip-rate.max=x", "clip-rate.max=nan", "clip-rate.max=-0.1", "clip-rate.max=2", "a.b=1", "clip-rate.max.max=1",
     "spike.severity=no", "direction-change.policy=clip"],
)  # fmt: skip
def test_a_written_slip_is_one_line(text: str) -> None:
    with pytest.raises(GradscopeError) as caught:
        CheckSettings().with_written_rule(text)
    assert "\n" not in str(caught.value)


def test_the_last_value_wins_and_the_others_stay() -> None:
    settings = CheckSettings()
    for text in ("clip-rate.max=0.5", "spike.z=9", "clip-rate.min=0.1", "clip-rate.max=0.6"):
        settings = settings.with_written_rule(text)
    assert settings.limits == {"clip-rate": {"max": 0.6, "min": 0.1}, "spike": {"z": 9.0}}


@given(st.text(max_size=30))
def test_any_text_is_a_setting_or_an_error(text: str) -> None:
    try:
        settings = CheckSettings().with_written_rule(text)
    except GradscopeError:
        return
    assert settings.limits or settings.severities


@given(
    st.one_of(st.sampled_from([f"{rule.name}.{limit.name}" for rule in RULES for limit in rule.limits]), st.text()),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.binary()),
)  # fmt: skip
def test_any_value_is_in_bounds_or_an_error(key: str, value: Any) -> None:
    try:
        settings = CheckSettings().with_rule(key, value)
    except GradscopeError:
        return
    name, _, limit_name = key.partition(".")
    (rule,) = [rule for rule in RULES if rule.name == name]
    (limit,) = [limit for limit in rule.limits if limit.name == limit_name]
    taken = settings.limits[name][limit_name]
    assert isinstance(taken, str) == isinstance(limit.default, str)
    assert isinstance(taken, str) or limit.least <= taken <= limit.most


# --- which rules -----------------------------------------------------------------------------------------------------


def test_select_replaces_and_ignore_takes_away_more() -> None:
    project = CheckSettings().with_choice(select=["spike", "dead", "unused"], ignore=["dead"])
    assert names(project) == ["spike", "unused"]
    assert names(project.with_choice(ignore=["unused"])) == ["spike"]
    assert names(project.with_choice(select=["dead", "nonfinite"])) == ["nonfinite", "dead"]
    assert names(project.with_choice(select=["dead", "spike"], ignore=["spike"])) == ["dead"]


def test_what_is_not_given_stays() -> None:
    project = CheckSettings().with_choice(strict=True, fail_on="warn", baseline=Path("b.json"))
    assert project.with_choice() == project
    loose = project.with_choice(strict=False, fail_on="error")
    assert (loose.strict, loose.fail_on, loose.baseline) == (False, "error", Path("b.json"))


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_a_limit_is_any_real_number(value: Any) -> None:
    assert CheckSettings().with_rule("clip-rate.max", value).limits["clip-rate"]["max"] == float(value)


@pytest.mark.parametrize("rules", [["clip-rate.max"], "clip-rate.max", {3: 0.5}])
def test_rules_that_are_no_mapping_of_limits(rules: object) -> None:
    with pytest.raises(GradscopeError, match="must map limits to values"):
        CheckSettings().with_choice(rules=rules)  # type: ignore[arg-type]
