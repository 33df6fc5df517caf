"""One certificate, however the work was divided, interrupted or lost on the way."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, flatbuffer
from cactus_edge.certificate import Bounds, Sample, line_of
from cactus_edge.certificate_stream import Reader, load, write
from cactus_edge.certify import Request, certify, merge, parallel, tasks
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.partial import partial_of, recover
from cactus_edge.certify.shards import shard
from cactus_edge.cli import run
from cactus_edge.datasets import Dataset, mapped
from cactus_edge.datasets import load as load_data
from cactus_edge.errors import DataError, MissingExtraError, OutputError, ToolError, UsageError
from cactus_edge.inputs import Perturbation
from tests.certificates import checked
from tests.graphs import random_graph
from tests.test_cli import digits_graph

COUNT = 16


def made_up(count: int) -> Request:
    """A model under several profiles and data labelled at random."""
    rng = np.random.default_rng(3)
    graph = random_graph(rng, shape=(1, 3, 3, 1), depth=2, classes=3, universal=False)
    images = rng.random((count, *graph.tensors[graph.input].shape[1:]), dtype=np.float32)
    data = Dataset("made-up", images, rng.integers(0, 3, count), 3, "test", "5e" * 32)
    models = (("model.tflite", flatbuffer.write_tflite(graph)),)
    return Request(data, Perturbation.levels(2), models=models)


def content_of(request: Request) -> bytes:
    stream = BytesIO()
    certify(request, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def request_() -> Request:
    return made_up(COUNT)


@pytest.fixture(scope="module")
def whole(request_: Request) -> bytes:
    """The certificate of an undisturbed run; it has verdicts of several kinds, and it is true."""
    content = content_of(request_)
    result = checked(content, request_.models[0][1], request_.data)
    assert result.problems == ()
    verdicts = Reader(BytesIO(content), "whole").samples()
    assert {"certified", "refuted"} <= {sample.verdict for sample in verdicts}
    return content


# ---------------------------------------------------------------- dividing the work
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_show(request_: Request, whole: bytes, chunk: int) -> None:
    assert content_of(replace(request_, chunk=chunk)) == whole


@pytest.mark.parametrize(("jobs", "chunk"), [(1, None), (3, 1)])
def test_processes_do_not_show(
    request_: Request, whole: bytes, jobs: int, chunk: int | None
) -> None:
    assert content_of(replace(request_, jobs=jobs, chunk=chunk)) == whole


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_shards_make_the_whole(request_: Request, whole: bytes, parts: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jsonl" for i in range(parts)]
    for i, path in enumerate(paths):
        certify(replace(request_, shard=(i + 1, parts)), path)
        result = checked(path.read_bytes(), request_.models[0][1], request_.data)
        assert result.agrees, "a shard is a certificate of its own"
    output = tmp_path / "whole.jsonl"
    told: list[tuple[int, int]] = []
    merged = merge(paths[::-1], output, progress=lambda *state: told.append(state))
    assert told[-1] == (merged.head.data.count, merged.head.data.count)  # type: ignore[union-attr]
    assert output.read_bytes() == whole
    assert merged.summary == load(output).tail.summary


def test_shards_cover_every_sample_once() -> None:
    for count in (1, 5, 40, 10_000):
        for parts in range(1, min(count, 13) + 1):
            ranges = [shard(7, count, (i + 1, parts)) for i in range(parts)]
            assert [i for first, n in ranges for i in range(first, first + n)] == list(
                range(7, 7 + count)
            )
            sizes = [n for _, n in ranges]
            assert max(sizes) - min(sizes) <= 1
    for part in ((0, 3), (4, 3), (1, 0), (-1, -1)):
        with pytest.raises(UsageError, match="i/n"):
            shard(0, 10, part)
    with pytest.raises(UsageError, match="empty"):
        shard(0, 2, (1, 3))


def test_shards_that_do_not_fit(request_: Request, tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{i}.jsonl" for i in range(3))
    for i, path in enumerate((one, two, three)):
        certify(replace(request_, shard=(i + 1, 3)), path)
    output = tmp_path / "whole.jsonl"
    with pytest.raises(DataError, match=r"begins at sample 10, expected 5"):
        merge([one, three], output)
    with pytest.raises(DataError, match="expected 5"):
        merge([one, one], output)
    other = tmp_path / "other.jsonl"
    certify(replace(request_, shard=(2, 3), perturbation=Perturbation.levels(3)), other)
    with pytest.raises(DataError, match="another claim"):
        merge([one, other, three], output)
    lines = two.read_bytes().splitlines(keepends=True)
    for damaged, message in (
        (lines[:-1], "has no end"),
        ([*lines[:3], *lines[4:]], "holds sample"),
        ([*lines[:3], lines[4], lines[3], *lines[5:]], "holds sample"),
        ([*lines[:-1], three.read_bytes().splitlines(keepends=True)[-1]], "digest"),
        ([*lines, b"\n"], "something follows"),
    ):
        two.write_bytes(b"".join(damaged))
        with pytest.raises(DataError, match=message):
            merge([one, two, three], output)
        assert not output.exists()
    with pytest.raises(UsageError, match="no such certificate"):
        merge([tmp_path / "nowhere"], output)


# ---------------------------------------------------------------- streams
def many(count: int) -> Iterator[Sample]:
    for i in range(count):
        bounds = tuple(Bounds((i % 100,) * 10, (i % 100 + 9,) * 10) for _ in range(3))
        yield Sample(i, i % 10, i % 7, "unknown", "elided-margin", bounds)


OURS = str(Path(certificate.__file__).parent / "*")
KERNELS = str(Path(certificate.__file__).parent / "kernels" / "*")


def peak(action: object) -> int:
    """Bytes that were held at once, beyond those before."""
    tracemalloc.start()
    try:
        action()  # type: ignore[operator]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_streams_take_constant_memory(whole: bytes, tmp_path: Path) -> None:
    head = certificate.head_of(whole.splitlines(keepends=True)[0])
    path = tmp_path / "many.jsonl"

    def writing() -> None:
        with path.open("wb") as stream:
            write(stream, head, many(10_000))

    def reading() -> None:
        with path.open("rb") as stream:
            reader = Reader(stream, "many")
            assert sum(1 for _ in reader.samples()) == 10_000
            assert reader.problems() == []

    assert peak(writing) < 1 << 20 < path.stat().st_size / 2
    assert peak(reading) < 1 << 20


def test_certifying_takes_constant_memory() -> None:
    """Ten chunks alike: behind each of them as much is held as behind the third."""

    class Sink(BytesIO):
        def write(self, line: object, /) -> int:
            return len(line)  # type: ignore[arg-type]

    held: list[int] = []

    def progress(_done: int, _total: int) -> None:
        gc.collect()
        # Threads that other tests have left allocate, too; and a thread that first gets boxes of
        # some label makes the workspace for them, at any time.
        chosen = [tracemalloc.Filter(True, OURS), tracemalloc.Filter(False, KERNELS)]
        ours = tracemalloc.take_snapshot().filter_traces(chosen)
        held.append(sum(found.size for found in ours.statistics("filename")))

    part = made_up(50)
    images, labels = (np.concatenate([x] * 10) for x in (part.data.images, part.data.labels))
    images.flags.writeable = False
    request = replace(part, data=replace(part.data, images=images, labels=labels), chunk=50)
    peak(lambda: certify(request, Sink(), progress=progress))
    assert len(held) == 10
    a_line = 200  # bytes, less than any takes
    assert held[-1] - held[2] < 7 * 50 * a_line, held


def test_a_file_that_is_changed_meanwhile(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples stay in the file; nothing is certified of other ones than the claim names."""
    monkeypatch.setattr(mapped, "LEAST", 0)
    path, output = tmp_path / "own.npz", tmp_path / "own.jsonl"
    images, labels = request_.data.images, request_.data.labels
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    request = replace(request_, data=load_data(path, "test"))
    assert content_of(request).splitlines()[1:-1] == content_of(request_).splitlines()[1:-1]

    def change(_done: int, _total: int) -> None:
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(content.rindex(images.tobytes()))
            file.write(images[::-1].tobytes())

    with pytest.raises(DataError, match="its file was changed while"):
        certify(request, output, progress=change)
    assert list(tmp_path.iterdir()) == [path]  # nothing to go on with, should the file be mended


def test_lines_of_hostile_size(whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines(keepends=True)
    long = b'{"index":0,"message":"' + b"x" * certificate.LINE_LIMIT + b'"}\n'
    for content in (long, lines[0] + long, b"".join(lines[:-1]) + b'{"summary":' + long):
        path = tmp_path / "long.jsonl"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"longer than {certificate.LINE_LIMIT}"):
            load(path)


def test_files_that_are_cut_off(whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    short = b"".join([*lines[:3], lines[-1]])
    for end in range(len(short)):
        with pytest.raises(DataError, match="cut off|has no end|not a certificate"):
            _ = [*Reader(BytesIO(short[:end]), "short").samples()]
    with pytest.raises(DataError, match="something follows"):
        _ = [*Reader(BytesIO(whole + b" "), "long").samples()]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b":", b": ", 1),
        lambda line: line.replace(b'{"', b'{"label":1,"', 1),
        lambda line: line[:-2] + b',"more":1}\n',
        lambda line: line[:-2] + b',"index":1}\n',
        lambda line: line[:-2] + b"\n",
        lambda line: line.replace(b'"verdict":"', b'"verdict":"very '),
    ],
)
@pytest.mark.parametrize("number", [0, 2, -1])
def test_lines_that_are_not_canonical(whole: bytes, change: object, number: int) -> None:
    lines = whole.splitlines(keepends=True)
    changed = change(lines[number])  # type: ignore[operator]
    if changed == lines[number]:
        return
    lines[number] = changed
    with pytest.raises(DataError):
        _ = [*Reader(BytesIO(b"".join(lines)), "changed").samples()]


# ---------------------------------------------------------------- resuming
def test_resuming_at_every_byte(tmp_path: Path) -> None:
    """Whatever was written when the power went, the finished file has the same bytes."""
    request = replace(made_up(3), profiles=("tflite-micro",))
    content = content_of(request)
    head = certificate.head_of(content.splitlines(keepends=True)[0])
    samples = content.splitlines(keepends=True)[1:-1]
    boundaries = {0, 1}
    for end in range(len(content) + 1):
        if content[end - 1 : end] == b"\n":
            boundaries |= {end - 1, end, end + 1}
        stream = BytesIO(content[:end])
        writer = recover(stream, head, "torn")
        for line in samples[writer.tally.samples :]:
            writer.append(line)
        writer.finish()
        assert stream.getvalue() == content, end
    output = tmp_path / "certificate.jsonl"
    for end in sorted(boundaries | set(range(0, len(content), 1009))):
        partial_of(output).write_bytes(content[:end])
        certify(request, output, resume=True, force=True)
        assert output.read_bytes() == content, end
        assert not partial_of(output).exists()


def test_resuming_with_other_divisions(request_: Request, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "certificate.jsonl"
    partial_of(output).write_bytes(whole[: len(whole) // 2])
    done: list[int] = []
    certify(
        replace(request_, jobs=2, chunk=4),
        output,
        resume=True,
        progress=lambda now, total: done.append(now),
    )
    assert output.read_bytes() == whole
    assert done[0] == whole[: len(whole) // 2].count(b"\n") - 1
    assert (done[-1], done == sorted(done)) == (COUNT, True)


def test_nothing_is_resumed_that_is_something_else(
    request_: Request, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "certificate.jsonl"
    partial = partial_of(output)
    lines = whole.splitlines(keepends=True)

    def attempt(content: bytes, message: str, request: Request = request_) -> None:
        partial.write_bytes(content)
        with pytest.raises(DataError, match=message):
            certify(request, output, resume=True)
        assert partial.read_bytes() == content
        assert not output.exists()

    half = b"".join(lines[:8])
    attempt(half, "other arguments", replace(request_, perturbation=Perturbation.levels(1)))
    attempt(half, "other arguments", replace(request_, first=1))
    attempt(half, "other arguments", replace(request_, method="linear"))
    attempt(half, "other arguments", replace(request_, models=(("b", request_.models[0][1]),)))
    attempt(b"precious\n", "other arguments")
    attempt(b"precious", "other arguments")
    attempt(b"".join([*lines[:3], *lines[4:9]]), "line 4 is sample 3, expected 2")
    attempt(b"".join([*lines[:3], b"\0\0\0\n", *lines[4:9]]), "line 4: not a certificate's sample")
    attempt(b"".join([*lines[:-1], lines[-2]]), "is sample 15, expected 16")
    partial.write_bytes(half)
    with pytest.raises(OutputError, match="--force"):
        certify(request_, output)
    certify(request_, output, force=True)
    assert output.read_bytes() == whole
    certify(request_, tmp_path / "fresh.jsonl", resume=True)  # with nothing to resume
    assert (tmp_path / "fresh.jsonl").read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
@pytest.mark.parametrize("how", ["resume", "force"])
def test_two_processes_never_write_one_file(
    request_: Request, whole: bytes, tmp_path: Path, how: str
) -> None:
    import fcntl

    output = tmp_path / "certificate.jsonl"
    half = whole[: len(whole) // 2]
    partial_of(output).write_bytes(half)
    with partial_of(output).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is writing it"):
            certify(request_, output, resume=how == "resume", force=how == "force")
    assert partial_of(output).read_bytes() == half
    certify(request_, output, resume=how == "resume", force=how == "force")
    assert output.read_bytes() == whole


def test_a_run_that_never_began_leaves_nothing(request_: Request, tmp_path: Path) -> None:
    output = tmp_path / "certificate.jsonl"
    for changes in (
        {"first": COUNT},
        {"profiles": ("nobody",)},
        {"models": ()},
        {"shard": (3, 2)},
        {"jobs": 0},
        {"jobs": 2, "dask": "tcp://127.0.0.1:1"},
        {"chunk": 0},
        {"budget": 0},
    ):
        with pytest.raises(UsageError):
            certify(replace(request_, **changes), output)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- processes and clusters
def test_an_engine_takes_the_threads_of_its_plan(request_: Request) -> None:
    plan = tasks.Plan(request_.models, None, request_.perturbation, None, Effort(), threads=1)
    engines = tasks.built(plan)._engines
    assert {s.threads for engine in engines for s in (engine.intervals, engine.plain)} == {1}


@pytest.mark.parametrize(("module", "option"), [("joblib", "--jobs"), ("distributed", "--dask")])
def test_missing_packages_are_named(
    request_: Request, monkeypatch: pytest.MonkeyPatch, module: str, option: str
) -> None:
    for name in (module, f"{module}.externals"):
        monkeypatch.setitem(sys.modules, name, None)
    more = {"jobs": 2} if option == "--jobs" else {"dask": "tcp://127.0.0.1:1"}
    with pytest.raises(MissingExtraError, match=rf"{option} .*pip install 'cactus-edge\[verify\]'"):
        certify(replace(request_, **more), BytesIO())  # type: ignore[arg-type]
    assert content_of(request_), "one process needs none of them"


@pytest.mark.filterwarnings("default")
def test_a_killed_dask_worker_costs_nothing(
    request_: Request, whole: bytes, tmp_path: Path
) -> None:
    """Two real processes; one is killed half way. Every sample is there once."""
    from distributed import Client, LocalCluster

    killed: list[int] = []
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=str(tmp_path),
        ) as cluster,
        Client(cluster) as client,
    ):
        started = client.run(os.getpid)
        assert len(set(started.values())) == 2

        def progress(done: int, total: int) -> None:
            if done >= total // 2 and not killed:
                killed.append(next(iter(started.values())))
                os.kill(killed[0], signal.SIGKILL)

        output = tmp_path / "certificate.jsonl"
        request = replace(request_, dask=cluster.scheduler_address, chunk=1)
        certify(request, output, progress=progress)
        assert killed
        assert killed[0] not in client.run(os.getpid).values()
    assert output.read_bytes() == whole
    assert [sample.index for sample in load(output).samples] == list(range(COUNT))


@pytest.mark.filterwarnings("default")
def test_a_scheduler_that_does_not_answer(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_CONNECT_SECONDS", 1)
    with pytest.raises(ToolError, match="no Dask scheduler answers"):
        certify(replace(request_, dask="tcp://127.0.0.1:9"), BytesIO())


# ---------------------------------------------------------------- the command line
@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a data set of 60 samples."""
    model, data = tmp_path / "model.tflite", tmp_path / "data.npz"
    flatbuffer.save(digits_graph(), model)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 10, len(images))
    np.savez(data, x_train=images[:9], y_train=labels[:9], x_test=images, y_test=labels)
    return model, data


PROGRAM = """
import sys, time
from importlib import import_module
from cactus_edge.certify import tasks
from cactus_edge.cli import main

true = tasks.run

def slow(task):
    time.sleep(60 if task.first else 0)
    return true(task)

tasks.run = slow
import_module("cactus_edge.certify.run").CHUNK = 7
main()
"""
"""The command, which comes no further than its first seven samples before it is stopped."""


@pytest.mark.parametrize("jobs", [(), ("--jobs", "2")], ids=["alone", "jobs"])
def test_interrupted_and_resumed(
    files: tuple[Path, Path], tmp_path: Path, jobs: tuple[str, ...]
) -> None:
    """Ctrl-C, which a terminal sends to all processes of the command, leaves what is done."""
    model, data = files
    output = tmp_path / "certificate.jsonl"
    command = ["certify", str(model), "--data", str(data), "--levels", "1", "-o", str(output)]
    partial = partial_of(output)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command, *jobs],
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as started:
        while not (partial.exists() and partial.read_bytes().count(b"\n") == 8):
            assert started.poll() is None, "the run ended too early to be stopped"
            time.sleep(0.01)
        os.killpg(started.pid, signal.SIGINT)
        _, message = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "--resume" in message
    assert "Traceback" not in message
    assert not output.exists()
    assert partial.read_bytes().count(b"\n") == 8
    assert run([*command, "--resume"]) == 0
    reference = tmp_path / "reference.jsonl"
    assert run([*command[:-1], str(reference)]) == 0
    assert output.read_bytes() == reference.read_bytes()


def test_shards_and_several_models(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    other = tmp_path / "other.tflite"
    flatbuffer.save(digits_graph(1), other)
    common = ["certify", model, other, "--data", data, "--levels", "1", "-n", "12"]

    def call(*arguments: object) -> int:
        return run([str(argument) for argument in arguments])

    parts = [tmp_path / f"{i}.jsonl" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert call(*common, "--shard", f"{i}/2", "-o", part) == 0
    whole, merged = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl"
    assert call(*common, "-o", whole) == 0
    assert call("merge", *parts, "-o", merged, "--json") == 0
    assert merged.read_bytes() == whole.read_bytes()
    assert call("check", whole, model, other, "--data", data) == 0
    assert call("check", whole, model, other, "--data", data, "--jobs", 2) == 0
    assert call("check", whole, other, model, "--data", data) == 1
    capsys.readouterr()
    for option, value, message in (
        ("--shard", "2", "i/n"),
        ("--shard", "3/2", "i/n"),
        ("--method", "magic", "known: interval, linear, complete"),
        ("--memory", "much", "K, M or G"),
        ("--budget", "0", "above 0"),
        ("--budget", "nan", "above 0"),
        ("--budget", "inf", "finite"),
        ("--jobs", "0", "at least 1"),
    ):
        searching = ("--method", "complete") if option in ("--memory", "--budget") else ()
        assert call(*common, *searching, option, value, "-o", tmp_path / "none.jsonl") == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_the_head_states_how_hard_was_searched(request_: Request) -> None:
    """So that a run is resumed, and shards are joined, with the same settings alone."""
    request = replace(request_, count=1, method="linear", budget=0.5, memory=1 << 20)
    head = Reader(BytesIO(content_of(request)), "head").head
    assert head.search == certificate.Search("", "0.5 s", 1 << 20)
    plain = Reader(BytesIO(content_of(replace(request_, count=1))), "head").head
    assert plain.search == certificate.Search()
    assert line_of(plain) == line_of(msgspec.structs.replace(plain))
