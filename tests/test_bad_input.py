"""Unusable input ends in one clear line: never a traceback, a hang or a full memory."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import socket
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.errors import GradscopeError
from gradscope.sources import open_source


def failure(source: Any, **options: Any) -> GradscopeError:
    """The error of opening and reading ``source``: one line."""
    with pytest.raises(GradscopeError) as caught:
        opened = open_source(source, **options)
        list(opened.read_steps(range(opened.info.steps)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


def test_a_missing_file(tmp_path: Path) -> None:
    assert failure(tmp_path / "none.pt").why == "no such file or directory"
    assert failure(str(tmp_path / "none*.pt")).why == "matches no file"
    assert failure([tmp_path / "none.pt", tmp_path / "none2.pt"]).why == "no such file or directory"
    assert failure(tmp_path / "no" / "such" / "folder").why == "no such file or directory"


def test_a_file_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert failure(tmp_path / "file" / "below").why == "no such file or directory"


def test_odd_names(tmp_path: Path) -> None:
    assert failure(tmp_path / ("x" * 300)).why == "the name is too long"
    assert "null" in failure("a\0b").why
    failure("")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    assert failure(tmp_path / "empty.pt").why == "is empty"


def test_a_pipe_never_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    assert failure(tmp_path / "pipe.pt").why == "is not a regular file"
    assert "no gradient files" in failure(tmp_path).why


def test_devices_and_sockets(tmp_path: Path) -> None:
    assert failure("/dev/zero").why == "is not a regular file"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        failure(tmp_path / "s")


def test_links_that_lead_nowhere_or_round_and_round(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert failure(tmp_path / "loop").why == "too many levels of symbolic links"
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert failure(tmp_path / "gone").why == "no such file or directory"


def test_a_directory_that_holds_itself(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to(tmp_path)
    assert "no gradient files" in failure(tmp_path).why


def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "secret.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    own = os.geteuid()
    # Root may read everything, so it becomes nobody for a moment.
    os.seteuid(own or 65534)
    try:
        assert failure(path).why == "permission denied"
    finally:
        os.seteuid(own)


FORMATS: dict[str, tuple[bytes, str]] = {
    "text": (b"hello world\n", "no format that gradscope reads"),
    "binary": (bytes(range(256)) * 10, "no format that gradscope reads"),
    "zeros": (bytes(1000), "no format that gradscope reads"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), "no format that gradscope reads"),
    "prose": (b"One, two,\nthree.\n", "no format that gradscope reads"),
    "blank lines": (b"\n\n\n", "no format that gradscope reads"),
    "zip": (b"PK\x05\x06" + bytes(18), "without tensors"),
    "half a zip": (b"PK\x03\x04" + bytes(100), "truncated zip"),
    "pickle of nothing": (b"\x80\x04N.", "no floating-point tensors"),
    "pickled model": (
        b"\x80\x04c__main__\nModel\n)R}(X\x01\x00\x00\x00aK\x01ub.",
        "an object of the class __main__.Model, not a mapping",
    ),
    "text pickle": (b"cos\nsystem\n(S'true'\ntR.", "an object of the class os.system"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    content, message = FORMATS[name]
    (tmp_path / "file").write_bytes(content)
    assert message in failure(tmp_path / "file").why


def test_a_trace_without_files(tmp_path: Path) -> None:
    (tmp_path / "run.gradscope").mkdir()
    assert "is no complete gradscope trace" in failure(tmp_path / "run.gradscope").why


@pytest.mark.parametrize("as_", ["grad", "", "WEIGHTS"])
def test_an_unknown_kind(as_: str) -> None:
    assert failure({"w": np.ones(2)}, as_=as_).why == "must be gradients or weights"


@pytest.mark.parametrize("source", [{}, [], (), 5, None, {"w": "text"}, {"w": np.array(["a"])}, object()])
def test_objects_without_tensors(source: Any) -> None:
    assert "no floating-point tensors" in failure(source).why


@pytest.mark.parametrize("source", [{}, 5, None, object(), (part for part in ["w"])])
def test_what_else_could_be_given(source: Any) -> None:
    assert "a mapping of names" in str(failure(source).hint)


def test_objects_that_hold_themselves() -> None:
    cycle: dict[str, Any] = {"w": np.ones(2)}
    cycle["self"] = cycle
    failure(cycle)


def test_an_old_tar_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    assert "torch.load(weights_only=True) refuses it: it is damaged" in failure(tmp_path / "old.pt").why


def test_an_old_file_with_an_object_names_its_class(tmp_path: Path) -> None:
    saved = {"w": torch.ones(2), "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    why = failure(tmp_path / "old.pt").why
    assert why.endswith("refuses it: it holds argparse.Namespace, which is no tensor and no plain container")
    assert why.isprintable()


def test_a_zip_within_zips(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deeper.pt", b"PK\x03\x04")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("policy.pth", inner.getvalue())
    assert "policy.pth: is a zip file without tensors" in str(failure(tmp_path / "outer.zip"))


def test_members_that_name_other_places_are_never_written(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"w": torch.ones(2)}, inner)
    (tmp_path / "sub").mkdir()
    with zipfile.ZipFile(tmp_path / "sub" / "evil.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../escaped.pth", inner.getvalue())
        archive.writestr("/tmp/escaped.pth", inner.getvalue())
    open_source(tmp_path / "sub" / "evil.zip")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.zip", "sub"]


def test_a_huge_sparse_file_of_garbage(tmp_path: Path) -> None:
    for head in (
        b"\x80\x04",
        b"\x80\x04\x8d\xff\xff\xff\xff\x01\x00\x00\x00",
        b"\xff\xff\xff\xff\x00\x00\x00\x00{",
        b"PK\x03\x04",
        b"(lp0\n",
    ):
        with open(tmp_path / "huge", "wb") as file:
            file.write(head)
            file.truncate(1 << 36)
        tracemalloc.start()
        failure(tmp_path / "huge")
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
        tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "g.safetensors")
    source = open_source(tmp_path / "g.safetensors")
    with open(tmp_path / "g.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(GradscopeError, match=r"g\.safetensors"):
        list(source.read_steps(range(1)))


# --- damage ----------------------------------------------------------------------------------------------------------


def checkpoint() -> Any:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}


def write_pt(path: Path) -> None:
    torch.save({"w": torch.randn(3, 2), "b": torch.randn(2).bfloat16(), "n": torch.tensor(5)}, path)


def write_checkpoint(path: Path) -> None:
    torch.save(checkpoint(), path)


def write_legacy(path: Path) -> None:
    torch.save({"w": torch.randn(3, 2)}, path, _use_new_zipfile_serialization=False)


def write_deflated(path: Path) -> None:
    content = io.BytesIO()
    torch.save({"w": torch.randn(3, 2)}, content)
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))


def write_sb3_like(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"max_grad_norm": 0.5, "num_timesteps": 5}))
        for name, value in (("policy.pth", checkpoint()["model"]), ("policy.optimizer.pth", checkpoint()["optimizer"])):
            content = io.BytesIO()
            torch.save(value, content)
            archive.writestr(name, content.getvalue())
        archive.writestr("_stable_baselines3_version", "2.9.2")


def use(path: Path) -> None:
    source = open_source(path)
    if source.tensors:
        list(source.read_steps(range(source.info.steps)))
    source.weights()
    source.optimizers()


WRITERS: list[Callable[[Path], None]] = [write_pt, write_checkpoint, write_legacy, write_deflated, write_sb3_like]


@pytest.mark.parametrize("write", WRITERS)
def test_flipped_bytes(tmp_path: Path, write: Callable[[Path], None]) -> None:
    torch.manual_seed(0)
    write(tmp_path / "whole")
    use(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    generator = random.Random(3)
    # Padding and tensor elements take most of the bytes: aim at what is neither.
    places = [index for index, byte in enumerate(content) if byte not in b"\0Z"]
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 4))):
            damaged[generator.choice(places)] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            use(tmp_path / "damaged")
        except GradscopeError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("write", WRITERS)
def test_truncated(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(GradscopeError):
            use(tmp_path / "cut")
