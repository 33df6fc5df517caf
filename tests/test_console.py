"""The console of a board: frames, a noisy line, emulated boards on pseudo terminals and sockets."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import random_graph, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.cli import run as cli
from cactus_edge.csource import CSource, generate
from cactus_edge.csource.console import ANSWER, Kind, Status
from cactus_edge.errors import MissingExtraError, ToolError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import DType, Graph
from cactus_edge.validate import Console, opened, validate_device
from cactus_edge.validate.frames import Decoder, Frame, decode, encode
from firmware_sim import BOARDS, Board, build
from firmware_sim.boards import board_named
from firmware_sim.console import Socket, console_program, console_texts, serving
from firmware_sim.image import read_image

ROOT = Path(__file__).resolve().parent.parent
WRITE = """\
#include "cactus_edge_console.h"
#define CAPACITY 1000000
uint8_t sent[CAPACITY];
int32_t sent_bytes;
void cactus_edge_console_write(uint8_t byte) { sent[sent_bytes++ % CAPACITY] = byte; }
uint32_t cactus_edge_console_ticks(void) { static uint32_t now = 0xfffffff0u; return now += 40; }
"""


def frames() -> st.SearchStrategy[Frame]:
    byte = st.integers(0, 255)
    payload = st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda n, fill, end: bytes([fill]) * n + end,
            st.integers(250, 520),
            byte,
            st.binary(max_size=3),
        ),
    )
    return st.builds(Frame, byte, st.integers(0, 0xFFFF), payload, byte)


def model(seed: int = 3, **options: object) -> Graph:
    return random_graph(np.random.default_rng(seed), depth=5, **options)  # type: ignore


def samples_of(graph: Graph, count: int) -> np.ndarray:
    return random_inputs(np.random.default_rng(0), graph, count).astype(np.int64)


def texts_of(source: CSource) -> dict[str, str]:
    names = (f"{source.prefix}_console.h", f"{source.prefix}_console.c")
    return {**source.files, **{name: source.surroundings[name] for name in names}}


class Loopback:
    """The console compiled for this computer, as an open port; ``clock`` stands still but here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._taken, self.now = library, 0, 0.0
        self._taken = self._count()

    def _count(self) -> int:
        return ctypes.c_int32.in_dll(self._library, "sent_bytes").value

    @property
    def in_waiting(self) -> int:
        return self._count() - self._taken

    def read(self, size: int) -> bytes:
        sent = (ctypes.c_uint8 * 1_000_000).in_dll(self._library, "sent")
        count = min(size, self.in_waiting)
        self.now += 0 if count else 0.1
        data = bytes(sent[(self._taken + n) % len(sent)] for n in range(count))
        self._taken += count
        return data

    def write(self, data: bytes) -> int:
        for byte in data:
            self._library.cactus_edge_console_receive(byte)
        return len(data)

    def clock(self) -> float:
        return self.now


def library_of(folder: Path, source: CSource, *, layers: bool) -> ctypes.CDLL:
    defines = "#define CACTUS_EDGE_CONSOLE_TICKS 48000000\n"
    defines += "#define CACTUS_EDGE_TRACE\n" if layers else ""
    texts = texts_of(source)
    texts["cactus_edge.h"] = defines + texts["cactus_edge.h"]
    path = build.shared_library({**texts, "write.c": WRITE}, folder)
    library = ctypes.CDLL(str(path))
    library.cactus_edge_console_start(None)
    return library


@pytest.fixture(scope="module")
def graph() -> Graph:
    return model()


@pytest.fixture(scope="module")
def source(graph: Graph) -> CSource:
    return generate(graph, serial=True, certified=True)


@pytest.fixture(scope="module")
def library(source: CSource, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library_of(tmp_path_factory.mktemp("console"), source, layers=True)


def board_of(line: Loopback, **options: float) -> Console:
    return Console(line, "loopback", clock=line.clock, **options)  # type: ignore


@given(frame=frames())
def test_a_frame_comes_back(frame: Frame) -> None:
    line = encode(frame)
    assert line.count(0) == 1 and line[-1] == 0
    assert decode(line[:-1]) == frame


@given(sent=st.lists(st.one_of(frames(), st.binary(max_size=30)), max_size=6), data=st.data())
def test_frames_are_found_among_garbage(sent: list[Frame | bytes], data: st.DataObject) -> None:
    """Whatever stands between zeros, in pieces of any size."""
    parts = [encode(part) if isinstance(part, Frame) else part + b"\0" for part in sent]
    line = b"".join(parts)
    decoder, found, position = Decoder(10_000), [], 0
    while position < len(line):
        size = data.draw(st.integers(1, 300))
        found += decoder.feed(line[position : position + size])
        position += size
    assert found == [part for part in sent if isinstance(part, Frame)]
    garbage = sum(len(p.replace(b"\0", b"")) for p in sent if isinstance(p, bytes))
    assert decoder.discarded == garbage


@given(frame=frames(), data=st.data())
def test_damaged_frames_are_none(frame: Frame, data: st.DataObject) -> None:
    stuffed = bytearray(encode(frame)[:-1])
    place = data.draw(st.integers(0, len(stuffed) - 1))
    assert decode(bytes(stuffed[:place])) is None
    assert decode(bytes(stuffed[:place] + stuffed[place + 1 :])) is None
    stuffed[place] ^= 1 << data.draw(st.integers(0, 7))
    assert decode(bytes(stuffed)) is None


def test_a_line_without_zeros_takes_no_memory() -> None:
    decoder = Decoder(100)
    for _ in range(50):
        assert decoder.feed(b"\x55" * 64) == []
    assert decoder.discarded >= 50 * 64 - 128
    frame = Frame(1, 2, b"abc")
    assert decoder.feed(b"\0" + encode(frame)) == [frame]


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=200),
            st.sampled_from([Kind.HELLO, Kind.VERIFY, Kind.MEMORY]),
            frames(),
        ),
        max_size=8,
    )
)
def test_the_firmware_answers_every_frame_once(
    library: ctypes.CDLL, parts: list[bytes | Kind | Frame]
) -> None:
    """Its own decoder and encoder against the host's; garbage gets an error, or nothing."""
    line, decoder = Loopback(library), Decoder(1 << 20)
    known = {*Kind} - {Kind.LAYER}
    for sequence, part in enumerate(parts, 1):
        if isinstance(part, bytes):
            line.write(b"\0" + part + b"\0")
            answers = decoder.feed(line.read(1 << 20))
            assert all(a == Frame(ANSWER, 0, b"", Status.FRAME) for a in answers)
            assert len(answers) <= len(part)
            continue
        frame = Frame(part, sequence) if isinstance(part, Kind) else part
        line.write(b"\0" + encode(frame))
        answers = decoder.feed(line.read(1 << 20))
        assert len(answers) == 1
        (answer,) = answers
        if isinstance(part, Kind):
            assert answer.status == Status.OK
        elif len(encode(frame)) > 90:
            assert answer == Frame(ANSWER, 0, b"", Status.FRAME), "too long for its buffer"
            continue
        elif frame.kind not in known:
            assert answer.status == Status.KIND
        assert (answer.kind, answer.sequence) == (frame.kind | ANSWER, frame.sequence)
    assert decoder.discarded == 0


def test_requests_of_a_wrong_length(library: ctypes.CDLL) -> None:
    line, decoder = Loopback(library), Decoder(1 << 20)
    for kind in (Kind.HELLO, Kind.VERIFY, Kind.RUN, Kind.LAYERS, Kind.CERTIFY, Kind.MEMORY):
        line.write(encode(Frame(kind, 7, b"abc")))
        assert decoder.feed(line.read(1 << 20)) == [Frame(kind | ANSWER, 7, b"", Status.LENGTH)]


def test_a_board_equals_the_reference(graph: Graph, library: ctypes.CDLL) -> None:
    """Logits, layers and verdicts; ticks that wrap around."""
    line = Loopback(library)
    stored = samples_of(graph, 40)
    report = validate_device(graph, stored, board_of(line), "loopback", levels=2, layer_samples=8)
    assert report.agrees and report.first is report.first_verdict is None
    assert report.elements == execute(graph, stored).size
    values = execute_all(graph, stored[:8])
    assert report.layer_elements == sum(values[op.output].size for op in graph.core)
    assert report.verdicts == 40 and 0 < report.certified < 40
    assert (report.tick_rate, report.ticks_median, report.repeated) == (48_000_000, 40, 0)
    assert (report.stack_bytes, report.stack_available) == (0, 0)


class Noisy(Loopback):
    """Loses, flips and invents bytes, both ways."""

    def __init__(self, library: ctypes.CDLL, rate: float) -> None:
        super().__init__(library)
        self._rng, self._rate = np.random.default_rng(0), rate

    def _noise(self, data: bytes) -> bytes:
        found = bytearray()
        for byte in data:
            if self._rng.random() >= self._rate:
                found.append(byte)
            elif (what := self._rng.integers(3)) == 0:
                found.append(byte ^ 1 << int(self._rng.integers(8)))
            elif what == 1:
                found += self._rng.bytes(3)
        return bytes(found)

    def write(self, data: bytes) -> int:
        super().write(self._noise(data))
        return len(data)

    def read(self, size: int) -> bytes:
        return self._noise(super().read(size))


def test_noise_costs_repetitions_alone(graph: Graph, library: ctypes.CDLL) -> None:
    stored = samples_of(graph, 60)
    console = board_of(Noisy(library, 1e-3))
    report = validate_device(graph, stored, console, "noisy", layer_samples=30)
    assert report.agrees
    assert report.repeated > 5


def test_too_much_noise_is_an_error(graph: Graph, library: ctypes.CDLL) -> None:
    console = board_of(Noisy(library, 0.2))
    with pytest.raises(ToolError, match="noisy|damaged|no frame|no answer"):
        validate_device(graph, samples_of(graph, 5), console, "noisy")


class Dead(Loopback):
    """Nobody, or somebody who only babbles."""

    def __init__(self, babble: bytes = b"") -> None:
        self._babble, self.now = babble, 0.0

    @property
    def in_waiting(self) -> int:
        return len(self._babble)

    def read(self, size: int) -> bytes:
        self.now += 0.1
        return self._babble

    def write(self, data: bytes) -> int:
        return len(data)


def test_a_silent_board_times_out() -> None:
    line = Dead()
    with pytest.raises(ToolError, match=r"loopback: no answer to HELLO within 11.1 s; .*9600 baud"):
        board_of(line, baud=9600).hello()
    assert 8 < line.now < 15
    with pytest.raises(ToolError, match=r"no answer to HELLO, but \d+ bytes outside of frames"):
        board_of(Dead(b"U\0")).hello()


def test_another_protocol_is_named(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> None:
    monkeypatch.setattr("cactus_edge.validate.console.PROTOCOL", 2)
    with pytest.raises(ToolError, match="version 1 of the protocol, this is version 2"):
        board_of(Loopback(library)).hello()


def test_another_model_is_refused(library: ctypes.CDLL) -> None:
    other = model(4)
    with pytest.raises(UsageError, match=r"another model: graph [0-9a-f]{12} with 54 inputs"):
        validate_device(other, samples_of(other, 2), board_of(Loopback(library)), "loopback")
    with pytest.raises(UsageError, match="levels 256"):
        validate_device(
            other, samples_of(other, 2), board_of(Loopback(library)), "loopback", levels=256
        )


@pytest.mark.parametrize("layers", [True, False])
def test_the_first_difference_is_located(tmp_path: Path, layers: bool) -> None:
    """Firmware that says it rounds in one way, and rounds in another."""
    graph = model(3)
    said, does = "tflite-micro", "litert-xnnpack-x86"
    right, wrong = (generate(graph, name, serial=True) for name in (said, does))
    header = right.surroundings["cactus_edge_console.h"]
    wrong = replace(wrong, surroundings={**wrong.surroundings, "cactus_edge_console.h": header})
    line = Loopback(library_of(tmp_path, wrong, layers=layers))
    stored = samples_of(graph, 200)
    report = validate_device(graph, stored, board_of(line), "liar", layer_samples=2)
    expected, found = execute(graph, stored, said), execute(graph, stored, does)
    assert report.mismatches == int((expected != found).sum()) > 0
    assert not report.agrees
    first = report.first
    assert first is not None
    if not layers:
        assert first.layer == len(graph.core) - 1 and report.layer_elements == 0
    both = [
        execute_all(graph, stored[first.sample : first.sample + 1], name)[
            graph.core[first.layer].output
        ][0]
        for name in (said, does)
    ]
    assert tuple(np.argwhere(both[0] != both[1])[0]) == first.position
    assert [int(values[first.position]) for values in both] == [first.expected, first.found]


def test_damaged_flash_is_an_error(tmp_path: Path) -> None:
    graph = model(5)
    source = generate(graph, serial=True)
    text = source.files["cactus_edge.h"].replace(f"0x{source.crc32:08x}u", "0x12345678u")
    broken = replace(source, files={**source.files, "cactus_edge.h": text})
    line = Loopback(library_of(tmp_path, broken, layers=False))
    with pytest.raises(ToolError, match="CRC of weights and tables in flash is wrong"):
        validate_device(graph, samples_of(graph, 1), board_of(line), "loopback")
    with pytest.raises(ToolError, match=r"RUN ended with error 2 \(NOT_READY\)"):
        board_of(line).run(bytes(source.input_bytes), source.output_bytes)
    with pytest.raises(ToolError, match=r"CERTIFY ended with error 67 \(ABSENT\)"):
        board_of(line).certify(bytes(source.input_bytes), 1, source.output_bytes)


@pytest.fixture(scope="module")
def folder(source: CSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("firmware")
    source.write(path)
    return path


@pytest.mark.parametrize("board", ["stm32f4", "RP2040", "ESP32-C3"])
def test_an_emulated_board_on_a_pseudo_terminal(graph: Graph, folder: Path, board: str) -> None:
    stored = samples_of(graph, 12)
    with (
        serving(console_texts(folder), board, layers=True) as address,
        opened(address) as line,
    ):
        line.write(b"\x07garbage\xff\0half a frame")
        report = validate_device(graph, stored, Console(line, address), address, layer_samples=4)
    assert report.agrees and report.verdicts == 12
    assert 128 < report.stack_bytes < 2048 < report.stack_available


@pytest.fixture(scope="module")
def case(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Model, data set and exported folder of the command line."""
    path = tmp_path_factory.mktemp("case")
    rng = np.random.default_rng(0)
    shape = graph.tensors[graph.input].shape[1:]
    arrays = {f"x_{part}": rng.random((20, *shape), np.float32) for part in ("train", "test")}
    np.savez(path / "data.npz", **arrays, y_train=np.arange(20) % 3, y_test=np.arange(20) % 3)
    (path / "model.tflite").write_bytes(write_tflite(graph))
    names = [str(path / name) for name in ("model.tflite", "data.npz", "fw")]
    assert cli(["export-c", names[0], "-o", names[2], "--prefix", "wake", "--console"]) == 0
    return names[0], names[1], names[2]


def test_the_command_line_and_an_emulated_board(
    case: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both as programs of their own: ``serve`` on a socket, ``validate --device``."""
    name, data, folder = case
    command = [sys.executable, "-m", "firmware_sim", "serve", folder, "--board", "rp2040"]
    command += ["--listen", "localhost:0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith("socket://localhost:")
            capsys.readouterr()
            given = ["validate", name, "--data", data, "-n", "9", "--device", address]
            assert cli([*given, "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert (report["samples"], report["mismatches"], report["elements"]) == (9, 0, 27)
            assert report["device"] == address and report["layer_elements"] == 0
            assert cli(given) == 0, "a second client"
            assert "stack" in capsys.readouterr().out
        finally:
            server.terminate()


def test_a_board_is_asked_for_what_is_written(
    case: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sizes that ``--board`` shows are those of the build with the console."""
    export = ["export-c", case[0], "-o", str(tmp_path / "fw"), "--prefix", "wake", "--json"]
    sizes: list[tuple[int, int]] = []
    for more in ([], ["--console"]):
        capsys.readouterr()
        assert cli([*export, "--board", "rp2040", "--force", *more]) == 0
        shown = json.loads(capsys.readouterr().out)
        sizes.append((shown["flash_bytes"], shown["ram_bytes"]))
    program = console_program(console_texts(tmp_path / "fw"), tmp_path, BOARDS["RP2040"])
    image = read_image(program)
    assert sizes[1] == (image.flash_bytes, image.static_bytes)
    assert sizes[1][0] > sizes[0][0] + 1000


def test_a_console_that_does_not_fit_is_refused(
    case: tuple[str, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = ["export-c", case[0], "-o", str(tmp_path / "fw"), "--json", "--board", "tiny"]
    capsys.readouterr()
    monkeypatch.setitem(BOARDS, "tiny", replace(BOARDS["RP2040"], name="tiny"))
    assert cli(export) == 0
    flash = json.loads(capsys.readouterr().out)["flash_bytes"]
    monkeypatch.setitem(BOARDS, "tiny", replace(BOARDS["RP2040"], name="tiny", flash_bytes=flash))
    assert cli([*export, "--force"]) == 0
    assert cli([*export, "--force", "--console"]) == 3
    assert "does not fit tiny" in capsys.readouterr().err


def test_wrong_calls(case: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    name, data, _ = case
    given = ["validate", name, "--data", data, "--device"]
    assert cli([*given, "/dev/no-such-port"]) == 2
    assert "/dev/no-such-port: cannot open the port" in " ".join(capsys.readouterr().err.split())
    assert cli([*given, "no://such"]) == 2
    assert cli([*given, "x", "--baud", "0"]) == cli([*given, "x", "--timeout", "0"]) == 2
    master, slave = os.openpty()
    try:
        assert cli([*given, os.ttyname(slave), "--timeout", "1"]) == 5
    finally:
        os.close(master)
        os.close(slave)
    assert "no answer to HELLO" in capsys.readouterr().err


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 consoles; give a folder that `cactus-edge export-c"):
        console_texts(tmp_path)
    (tmp_path / "x_console.c").write_text("")
    with pytest.raises(UsageError, match="No such file"):
        console_texts(tmp_path)
    serve = [sys.executable, "-m", "firmware_sim", "serve", str(tmp_path)]
    for more in (["--board", "z80"], ["--listen", "nowhere"]):
        done = subprocess.run(
            [*serve, *more], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_pyserial_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "serial", None)
    with pytest.raises(MissingExtraError, match=r"cactus-edge\[serial\]"), opened("/dev/ttyACM0"):
        pass


# pyserial leaves a socket open whose other end is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_port_that_goes_away_is_an_error(graph: Graph) -> None:
    line = Socket("localhost", 0)
    with (
        pytest.raises(ToolError, match="the connection failed"),
        opened(line.address) as port,
    ):
        line.read()
        line.close()
        Console(port, "gone").hello()


def test_the_console_of_this_computer(folder: Path, source: CSource, tmp_path: Path) -> None:
    """``main_console.c``, on standard input and output."""
    program = tmp_path / "console"
    names = ("main_console.c", "cactus_edge_console.c", "cactus_edge.c")
    options = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsanitize=undefined"]
    sources = [str(folder / name) for name in names]
    build.compile_c([*options, "-fsanitize-trap=undefined", *sources, "-o", str(program)], tmp_path)
    requests = encode(Frame(Kind.VERIFY, 1)) + encode(Frame(Kind.RUN, 2, bytes(source.input_bytes)))
    done = subprocess.run([program], input=requests, capture_output=True, check=True)
    verified, ran = Decoder(1000).feed(done.stdout)
    assert verified == Frame(Kind.VERIFY | ANSWER, 1)
    zeros = np.zeros((1, source.input_bytes), np.int64)
    graph = model()
    assert graph.tensors[graph.core_input].dtype is DType.INT8
    expected = execute(graph, zeros.reshape(1, *graph.tensors[graph.core_input].shape[1:]))
    assert ran.payload == bytes(4) + expected.astype(np.int8).tobytes()


@pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: board.name)
def test_boards_are_found_by_a_part_of_their_name(board: Board) -> None:
    assert board_named(board.name.lower()) is board
    assert board_named(board.name[:-1]) is board or board.name.startswith("STM32L")


def test_ambiguous_boards_are_refused() -> None:
    with pytest.raises(UsageError, match="it may be: STM32F405, STM32F746"):
        board_named("stm32f")
    with pytest.raises(UsageError, match="known: STM32L073"):
        board_named("z80")
