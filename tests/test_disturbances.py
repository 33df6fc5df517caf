"""What goes wrong around a command: a full disk, a folder that is closed, no home, other processes.

A clear error, nothing under a final name that is not whole, and the same command works afterwards.
"""

from __future__ import annotations

import ast
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from cactus_edge import files, flatbuffer
from cactus_edge.certify.partial import partial_of
from cactus_edge.cli import app, run
from cactus_edge.errors import OutputError
from cactus_edge.train.checkpoint import HISTORY_FILE, MODEL_FILE, STATE_FILE
from tests.test_architecture import SHIPPED, name_of
from tests.test_cli import call, digits_graph

NOBODY = 65534
WRITERS = {
    "certify": "certify MODEL --data DATA --levels 1 -o OUT",
    "radius": "radius MODEL --data DATA --largest 2 -o OUT",
    "attack": "attack MODEL --data DATA -n 1 --levels 1 --steps 2 --restarts 1 -o OUT",
    "sweep": "sweep MODEL --data DATA --levels 1 -o OUT",
    "faults": "faults MODEL --data DATA --bit 7 --layer last -o OUT",
    "twin": "twin MODEL -o OUT",
    "universalize": "universalize MODEL -o OUT",
    "export-c": "export-c MODEL -o OUT",
    "export-onnx": "export-onnx MODEL -o OUT",
    "sign": "sign --new-key OUT",
    "supported-ops": "supported-ops --write OUT",
    "convert": "convert ONNX --calibration DATA -o OUT",
    "verify": "verify MODEL QUERY --no-attack -o OUT",
    "merge": "merge CLAIM -o OUT",
    "report": "report CLAIM MODEL --data DATA -n 1 -o OUT",
}
ELSEWHERE = {"train", "search", "demo"}  # they write folders, piece by piece


@pytest.fixture(scope="module")
def place() -> Generator[Path]:
    """A folder that any user may enter, with a model and data."""
    folder = Path(tempfile.mkdtemp(prefix="cactus-edge-test-"))
    folder.chmod(0o755)
    flatbuffer.save(digits_graph(), folder / "model.tflite")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 8, 8, 1), np.uint8), np.arange(6)
    parts = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(folder / "data.npz", **parts)
    inputs = [f"(declare-const X_{i} Real) (assert (<= 0.5 X_{i} 0.5))" for i in range(64)]
    outputs = [f"(declare-const Y_{i} Real)" for i in range(10)]
    (folder / "query.vnnlib").write_text("\n".join([*inputs, *outputs, "(assert (<= Y_0 0))"]))
    assert run([*command(folder, "export-onnx", folder / "model.onnx"), "--float"]) == 0
    assert run(command(folder, "certify", folder / "claim.jsonl")) == 0
    yield folder
    shutil.rmtree(folder)


def command(place: Path, verb: str, output: Path) -> list[str]:
    named = {
        "MODEL": place / "model.tflite",
        "DATA": place / "data.npz",
        "ONNX": place / "model.onnx",
        "QUERY": place / "query.vnnlib",
        "CLAIM": place / "claim.jsonl",
        "OUT": output,
    }
    return [str(named.get(word, word)) for word in WRITERS[verb].split()]


@contextmanager
def full_disk(size: int) -> Generator[None]:
    """No file of this process can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_rights() -> Generator[None]:
    """As a user who owns nothing, where the tests run as one who may everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def owned_by_another(folder: Path) -> Generator[int]:
    """The number of a process that has taken the folder."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with files.owning(folder):
            os.write(writing, b"!")
            signal.pause()
    try:
        assert os.read(reading, 1) == b"!"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_every_verb_that_writes_is_disturbed() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    writing = {
        verb
        for verb, made in commands.items()
        if {"--output", "--write"} & {name for option in made.params for name in option.opts}
    }
    assert writing == {*WRITERS, *ELSEWHERE}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_full_disk_and_a_closed_folder(
    place: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    with full_disk(16):
        code, out, err = call(capsys, *command(place, verb, output))
    assert code == 2, err
    assert "cannot write (File too large)" in " ".join(err.split())
    assert "Traceback" not in out + err
    written = [name for name in below(tmp_path) if (tmp_path / name).is_file()]
    assert [name for name in written if name != "out.json.partial"] == []  # see --resume
    for name in written:
        (tmp_path / name).unlink()
    shutil.rmtree(output, ignore_errors=True)
    code, _, err = call(capsys, *command(place, verb, output))
    assert code in (0, 1), err  # 1 where a property of this model does not hold
    assert output.exists()
    assert not [name for name in below(tmp_path) if Path(name).name.startswith(".")]
    closed = place / f"closed-{verb}"
    closed.mkdir(mode=0o555)
    with without_rights():
        code, out, err = call(capsys, *command(place, verb, closed / "deep" / "out.json"))
    assert code == 2, err
    assert "cannot write" in err and "closed" in err
    assert "Traceback" not in out + err
    assert below(closed) == []


def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert call(capsys, *command(place, "certify", whole))[0] == 0
    expected = whole.read_bytes()
    lines = expected.splitlines(keepends=True)
    for size in (len(lines[0]) + 5, len(expected) // 2, len(expected) - 1):
        with full_disk(size):
            code, _, err = call(capsys, *command(place, "certify", output))
        assert code == 2 and "cannot write" in err
        assert not output.exists()
        resume = ["--resume"] if partial_of(output).exists() else []
        assert call(capsys, *command(place, "certify", output), *resume)[0] == 0
        assert output.read_bytes() == expected
        output.unlink()


def test_an_old_file_stays_where_the_new_one_does_not_fit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "twin.tflite"
    assert call(capsys, *command(place, "twin", output))[0] == 0
    before = output.read_bytes()
    with full_disk(len(before) - 1):
        code, _, err = call(capsys, *command(place, "twin", output), "--force")
    assert code == 2 and "cannot write" in err
    assert output.read_bytes() == before
    assert below(tmp_path) == ["twin.tflite"]


def test_a_user_without_a_home(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What needs no data set works; what does says what to set."""
    monkeypatch.delenv("CACTUS_EDGE_DATA", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    output = tmp_path / "out.jsonl"
    assert call(capsys, *command(place, "certify", output), "--quiet") == (0, "", "")
    arguments = ["certify", place / "model.tflite", "--data", "mnist", "--levels", 1, "-o"]
    code, _, err = call(capsys, *arguments, tmp_path / "other.jsonl")
    assert code == 2
    assert "no home folder; set CACTUS_EDGE_DATA" in " ".join(err.split())


RECIPE = """
threads = 1
[data]
name = "digits"
[network]
name = "mlp"
width = 0.25
[objective]
epsilon = 0.02
[compression]
members = [{ kind = "dense" }]
[optimizer]
epochs = 2
batch_size = 500
"""


def test_training_is_disturbed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, whole, parts = tmp_path / "recipe.toml", tmp_path / "whole", tmp_path / "parts"
    recipe.write_text(RECIPE)
    train = ["train", recipe, "--device", "cpu", "-o"]
    assert call(capsys, *train, whole)[0] == 0
    for size in (50, 1000, (whole / MODEL_FILE).stat().st_size + 1):
        with full_disk(size):
            code, out, err = call(capsys, *train, parts, "--resume")
        assert code == 2 and "cannot write (File too large)" in " ".join(err.split())
        assert "Traceback" not in out + err
        assert not any(Path(name).name.startswith(".") for name in below(parts))
    with owned_by_another(parts):
        code, _, err = call(capsys, *train, parts, "--resume")
    assert code == 2 and "another process is writing there" in " ".join(err.split())
    assert call(capsys, *train, parts, "--resume")[0] == 0
    for name in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    turned = tmp_path / "turned"
    code, out = TurningClock(tmp_path).run("-m", "cactus_edge", *train, turned)
    assert code == 0, out
    assert (whole / MODEL_FILE).read_bytes() == (turned / MODEL_FILE).read_bytes()
    closed = place / "closed-train"
    closed.mkdir(mode=0o555)
    with without_rights():
        code, out, err = call(capsys, *train, closed / "run")
    assert code == 2 and "Permission denied" in " ".join(err.split())
    assert "Traceback" not in out + err


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    """Also after its owner was killed."""
    with (
        files.owning(tmp_path),
        pytest.raises(OutputError, match="another process is writing there"),
        files.owning(tmp_path),
    ):
        pass
    folder = tmp_path / "new"
    with (
        owned_by_another(folder),
        pytest.raises(OutputError, match="another process"),
        files.owning(folder),
    ):
        pass
    with files.owning(folder):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used as a folder"):
        files.owning(tmp_path / "file").__enter__()


def test_of_two_that_write_one_file_one_wins(tmp_path: Path) -> None:
    """The other may not replace what was not there when it began."""
    path = tmp_path / "file"
    with (
        pytest.raises(OutputError, match="made by another process meanwhile; use --force"),
        files.writing(path) as slow,
    ):
        slow.write(b"slow")
        files.write(path, b"quick")
    assert path.read_bytes() == b"quick"
    with files.writing(path, force=True) as forced:
        forced.write(b"forced")
        files.write(path, b"quick", force=True)
    assert path.read_bytes() == b"forced"
    assert below(tmp_path) == ["file"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    files.write(tmp_path / "file", b"content", mode=0o600)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert below(tmp_path) == ["file"]


def wall_clocks(source: str) -> list[int]:
    """Lines that ask what time it is, instead of how long something took."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr)
            in {("time", name) for name in ("time", "time_ns", "localtime", "gmtime", "strftime")}
        )
        or (isinstance(node, ast.Import | ast.ImportFrom) and "datetime" in ast.unparse(node))
        or (isinstance(node, ast.ImportFrom) and node.module == "time")
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_no_result_depends_on_the_clock(path: Path) -> None:
    """So it may be set back at any time: durations are those of a clock that cannot be."""
    assert wall_clocks(path.read_text(encoding="utf-8")) == []


def test_wall_clocks_are_found() -> None:
    source = "import time\nimport datetime\na = time.time()\nb = time.monotonic()\n"
    assert wall_clocks(source) == [2, 3]
    assert wall_clocks("from time import time") == [1]


class TurningClock:
    """Runs commands for which it becomes a day earlier every tenth of a second."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        libfaketime = pytest.importorskip("libfaketime", reason="installed on Linux alone")
        preload = libfaketime.get_reload_information()[1]
        self._environment = {**os.environ, **preload, "FAKETIME_NO_CACHE": "1"}
        self._environment |= {"FAKETIME_TIMESTAMP_FILE": str(self._file)}
        self._environment |= {"DONT_FAKE_MONOTONIC": "1"}  # which nobody can set, either

    def run(self, *arguments: object) -> tuple[int, str]:
        """Python with these arguments: its exit code, and what it printed."""
        self._file.write_text("-0d")
        words = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(words, env=self._environment, **pipes)
        days = 0
        while True:
            try:
                printed, _ = process.communicate(timeout=0.1)
                return process.returncode, printed
            except subprocess.TimeoutExpired:
                days += 1
                files.write(self._file, f"-{days}d".encode(), force=True)


def test_the_clock_is_set_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = TurningClock(tmp_path)
    ask = "import time; a = time.time(); time.sleep(0.5); print(time.time() < a - 86000)"
    assert clock.run("-c", ask) == (0, "True\n")
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert call(capsys, *command(place, "certify", whole))[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    partial_of(parts).write_bytes(b"".join(lines[:3]))  # of a year ahead
    later = time.time() + 365 * 86400
    os.utime(partial_of(parts), (later, later))
    code, printed = clock.run("-m", "cactus_edge", *command(place, "certify", parts), "--resume")
    assert code == 0, printed
    assert parts.read_bytes() == whole.read_bytes()


def test_the_platform_is_one_that_these_tests_know() -> None:
    assert sys.platform.startswith(("linux", "darwin"))
