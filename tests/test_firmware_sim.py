"""Generated C, on this computer and on emulated microcontrollers, bit by bit with ``execute``."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import CORE_OPERATORS, random_graph, random_inputs
from unicorn.unicorn_const import UC_HOOK_CODE

from cactus_edge import profiles
from cactus_edge.csource import Layout, generate
from cactus_edge.errors import DataError, DoesNotFitError, MissingExtraError, ToolError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Quantization,
    Requantization,
    Reshape,
    Tensor,
    Weights,
)
from firmware_sim import BOARDS, Board, Instructions, build, run_host, run_qemu, simulate
from firmware_sim.boards import ARM, KIB, Cpu, board_of
from firmware_sim.emulator import BlockCounter, Machine, instruction_bytes
from firmware_sim.host import run_source
from firmware_sim.image import Image, check_fit, read_image
from firmware_sim.qemu import MACHINES

COUNT = 24


def graph_of(seed: int, **options: object) -> Graph:
    return random_graph(np.random.default_rng(seed), **options)  # type: ignore


def inputs_of(graph: Graph, count: int = COUNT) -> np.ndarray:
    return random_inputs(np.random.default_rng(0), graph, count)


def every_operator() -> Graph:
    """The first random graph that has them all."""
    for seed in range(500):
        graph = graph_of(seed, depth=9, shape=(1, 6, 6, 2), sparsity=0.5)
        if {op.kind for op in graph.core} == set(CORE_OPERATORS):
            return graph
    raise AssertionError("no such graph")


def layer(outputs: int, inputs: int) -> Graph:
    """One dense FULLY_CONNECTED layer of any size."""
    rng = np.random.default_rng(1)
    scale = np.full(1, 1 / 4096, np.float32).view(np.uint32)
    op = FullyConnected(
        name="fc",
        inputs=(0,),
        output=1,
        weights=Weights(rng.integers(1, 128, (outputs, inputs)), 8, scale),
        bias=np.zeros(outputs, np.int32),
    )
    edges = (Tensor("x", (1, inputs)), Tensor("y", (1, outputs)))
    tensors = tuple(replace(t, quantization=Quantization.of(0.5, 0)) for t in edges)
    return Graph(tensors, (op,), 0, 1)


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_host_equals_execute(profile: str) -> None:
    """Undefined behaviour would end the program. Every other profile runs sparse layouts."""
    seed = 100 + list(profiles.PROFILES).index(profile)
    graph = graph_of(seed, depth=7, sparsity=0.8 * (seed % 2))
    inputs = inputs_of(graph)
    run = run_host(graph, inputs, profile, sanitize=True, trace=True)
    np.testing.assert_array_equal(run.outputs, execute(graph, inputs, profile))
    expected = execute_all(graph, inputs, profile)
    assert list(run.layers) == [op.output for op in graph.core]
    for tensor, values in run.layers.items():
        np.testing.assert_array_equal(values, expected[tensor], graph.tensors[tensor].name)


def test_every_rounding_in_one_layer() -> None:
    """Runs of channels, as a depthwise layer has them, of each rounding and in any order."""
    graph = layer(12, 9)
    (op,) = graph.operators
    assert isinstance(op, FullyConnected)
    by_code: dict[int, Requantization] = {}
    for profile in profiles.PROFILES.values():
        resolved = profiles.requantization(graph, op, profile)
        by_code.setdefault(int(resolved.rounding[0]), resolved)
    runs = (1, 1, 1, 0, 4, 4, 3, 2, 2, 1, 0, 0)
    assert set(by_code) == set(runs)
    columns = [
        [int(getattr(by_code[code], name)[channel]) for channel, code in enumerate(runs)]
        for name in ("rounding", "multiplier", "shift")
    ]
    mixed = replace(op, requantization=Requantization(*map(np.array, columns)))
    graph = replace(graph, operators=(mixed,))
    inputs = inputs_of(graph, 100)
    run = run_host(graph, inputs, sanitize=True)
    np.testing.assert_array_equal(run.outputs, execute(graph, inputs))
    emulated = simulate(graph, inputs[:8])
    np.testing.assert_array_equal(emulated.outputs, run.outputs[:8])


def test_comparison_can_fail() -> None:
    """Two profiles that differ on a graph give two different programs."""
    graph = graph_of(3, depth=5)
    inputs = inputs_of(graph, 200)
    outputs = run_host(graph, inputs, "litert-xnnpack-x86").outputs
    np.testing.assert_array_equal(outputs, execute(graph, inputs, "litert-xnnpack-x86"))
    assert not np.array_equal(outputs, execute(graph, inputs, "tflite-micro"))


def test_universal_graph_has_one_result() -> None:
    graph = graph_of(4, depth=4, universal=True)
    inputs = inputs_of(graph, 100)
    expected = execute(graph, inputs)
    for profile in ("tflite-micro", "litert-xnnpack-arm", "litert-reference"):
        np.testing.assert_array_equal(run_host(graph, inputs, profile).outputs, expected)


OVERFLOW = """\
#include "cactus_edge.h"
int32_t cactus_edge_init(void) { return 0; }
int32_t cactus_edge_run(const int8_t *input, int8_t *output)
{
  output[0] = (int8_t)(2147483647 + input[0]);
  return 0;
}
"""


def test_undefined_behaviour_is_an_error() -> None:
    graph = layer(1, 1)
    source = generate(graph)
    broken = replace(source, files={**source.files, "cactus_edge.c": OVERFLOW})
    run_source(graph, broken, [[0]], sanitize=True)
    with pytest.raises(ToolError, match="undefined behaviour"):
        run_source(graph, broken, [[1]], sanitize=True)


@pytest.mark.parametrize("layout", Layout)
def test_layouts_are_equal(layout: Layout) -> None:
    """Odd numbers of taps and channels, widths that tiles overlap in, every linear operator."""
    for seed in (21, 22):
        graph = graph_of(
            seed,
            depth=6,
            shape=(1, 8, 8, 3),
            bits=(4,),
            sparsity=0.6,
            operators=("CONV_2D", "DEPTHWISE_CONV_2D", "ADD"),
        )
        inputs = inputs_of(graph)
        expected = execute(graph, inputs)
        run = run_host(graph, inputs, layout=layout, sanitize=True)
        np.testing.assert_array_equal(run.outputs, expected)
    emulated = simulate(graph, inputs[:4], layout=layout)
    np.testing.assert_array_equal(emulated.outputs, expected[:4])


@pytest.mark.parametrize("edges", [(), ("QUANTIZE", "SOFTMAX", "DEQUANTIZE")])
def test_uint8_and_edges(edges: tuple[str, ...]) -> None:
    for seed in range(3):
        kind = DType.UINT8 if seed else DType.INT8
        graph = graph_of(seed, depth=4, edges=edges, input_type=kind)
        inputs = inputs_of(graph)
        run = run_host(graph, inputs, sanitize=True)
        np.testing.assert_array_equal(run.outputs, execute(graph, inputs))
        emulated = simulate(graph, inputs[:2])
        np.testing.assert_array_equal(emulated.outputs, run.outputs[:2])


def test_every_operator_on_a_cortex_m4() -> None:
    graph = every_operator()
    inputs = inputs_of(graph)
    run = simulate(graph, inputs, trace=True)
    np.testing.assert_array_equal(run.outputs, execute(graph, inputs))
    for tensor, values in execute_all(graph, inputs).items():
        if tensor != graph.core_input:
            np.testing.assert_array_equal(run.layers[tensor], values)
    assert run.board is BOARDS["STM32F405"]
    assert run.instructions.samples == COUNT
    assert 0 < run.instructions.minimum <= run.instructions.median <= run.instructions.maximum
    assert run.flash_bytes >= run.code_bytes + run.constant_bytes
    source = generate(graph)
    buffers = [(size + 3) // 4 * 4 for size in (source.input_bytes, source.output_bytes)]
    flag, status = 4, 4
    assert run.ram_bytes == run.arena_bytes + sum(buffers) + flag + status
    assert run.layer_instructions == ()
    assert 0 < run.stack_bytes < 1024


def test_layers_add_up() -> None:
    """To all but the few instructions before the first layer; a wider layer takes more."""
    narrow, wide = layer(20, 64), layer(40, 64)
    for cpu in ("cortex-m0plus", "cortex-m4", "rv32imc"):
        counts: list[int] = []
        for graph in (narrow, wide):
            run = simulate(graph, inputs_of(graph, 3), cpu=cpu, by_layer=True)
            (count,) = run.layer_instructions
            assert 0 < run.instructions.median - count < 20
            counts.append(count)
        assert 1.8 < counts[1] / counts[0] < 2.2
    graph = every_operator()
    run = simulate(graph, inputs_of(graph, 3), by_layer=True)
    shared = [isinstance(op, Reshape) and op.output != graph.logits for op in graph.core]
    assert [count == 0 for count in run.layer_instructions] == shared
    assert 0 < run.instructions.median - sum(run.layer_instructions) < 20


@pytest.mark.parametrize("profile", ["litert-reference", "litert-xnnpack-arm", "tflite-arm"])
def test_wide_roundings_on_a_cortex_m4(profile: str) -> None:
    graph = graph_of(31, depth=6)
    inputs = inputs_of(graph)
    run = simulate(graph, inputs, profile=profile)
    np.testing.assert_array_equal(run.outputs, execute(graph, inputs, profile))


@pytest.mark.parametrize("cpu", ["cortex-m0plus", "cortex-m33", "rv32imc"])
def test_other_cores(cpu: str) -> None:
    graph = graph_of(40, depth=6, sparsity=0.5)
    inputs = inputs_of(graph)
    for profile in ("tflite-micro", "litert-reference"):
        run = simulate(graph, inputs, cpu=cpu, profile=profile)
        np.testing.assert_array_equal(run.outputs, execute(graph, inputs, profile))


def test_pruning_saves_flash_and_instructions() -> None:
    dense, sparse = (
        graph_of(50, depth=1, shape=(1, 8, 8, 4), bits=(4,), sparsity=s, operators=("CONV_2D",))
        for s in (0.0, 0.9)
    )
    before, after = (simulate(graph, inputs_of(graph, 2)) for graph in (dense, sparse))
    assert after.constant_bytes < before.constant_bytes
    assert after.instructions.median < before.instructions.median


def machine(graph: Graph, folder: Path, board: Board) -> tuple[Machine, Image]:
    image = read_image(build.firmware(generate(graph).files, folder, board))
    return Machine(board, image), image


def test_counts_equal_single_steps(tmp_path: Path) -> None:
    """ARMv6-M has no IT blocks, so there a hook on each instruction is exact as well."""
    graph = graph_of(60, depth=3, shape=(1, 4, 4, 2))
    board = BOARDS["STM32L073"]
    inputs = inputs_of(graph, 3).astype(np.int8)
    size = generate(graph).output_bytes
    counted, image = machine(graph, tmp_path, board)
    counter = BlockCounter(image, board, tmp_path)
    counter.attach(counted.engine)
    stepped, _ = machine(graph, tmp_path, board)
    steps: list[int] = []
    stepped.engine.hook_add(
        UC_HOOK_CODE, lambda engine, address, length, user: steps.append(address)
    )
    for sample in inputs:
        steps.clear()
        outputs = stepped.infer(sample.tobytes(), size), counted.infer(sample.tobytes(), size)
        assert outputs[0] == outputs[1]
        assert counter.take() == len(steps) > 100
    assert counter.take() == 0


def test_lengths_of_thumb_2_instructions(tmp_path: Path) -> None:
    """On a Cortex-M4 stepping leaves out what IT blocks skip, but it tells lengths."""
    graph = graph_of(60, depth=3, shape=(1, 4, 4, 2))
    board = BOARDS["STM32F405"]
    device, image = machine(graph, tmp_path, board)
    counter = BlockCounter(image, board, tmp_path)
    counter.attach(device.engine)
    sizes: dict[int, int] = {}
    steps: list[int] = []

    def step(engine: object, address: int, length: int, user: object) -> None:
        sizes[address] = length
        steps.append(address)

    device.engine.hook_add(UC_HOOK_CODE, step)
    sample = inputs_of(graph, 1).astype(np.int8)
    device.infer(sample.tobytes(), generate(graph).output_bytes)
    for address, length in sizes.items():
        halfword = int.from_bytes(device.engine.mem_read(address, 2), "little")
        assert instruction_bytes(halfword) == length
    assert set(sizes.values()) == {2, 4}
    assert len(steps) <= counter.take() < 1.2 * len(steps)


def test_counts_of_strange_code_are_refused(tmp_path: Path) -> None:
    board = BOARDS["STM32F405"]
    device, image = machine(layer(2, 3), tmp_path, board)
    counter = BlockCounter(replace(image, code_bytes=64), board, tmp_path)
    counter.attach(device.engine)
    device.infer(bytes(3), 2)
    with pytest.raises(ToolError, match="not the image's code"):
        counter.take()


def test_faults_are_errors(tmp_path: Path) -> None:
    """A board whose memory is not where the image was linked to."""
    board = BOARDS["STM32F405"]
    _, image = machine(layer(2, 3), tmp_path, board)
    elsewhere = replace(board, ram_origin=board.ram_origin + (1 << 20))
    with pytest.raises(ToolError, match="cortex-m4 stopped at 0x080"):
        Machine(elsewhere, image)


def test_stack_that_meets_the_data_is_an_error(tmp_path: Path) -> None:
    board = BOARDS["STM32F405"]
    device, image = machine(layer(2, 3), tmp_path, board)
    assert 0 <= device.stack_bytes() < 256
    device.engine.mem_write(board.ram_origin + image.static_bytes, bytes(4))
    with pytest.raises(DoesNotFitError, match="the stack does not fit STM32F405"):
        device.stack_bytes()


@pytest.mark.parametrize(
    ("board", "what"),
    [
        (Board("tiny", "cortex-m4", 0x08000000, 16 * KIB, 0x20000000, 64 * KIB), "flash"),
        (Board("tiny", "cortex-m4", 0x08000000, 64 * KIB, 0x20000000, 4 * KIB), "RAM"),
    ],
)
def test_model_that_does_not_fit(board: Board, what: str) -> None:
    graph = layer(8, 4000)
    needed = r"does not fit tiny \(cortex-m4\): it needs \d+ bytes of " + what
    with pytest.raises(DoesNotFitError, match=needed) as caught:
        simulate(graph, inputs_of(graph, 1), board=board)
    if what == "flash":
        assert "Of constants need most: layer 0 (FULLY_CONNECTED 'fc') 32008 bytes" in str(
            caught.value
        )


def test_a_board_has_its_cpu() -> None:
    assert board_of(None, "RP2040").cpu == "cortex-m0plus"
    assert board_of(None, None).cpu == board_of("cortex-m4", None).cpu == "cortex-m4"


def test_names_are_checked() -> None:
    graph = layer(2, 3)
    for call, message in (
        (lambda: simulate(graph, [[1, 2, 3]], cpu="z80"), "no CPU 'z80'; known: cortex-m0plus"),
        (lambda: simulate(graph, [[1, 2, 3]], board="Uno"), "no board 'Uno'; known: STM32"),
        (lambda: board_of("cortex-m3", "STM32F405"), "STM32F405 has a cortex-m4, not a cortex-m3"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    for inputs, message in (
        ([[0.5, 1.0, 2.0]], "must be stored integers"),
        ([[1, 2, 300]], "outside int8"),
        (np.zeros((0, 3), np.int8), "no inputs to simulate"),
    ):
        with pytest.raises(DataError, match=message):
            simulate(graph, inputs)


def test_compiler_errors_carry_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"(?s)compiler failed \(zig cc.*broken.c:1.*error"):
        build.shared_library({"broken.c": "int f(void) { return nothing; }"}, tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = layer(2, 3)
    board = BOARDS["STM32F405"]
    elf = build.firmware(generate(graph).files, tmp_path, board)
    image = read_image(elf)
    calls: dict[str, Callable[[], object]] = {
        "ziglang": lambda: run_host(graph, [[1, 2, 3]]),
        "pyelftools": lambda: read_image(elf),
        "unicorn": lambda: Machine(board, image),
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for module in ("elftools.elf.elffile", "unicorn.arm_const", "unicorn"):
        monkeypatch.setitem(sys.modules, module, None)
    for package, call in calls.items():
        with pytest.raises(MissingExtraError, match=rf"'{package}'.*cactus-edge\[sim\]"):
            call()


def test_firmware_is_reproducible(tmp_path: Path) -> None:
    files = generate(graph_of(70, depth=4)).files
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    first, second = (build.firmware(files, f, BOARDS["nRF52840"]).read_bytes() for f in folders)
    assert first == second


def test_summary_of_counts() -> None:
    assert Instructions.of([5, 1, 9]) == Instructions(1, 5, 9, 3)
    assert Instructions.of([4, 2]) == Instructions(2, 2, 4, 2)


def test_what_qemu_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = layer(2, 3)
    source = generate(graph)
    with pytest.raises(UsageError, match="no CPU 'z80' under QEMU; known: cortex-m3"):
        run_qemu(graph, source, [[1, 2, 3]], "z80")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolError, match="apt-get install qemu-system-arm"):
        run_qemu(graph, source, [[1, 2, 3]], "cortex-m55")


def test_the_program_for_qemu_compiles_and_fits(tmp_path: Path) -> None:
    """QEMU itself is left to `make evidence`; pip does not have it."""
    graph = layer(8, 4000)
    source = generate(graph, certified=True)
    for name, target in MACHINES.items():
        folder = tmp_path / name
        folder.mkdir()
        core = Cpu(target.compiler, "", ARM)
        elf = build.firmware(source.files, folder, target.memory, main="qemu.c", cpu=core)
        image = read_image(elf)
        check_fit(image, target.memory)
        assert image.constant_bytes >= source.table_bytes
