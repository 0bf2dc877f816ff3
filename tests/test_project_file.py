"""The nearest pyproject.toml, and one line that says where a broken one is broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradscope.errors import GradscopeError
from gradscope.project_file import nearest_project, read_project


def written(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pyproject.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_nearest_file_upwards_counts(tmp_path: Path) -> None:
    written(tmp_path, '[tool.gradscope]\nsource = "a"\n')
    inner = written(tmp_path / "x" / "y", '[tool.gradscope]\nsource = "b"\n')
    (tmp_path / "x" / "y" / "z").mkdir()
    found = nearest_project(tmp_path / "x" / "y" / "z")
    assert found is not None
    assert (found.path, found.directory, found.settings) == (inner, inner.parent, {"source": "b"})
    outer = nearest_project(tmp_path / "x")
    assert outer is not None and outer.settings == {"source": "a"}


def test_the_working_directory_is_where_the_search_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "[tool.gradscope.check]\nstrict = true\n")
    monkeypatch.chdir(tmp_path)
    found = nearest_project()
    assert found is not None and found.settings == {"check": {"strict": True}}
    assert str(found.path) == "pyproject.toml"
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    above = nearest_project()
    assert above is not None and above.path == tmp_path / "pyproject.toml"


def test_a_working_directory_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert nearest_project() is None


def test_a_directory_of_that_name_is_passed_over(tmp_path: Path) -> None:
    written(tmp_path, "[tool.gradscope]\nsource = 'a'\n")
    (tmp_path / "x" / "pyproject.toml").mkdir(parents=True)
    found = nearest_project(tmp_path / "x")
    assert found is not None and found.settings == {"source": "a"}


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", "[tool.ruff]\n", "[tool]\n", "[tool.gradscope]\n"])
def test_a_file_without_the_table_has_no_settings(tmp_path: Path, text: str) -> None:
    assert read_project(written(tmp_path, text)).settings == {}


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("[tool.gradscope]\nsource = \n", "2:10", "is no TOML: Invalid value"),
        ("[tool.gradscope\n", "1:16", "is no TOML: Expected ']'"),
        ("a = 1\na = 2\n", "2:", "is no TOML: Cannot overwrite a value"),
        ("\n\n  x y\n", "3:5", "is no TOML: Expected '='"),
        ("a = 'x", "1:7", "is no TOML"),
        ('a = """x\ny', "2:2", "is no TOML"),
        (b"a = 1\nb = '\xff'\n", "2:6", "is not UTF-8 (byte 0xff)"),
        ("\x00", "1:1", "is no TOML: Invalid statement"),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(tmp_path: Path, text: str | bytes, place: str, why: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(GradscopeError) as caught:
        nearest_project(tmp_path)
    assert caught.value.what.startswith(f"{path}:{place}")
    assert caught.value.why.startswith(why)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["tool = 3\n", "tool = [1]\n", "[tool]\ngradscope = 'x'\n", "[[tool.gradscope]]\n"])
def test_a_table_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(GradscopeError, match="must be a table"):
        read_project(written(tmp_path, text))


def test_nesting_without_end(tmp_path: Path) -> None:
    path = written(tmp_path, "a = " + "[" * 100_000)
    with pytest.raises(GradscopeError) as caught:
        read_project(path)
    assert caught.value.what.startswith(str(path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    os.truncate(path, 1 << 40)
    with pytest.raises(GradscopeError, match="larger than 16 MiB"):
        read_project(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="No such file or directory"):
        read_project(tmp_path / "pyproject.toml")


@given(st.binary(max_size=60))
@example(b"a = " + b"9" * 5000)
@example(b"[tool.gradscope]\r\nsource = 'x'\r\n")
def test_whatever_is_in_it_is_settings_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.getbasetemp() / "any project", content)
    try:
        assert isinstance(read_project(path).settings, dict)
    except GradscopeError as error:
        assert error.what.startswith(str(path))
        assert "\n" not in str(error)
