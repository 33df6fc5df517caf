"""Estimated cycles: classes of instructions, jumps, and ranges from manuals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import random_graph, random_inputs
from unicorn.unicorn_const import UC_HOOK_CODE

from cactus_edge.csource import generate
from firmware_sim import BOARDS, build, simulate
from firmware_sim.emulator import BlockCounter, Machine, instruction_bytes
from firmware_sim.image import read_image
from firmware_sim.timing import CLASSES, TIMINGS, Class, Cycles, classify

# What the assembler makes of each, in the order in which it stands in the image.
ASSEMBLY = {
    "cortex-m4": (
        ("adds r0, r1, r2", Class.OTHER, 0),
        ("muls r0, r1, r0", Class.MULTIPLY, 0),
        ("mul r8, r9, r10", Class.MULTIPLY, 0),
        ("mla r0, r1, r2, r3", Class.ACCUMULATE, 0),
        ("smlad r0, r1, r2, r3", Class.ACCUMULATE, 0),
        ("smull r0, r1, r2, r3", Class.LONG, 0),
        ("umull r0, r1, r2, r3", Class.LONG, 0),
        ("smlal r0, r1, r2, r3", Class.LONG_ACCUMULATE, 0),
        ("umlal r0, r1, r2, r3", Class.LONG_ACCUMULATE, 0),
        ("sdiv r0, r1, r2", Class.DIVIDE, 0),
        ("udiv r0, r1, r2", Class.DIVIDE, 0),
        ("ldr r0, [r1, #4]", Class.SINGLE, 0),
        ("ldrsb r0, [r1, r2]", Class.SINGLE, 0),
        ("strb r0, [r1]", Class.SINGLE, 0),
        ("ldr r0, [sp, #8]", Class.SINGLE, 0),
        ("ldr r9, [r1], #4", Class.SINGLE, 0),
        ("ldrsh.w r9, [r1, #200]", Class.SINGLE, 0),
        ("strh r9, [r1, #2]", Class.SINGLE, 0),
        ("ldrd r0, r1, [r2]", Class.MULTIPLE, 2),
        ("push {r4, r5, lr}", Class.MULTIPLE, 3),
        ("push {r4, r9, r10, lr}", Class.MULTIPLE, 4),
        ("pop {r4, r5, pc}", Class.MULTIPLE, 3),
        ("ldm r0!, {r1, r2, r3, r4}", Class.MULTIPLE, 4),
        ("stm r0!, {r1, r8}", Class.MULTIPLE, 2),
        ("lsls r0, r1, #3", Class.OTHER, 0),
        ("movw r0, #1234", Class.OTHER, 0),
        ("sxtb r0, r1", Class.OTHER, 0),
        ("sxtb16 r0, r1, ror #8", Class.OTHER, 0),
        ("bic r0, r0, #0x0f0f0f0f", Class.OTHER, 0),
        ("it eq", Class.IT, 0),
        ("moveq r0, r1", Class.OTHER, 0),
        ("nop", Class.OTHER, 0),
        ("bl reset", Class.OTHER, 0),
        ("bx lr", Class.OTHER, 0),
    ),
    "cortex-m0plus": (
        ("muls r0, r1, r0", Class.MULTIPLY, 0),
        ("ldr r0, [r1, r2]", Class.SINGLE, 0),
        ("ldrsh r0, [r1, r2]", Class.SINGLE, 0),
        ("strb r0, [r1, #3]", Class.SINGLE, 0),
        ("add sp, #16", Class.OTHER, 0),
        ("adr r0, 1f\\n1:", Class.OTHER, 0),
        ("uxtb r0, r1", Class.OTHER, 0),
        ("rev r0, r1", Class.OTHER, 0),
        ("push {r0, lr}", Class.MULTIPLE, 2),
        ("stmia r0!, {r1}", Class.MULTIPLE, 1),
        ("b reset", Class.OTHER, 0),
    ),
}


@pytest.mark.parametrize("cpu", ASSEMBLY)
def test_classes_of_instructions(cpu: str, tmp_path: Path) -> None:
    lines = "".join(f'"{line}\\n"' for line, _, _ in ASSEMBLY[cpu])
    text = f"""
__attribute__((naked, used)) void reset(void) {{ __asm volatile(".align 2\\n" {lines}); }}
__attribute__((section(".vectors"), used)) static const void *const vectors[2] = {{0, reset}};
"""
    board = next(board for board in BOARDS.values() if board.cpu == cpu)
    image = read_image(build.firmware({"main.c": text}, tmp_path, board))
    code = np.frombuffer(image.segments[0][1], "<u2")
    place = (image.address("reset") - board.flash_origin) // 2
    for line, kind, registers in ASSEMBLY[cpu]:
        length = instruction_bytes(int(code[place])) // 2
        found = classify(int(code[place]), int(code[place + length - 1]))
        assert found == (kind, registers), line
        place += length


def test_classes_and_jumps_equal_single_steps(tmp_path: Path) -> None:
    """ARMv6-M, where every instruction is stepped through; a jump is one that is not behind."""
    rng = np.random.default_rng(60)
    graph = random_graph(rng, depth=3, shape=(1, 4, 4, 2))
    board, source = BOARDS["STM32L073"], generate(graph)
    image = read_image(build.firmware(source.files, tmp_path, board))
    counted, stepped = Machine(board, image), Machine(board, image)
    counter = BlockCounter(image, board, tmp_path)
    counter.attach(counted.engine)
    steps: list[tuple[int, int]] = []
    stepped.engine.hook_add(
        UC_HOOK_CODE, lambda engine, address, size, user: steps.append((address, size))
    )
    for sample in random_inputs(rng, graph, 2).astype(np.int8):
        steps.clear()
        for machine in (counted, stepped):
            machine.infer(sample.tobytes(), source.output_bytes)
        expected = np.zeros(CLASSES, np.int64)
        jumps = 1  # the call
        for index, (address, size) in enumerate(steps):
            code = bytes(stepped.engine.mem_read(address, 4))
            first, last = (int.from_bytes(code[n : n + 2], "little") for n in (0, size - 2))
            kind, registers = classify(first, last)
            expected[kind] += 1
            expected[Class.REGISTERS] += registers
            jumps += index > 0 and address != sum(steps[index - 1])
        assert counter.take() == len(steps)
        mix, found = counter.take_mix()
        np.testing.assert_array_equal(mix, expected)
        assert found == jumps
    assert counter.take_mix()[1] == 0


def test_ranges() -> None:
    mix = np.zeros(CLASSES, np.int64)
    mix[[Class.OTHER, Class.SINGLE, Class.LONG, Class.MULTIPLE, Class.REGISTERS]] = 10, 4, 2, 1, 3
    assert TIMINGS["cortex-m0plus"].cycles(mix, 5) == (10 + 8 + 2 + 4 + 5, 10 + 8 + 2 + 4 + 10)
    assert TIMINGS["cortex-m3"].cycles(mix, 5) == (10 + 4 + 6 + 4 + 5, 10 + 8 + 10 + 4 + 15)
    assert TIMINGS["cortex-m4"].cycles(mix, 5) == (10 + 4 + 2 + 4 + 5, 10 + 8 + 2 + 4 + 15)
    assert Cycles.of("cortex-m7", [mix], [5]) is None
    low, high = Cycles(1_000_000, 2_000_000, "").microjoules(100.0, 3.0)
    assert (low, high) == pytest.approx((300, 600)), "100 uA at 1 MHz for a second, at 3 V"


@pytest.mark.parametrize("cpu", ["cortex-m0plus", "cortex-m3", "cortex-m4", "rv32imc"])
def test_a_simulation_has_an_estimate(cpu: str) -> None:
    rng = np.random.default_rng(1)
    graph = random_graph(rng, depth=3, shape=(1, 4, 4, 2))
    run = simulate(graph, random_inputs(rng, graph, 3), cpu=cpu)
    if cpu == "rv32imc":
        assert run.cycles is None
        return
    assert run.cycles is not None
    assert "Technical Reference Manual" in run.cycles.source
    # An IT instruction may be free.
    assert 0.8 * run.instructions.median < run.cycles.minimum < run.cycles.maximum
    assert run.cycles.maximum < 4 * run.instructions.median
