"""Faults in generated firmware: what the CRC finds, and what becomes of the rest."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from graphs import random_graph, random_inputs

from cactus_edge.csource import CSource, generate
from cactus_edge.errors import UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph
from firmware_sim import BOARDS, Fault, Injector, build, flip_tables, injection
from firmware_sim.certified import result_type

BOARD_NAMES = ("RP2040", "STM32F405", "ESP32-C3")


@cache
def model() -> tuple[Graph, CSource, np.ndarray]:
    graph = random_graph(np.random.default_rng(4), depth=4, sparsity=0.5)
    return graph, generate(graph), random_inputs(np.random.default_rng(0), graph, 6)


@cache
def injector(board: str) -> Injector:
    graph, source, inputs = model()
    return Injector(graph, source, inputs[:1], BOARDS[board])


def test_every_flip_in_every_table_is_noticed() -> None:
    graph, source, inputs = model()
    bits = 8 * source.table_bytes
    flips = np.stack(np.divmod(np.arange(bits), 8), axis=1)
    found = flip_tables(graph, source, flips, inputs)
    labels = execute(graph, inputs).reshape(len(inputs), -1).argmax(axis=1)
    assert found.right.tolist() == labels.tolist()
    assert found.noticed.shape == (bits,) and found.noticed.all()
    assert (found.labels != labels).any() and (found.labels == labels).any()


def test_what_is_no_flip_is_not_noticed() -> None:
    """Bit 8 of a byte is none: the tables stay as they are."""
    graph, source, inputs = model()
    found = flip_tables(graph, source, [[0, 8], [0, 0]], inputs)
    assert found.noticed.tolist() == [False, True]
    assert (found.labels[0] == found.right).all()


WRITABLE = """\
#include <stdint.h>
#define const
#include "model.inc"
uint8_t *table(void) { return (uint8_t *)@TABLE@; }
"""


def test_inference_refuses_until_init_succeeded(tmp_path: Path) -> None:
    """And again from a wrong CRC to the next right one."""
    graph, _, inputs = model()
    source = generate(graph, certified=True)
    table = next(iter(source.tables))
    texts = {
        "cactus_edge.h": source.files["cactus_edge.h"],
        "model.inc": source.files["cactus_edge.c"],
        "all.c": WRITABLE.replace("@TABLE@", table),
    }
    library = ctypes.CDLL(str(build.shared_library(texts, tmp_path)))
    library.table.restype = ctypes.POINTER(ctypes.c_uint8)
    given = inputs[0].astype(np.int8).tobytes()
    output = ctypes.create_string_buffer(b"untouched", source.output_bytes + 16)
    result = np.full(1, 0, result_type(graph))

    def run() -> tuple[int, int]:
        certified = library.cactus_edge_predict_certified(
            given, 1, ctypes.c_void_p(result.ctypes.data)
        )
        return library.cactus_edge_run(given, output), certified

    ok, wrong, refused = 0, 1, 2
    assert run() == (refused, refused)
    assert output.value == b"untouched"
    assert int(result["label"][0]) == -1 and int(result["certified"][0]) == 0
    assert library.cactus_edge_verify() == ok
    assert run() == (refused, refused)
    assert library.cactus_edge_init() == ok
    assert run() == (ok, ok)
    assert int(result["label"][0]) >= 0
    library.table()[0] ^= 4
    assert run() == (ok, ok)
    assert library.cactus_edge_verify() == wrong
    assert run() == (refused, refused)
    assert library.cactus_edge_init() == wrong
    library.table()[0] ^= 4
    assert run() == (refused, refused)
    assert library.cactus_edge_init() == ok
    assert run() == (ok, ok)


@pytest.mark.parametrize("board", BOARD_NAMES)
def test_init_notices_what_lies_in_flash(board: str) -> None:
    device = injector(board)
    rng = np.random.default_rng(1)
    tables = model()[1].table_bytes
    faults = [device.draw(rng, "weights", start=True) for _ in range(20)]
    outcomes = [device.run(fault) for fault in faults]
    # Constants end with a few bytes of padding, which belong to no table.
    padding = device.sizes()["weights"] - tables
    assert outcomes.count("detected") >= 20 - padding and set(outcomes) <= {"detected", "masked"}
    assert device.run(Fault("truncated", tables // 2)) == "detected"
    assert device.run(Fault("truncated", 0)) == "detected"


@pytest.mark.parametrize("board", BOARD_NAMES)
def test_outcomes_during_an_inference(board: str) -> None:
    device = injector(board)
    link = {"RP2040": 14, "STM32F405": 14, "ESP32-C3": 0}[board]
    assert device.run(Fault("register", link, 27, 0)) == "crash"
    flag = device.address("checked") - BOARDS[board].ram_origin
    assert device.run(Fault("ram", flag, 3, 0)) == "detected"
    late = device.instructions - 1
    assert device.run(Fault("ram", flag, 3, late)) == "masked"
    output = device.address("output_buffer") - BOARDS[board].ram_origin
    worst = [device.run(Fault("ram", output + n, 7, late)) for n in range(3)]
    assert "wrong-label" in worst and set(worst) <= {"wrong-label", "other-logits"}


def test_a_run_without_end_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """No patience makes a hang of any run of more than a thousand instructions."""
    device = injector("RP2040")
    assert device.instructions > 1000
    late = Fault("register", 12, 0, device.instructions - 1)
    assert device.run(late) == "masked"
    with monkeypatch.context() as impatient:
        impatient.setattr(injection, "_PATIENCE", 0)
        assert device.run(late) == "hang"
    assert device.run(late) == "masked"


def test_faults_leave_nothing_behind() -> None:
    """The same faults in another order, crashes and changed code among them."""
    device = injector("STM32F405")
    rng = np.random.default_rng(2)
    places = ("code", "register", "weights", "ram")
    faults = [device.draw(rng, place) for place in places for _ in range(12)]
    outcomes = [device.run(fault) for fault in faults]
    assert {"masked", "crash"} <= set(outcomes)
    assert [device.run(fault) for fault in reversed(faults)] == outcomes[::-1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("ram", 1 << 30, 0, 0), "no such place on STM32F405"),
        (Fault("register", 15, 0, 0), "no such place on STM32F405"),
        (Fault("ram", 0), "no content before the start"),
    ],
)
def test_impossible_faults_are_refused(fault: Fault, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        injector("STM32F405").run(fault)
