"""A file is there whole, or as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradscope.whole_file import whole_file


def test_what_was_there_stays_until_all_is_written(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(b"before")
    with whole_file(file) as out:
        out.write(b"after")
        out.flush()
        assert file.read_bytes() == b"before"
    assert file.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), whole_file(file) as out:
        out.write(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "result.json")
    with whole_file(link) as out:
        out.write(b"content")
    assert link.is_symlink()
    assert (tmp_path / "real" / "result.json").read_bytes() == b"content"


def test_no_directory_is_an_os_error_and_the_file_of_another_write_stays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "none" / "result.json"):
        pass
    other = tmp_path / f"result.json.{os.getpid()}.tmp"
    other.write_bytes(b"another's")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "result.json"):
        pass
    assert other.read_bytes() == b"another's"
