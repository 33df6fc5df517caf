"""Vector instructions of the Cortex-M55 (MVE): the same integers in a few instructions, in QEMU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge.csource import Layout, generate
from cactus_edge.execute import execute
from cactus_edge.graph import DType, Graph
from firmware_sim import BOARDS, build, count_qemu, qemu
from firmware_sim.simulation import simulate_source
from tests.test_firmware_pairs import convolution, dense, samples

QEMU = pytest.mark.skipif(
    shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"
)
CASES = {
    "four channels": (dense(1, 8, 64, 8), Layout.INT8),
    "three channels left, eleven taps left": (dense(2, 7, 91, 8), Layout.INT8),
    "two channels left, four taps": (dense(3, 6, 4, 8), Layout.INT8),
    "one channel left, nine taps left": (dense(4, 5, 57, 8), Layout.INT8),
    "one channel": (dense(5, 1, 39, 8), Layout.INT8),
    "largest products": (dense(6, 4, 400, 8, extreme=True), Layout.INT8),
    "unsigned inputs": (dense(7, 6, 41, 8, DType.UINT8), Layout.INT8),
    "two pixels": (convolution(8, 6, 4, 8, 3, 5), Layout.INT8),
    "two pixels, words nowhere": (convolution(9, 5, 5, 8, 3, 5), Layout.INT8),
    "two pixels in place": (convolution(10, 4, 22, 8, 1, 4), Layout.INT8),
    "two pixels of nibbles": (convolution(11, 6, 11, 4, 3, 5), Layout.INT4),
    "two pixels of nibbles, largest": (convolution(12, 5, 16, 4, 2, 6), Layout.INT4),
    "nibbles, two channels left": (dense(13, 6, 75, 4), Layout.INT4),
}


def count(graph: Graph, layout: Layout, *, without: bool = False) -> int:
    """Instructions; all outputs equal the reference executor's."""
    source = generate(graph, layout=layout)
    text = source.files["cactus_edge.c"]
    if without:
        text = text.replace("#define VECTORS\n", "")
        source = replace(source, files={**source.files, "cactus_edge.c": text})
    inputs = samples(graph, 6)
    outputs, counts = count_qemu(graph, source, inputs, "cortex-m55+mve")
    expected = execute(graph, inputs)
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(outputs, expected)
    return sorted(counts)[len(counts) // 2]


@QEMU
@pytest.mark.parametrize("case", CASES)
def test_vectors_compute_the_same_integers(case: str) -> None:
    graph, layout = CASES[case]
    assert ("vmladavaq" in generate(graph, layout=layout).files["cactus_edge.c"]) is (
        case != "unsigned inputs"
    )
    count(graph, layout)


@QEMU
@pytest.mark.parametrize(
    ("graph", "layout"),
    [
        (dense(14, 32, 512, 8), Layout.INT8),
        (convolution(15, 16, 16, 8, 3, 8), Layout.INT8),
        (convolution(16, 16, 5, 8, 3, 8), Layout.INT8),
        (convolution(17, 16, 16, 4, 3, 8), Layout.INT4),
    ],
    ids=["dense", "convolution", "words nowhere", "nibbles"],
)
def test_vectors_save_instructions(graph: Graph, layout: Layout) -> None:
    assert 2 * count(graph, layout) < count(graph, layout, without=True)


@QEMU
def test_counts_of_both_emulators_agree() -> None:
    """Up to the call; in QEMU on a machine of another clock, too, with the same machine code."""
    graph = dense(18, 12, 100, 8)
    source, inputs = generate(graph), samples(graph, 3)
    expected = simulate_source(graph, source, inputs, BOARDS["STM32F405"]).instructions.median
    machine = replace(qemu.MACHINES["cortex-m55"], compiler="cortex_m4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(qemu.MACHINES, "cortex-m55 as m4", machine)
        for name in ("cortex-m4", "cortex-m55 as m4"):
            _, counts = count_qemu(graph, source, inputs, name)
            assert len(counts) == 3
            assert all(0 <= found - expected < 12 for found in counts)


def test_every_case_compiles_without_warnings(tmp_path: Path) -> None:
    target = ["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m55+mve", "-ffreestanding"]
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fno-sanitize=all"]
    for number, (graph, layout) in enumerate(CASES.values()):
        folder = tmp_path / str(number)
        build.put(generate(graph, layout=layout).files, folder)
        build.compile_c([*warnings, *target, "-O1", "-c", "cactus_edge.c", "-o", "m.o"], folder)
