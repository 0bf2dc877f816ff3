"""Writing a trace: what is appended is on disk soon, whatever happens, and training is never disturbed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from trace_rows import described, row, write

from gradscope.trace.measurement import Bins, Measurement, PackedMeasurement
from gradscope.trace.reader import RankTrace
from gradscope.trace.writer import TraceWriter

GRADIENTS = [np.array([3.0, 4.0]), np.array([[1.0, 0.0]])]
SHAPES = {"a.weight": (2,), "a.bias": (1, 2)}


def steps_in(directory: Path) -> list[int]:
    return RankTrace.open(directory, 0).step.tolist()


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_rows_reach_the_disk_without_another_call(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "run.gradscope", described(SHAPES), flush_seconds=0.05)
    writer.append(row(0, GRADIENTS))
    assert wait_for(lambda: steps_in(tmp_path / "run.gradscope") == [0])
    writer.append(row(1, GRADIENTS))
    assert wait_for(lambda: steps_in(tmp_path / "run.gradscope") == [0, 1])
    writer.close()


def test_a_row_is_copied(tmp_path: Path) -> None:
    reused = row(0, GRADIENTS)
    writer = TraceWriter(tmp_path / "run.gradscope", described(SHAPES), flush_seconds=1e6)
    writer.append(reused)
    reused.measurement.sum_squares[:] = -1.0
    writer.close()
    assert RankTrace.open(tmp_path / "run.gradscope", 0).sum_squares.tolist() == [26.0]


@pytest.mark.parametrize("spectra", ["none", "group", "all"])
def test_a_packed_row_is_written_as_the_same_row_unpacked(tmp_path: Path, spectra: str) -> None:
    plain = row(0, GRADIENTS, spectra=spectra, weight_norm=np.array([5.0, 1.0]))
    packed = row(0, GRADIENTS, spectra=spectra, weight_norm=np.array([5.0, 1.0]))
    packed.measurement = in_one_piece(plain.measurement)
    for name, each in (("plain", plain), ("packed", packed)):
        write(tmp_path / name, described(SHAPES), [each, each])
    streams = [(tmp_path / name / "rank-00000.arrows").read_bytes() for name in ("plain", "packed")]
    assert streams[0] == streams[1]


def in_one_piece(m: Measurement) -> PackedMeasurement:
    nothing = Bins(np.zeros(0, np.uint16), np.zeros(0, np.uint32), np.zeros(0, np.float32), np.zeros(0, np.float32))
    group, tensors = m.group_bins or nothing, m.tensor_bins or nothing
    counts = np.zeros(0, np.int32) if m.tensor_bin_counts is None else m.tensor_bin_counts
    pieces = [m.sum_squares, m.max_abs, m.zeros, m.nan, m.inf]
    pieces += [part for bins in (group, tensors) for part in (bins.count, bins.mean, bins.spread)]
    pieces += [counts, group.code, tensors.code]
    spectra = 0 if m.group_bins is None else 1 if m.tensor_bins is None else 2
    data = b"".join(piece.tobytes() for piece in pieces)
    return PackedMeasurement(data, len(m.zeros), spectra, len(group.code), len(tensors.code))


def test_a_stream_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path / "run.gradscope", described(SHAPES), [row(0, GRADIENTS)])
    before = (tmp_path / "run.gradscope" / "rank-00000.arrows").read_bytes()
    with pytest.raises(FileExistsError):
        TraceWriter(tmp_path / "run.gradscope", described(SHAPES))
    assert (tmp_path / "run.gradscope" / "rank-00000.arrows").read_bytes() == before


def test_metadata_is_on_disk_before_the_rows_that_need_it(tmp_path: Path) -> None:
    metadata = described(SHAPES)
    writer = TraceWriter(tmp_path / "run.gradscope", metadata, flush_seconds=1e6)
    metadata.groups.append(type(metadata.groups[0])("later", [1]))
    writer.metadata_changed()
    writer.append(row(0, GRADIENTS[1:], group=1))
    writer.flush()
    opened = RankTrace.open(tmp_path / "run.gradscope", 0)
    assert opened.metadata.groups[opened.group[0]].name == "later"
    writer.close()


def test_close_writes_the_metadata_as_it_is_then(tmp_path: Path) -> None:
    metadata = described(SHAPES, ended=None)
    writer = TraceWriter(tmp_path / "run.gradscope", metadata)
    metadata.ended = 5.0
    writer.close()
    writer.close()
    assert RankTrace.open(tmp_path / "run.gradscope", 0).metadata.ended == 5.0
    assert [p.name for p in sorted((tmp_path / "run.gradscope").iterdir())] == ["rank-00000.arrows", "trace.json"]


def test_after_close_rows_are_ignored(tmp_path: Path) -> None:
    directory = write(tmp_path / "run.gradscope", described(SHAPES), [row(0, GRADIENTS)])
    writer = TraceWriter(tmp_path / "other.gradscope", described(SHAPES))
    writer.close()
    writer.append(row(1, GRADIENTS))
    writer.flush()
    assert steps_in(tmp_path / "other.gradscope") == []
    assert steps_in(directory) == [0]


def test_threads_may_append_at_once(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "run.gradscope", described(SHAPES), flush_seconds=0.001)

    def append() -> None:
        for _ in range(300):
            writer.append(row(7, GRADIENTS))

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    opened = RankTrace.open(tmp_path / "run.gradscope", 0)
    assert len(opened.step) == 1200
    assert set(opened.sum_squares.tolist()) == {26.0}


def test_a_deleted_trace_stops_recording_and_is_not_revived(tmp_path: Path) -> None:
    directory = tmp_path / "run.gradscope"
    writer = TraceWriter(directory, described(SHAPES), flush_seconds=1e6)
    shutil.rmtree(directory)
    write(directory, described(SHAPES, run="another"), [row(9, GRADIENTS)])
    writer.append(row(0, GRADIENTS))
    writer.close()
    assert writer.error == "it was deleted"
    assert RankTrace.open(directory, 0).metadata.run == "another"
    assert steps_in(directory) == [9]


@pytest.mark.parametrize("broken", ["missing", "file"])
def test_an_impossible_directory(tmp_path: Path, broken: str) -> None:
    place = tmp_path / "nowhere" / "run.gradscope" if broken == "missing" else tmp_path / "file"
    if broken == "file":
        place.write_text("mine")
    with pytest.raises(OSError, match=r"exists|No such file"):
        TraceWriter(place, described(SHAPES))


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    # Root may write anywhere, but not even root into /proc.
    del tmp_path
    with pytest.raises(OSError):
        TraceWriter(Path("/proc/run.gradscope"), described(SHAPES))


PRELUDE = """
import sys, os, time
from pathlib import Path
import numpy as np
from gradscope.trace.writer import TraceWriter
from trace_rows import described, row
G = [np.array([3.0, 4.0])]
S = {"w": (2,)}
"""


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *arguments],
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_full_disk_stops_recording_and_leaves_what_was_written(tmp_path: Path) -> None:
    # The limit on the size of a file fails a write half-way, as a full disk does.
    done = run_script(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        writer = TraceWriter(Path(sys.argv[1]), described(S), flush_seconds=1e6)
        for step in range(4000):
            writer.append(row(step, G))
            if step % 50 == 49:
                writer.flush()
        writer.close()
        print(writer.error)
        """,
        str(tmp_path / "run.gradscope"),
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "File too large"
    opened = RankTrace.open(tmp_path / "run.gradscope", 0)
    assert opened.stream.dropped == 0
    assert 50 <= len(opened.step) < 4000
    assert opened.step.tolist() == list(range(len(opened.step)))


def test_a_disk_that_stands_still_stops_recording_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradscope.trace.writer.MOST_PENDING_BYTES", 1 << 20)
    writer = TraceWriter(tmp_path / "run.gradscope", described(SHAPES), flush_seconds=1e6)
    writer.append(row(0, GRADIENTS))
    writer.flush()
    # What a write that does not return leaves behind.
    with writer._flushing:
        rows = 0
        while writer.error is None and rows < 20_000:
            rows += 1
            writer.append(row(rows, GRADIENTS))
    writer.close()
    assert writer.error == "the disk is too slow: 1 MiB wait to be written"
    assert 1000 < rows < 20_000
    assert steps_in(tmp_path / "run.gradscope") == [0]


@pytest.mark.parametrize("reused", [False, True])
def test_a_program_that_closes_all_descriptors_keeps_its_own_files(tmp_path: Path, reused: bool) -> None:
    done = run_script(
        """
        import os
        writer = TraceWriter(Path(sys.argv[1]), described(S), flush_seconds=1e6)
        writer.append(row(0, G))
        writer.flush()
        os.closerange(3, 200)
        files = [os.open(f"{sys.argv[1]}-{i}", os.O_CREAT | os.O_WRONLY) for i in range(50 if sys.argv[2] else 0)]
        for file in files:
            os.write(file, b"mine")
        writer.append(row(1, G))
        writer.flush()
        print(writer.error)
        writer.close()
        for file in files:
            os.close(file)
        """,
        str(tmp_path / "run.gradscope"),
        "reused" if reused else "",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "the program has closed its file descriptor"
    files = list(tmp_path.glob("run.gradscope-*"))
    assert len(files) == (50 if reused else 0)
    assert {path.read_bytes() for path in files} <= {b"mine"}
    assert steps_in(tmp_path / "run.gradscope") == [0]


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    done = run_script(
        """
        writer = TraceWriter(Path(sys.argv[1]), described(S), flush_seconds=0.01)
        writer.append(row(0, G))
        child = os.fork()
        for step in range(1, 200):
            writer.append(row(step, G))
            time.sleep(0.0005)
        writer.close()
        if child == 0:
            sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), writer.error)
        """,
        str(tmp_path / "run.gradscope"),
    )
    assert done.stdout.strip() == "3 None"
    assert steps_in(tmp_path / "run.gradscope") == list(range(200))


def test_the_end_of_the_interpreter_closes_the_stream(tmp_path: Path) -> None:
    done = run_script(
        """
        writer = TraceWriter(Path(sys.argv[1]), described(S), flush_seconds=1e6)
        for step in range(10):
            writer.append(row(step, G))
        raise SystemExit(5)
        """,
        str(tmp_path / "run.gradscope"),
    )
    assert done.returncode == 5
    opened = RankTrace.open(tmp_path / "run.gradscope", 0)
    assert opened.stream.ended
    assert opened.step.tolist() == list(range(10))


def test_a_row_for_a_small_policy_stays_within_4_kib(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {
        f"layer{i}.weight": (n,) for i, n in enumerate([256, 64, 4096, 64, 128, 2, 256, 64, 4096, 64, 64, 1, 600])
    }
    gradients = [random.normal(size=shape) * 10.0 ** random.uniform(-4, 0) for shape in shapes.values()]
    rows = [row(step, gradients, spectra="all" if step % 10 == 0 else "group") for step in range(200)]
    directory = write(tmp_path / "run.gradscope", described(shapes), rows, flush_every=100)
    assert (directory / "rank-00000.arrows").stat().st_size / 200 <= 4096
