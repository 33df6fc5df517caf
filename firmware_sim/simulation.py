"""One call from graph to what a microcontroller computes and needs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy.typing as npt

from cactus_edge import Graph, profiles
from cactus_edge.csource import CSource, Layout, generate
from cactus_edge.errors import DataError
from firmware_sim import build, console
from firmware_sim.boards import Board, board_named, board_of
from firmware_sim.emulator import BlockCounter, Machine
from firmware_sim.host import Stored, as_tensor, split_trace, stored_inputs
from firmware_sim.image import Image, check_fit, read_image
from firmware_sim.timing import Cycles, Mix


@dataclass(frozen=True)
class Instructions:
    """Of one inference, exact, over ``samples`` inputs."""

    minimum: int
    median: int
    maximum: int
    samples: int

    @staticmethod
    def of(counts: list[int]) -> Instructions:
        """Summary of counts, at least one; the median of an even number is the lower one."""
        ordered = sorted(counts)
        return Instructions(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1], len(ordered))


@dataclass(frozen=True)
class Simulation:
    """What ran, and what it needs of the board.

    ``outputs`` are [n, ...] in their stored type. Flash is code (with vector table and start-up),
    constants (weights and tables) and initial data. ``ram_bytes`` is all static data: the arena,
    the caller's input and output; ``stack_bytes``, the deepest stack, comes on top. ``layers`` are
    activations by tensor index; with a trace the calls that report them count as instructions.
    ``layer_instructions``, if asked for, are medians by operator, 0 for one that moves nothing;
    layers are not inlined then, which makes an inference a few percent longer. ``cycles`` is an
    estimate, for cores of which the manual says what instructions take.
    """

    board: Board
    outputs: Stored
    instructions: Instructions
    flash_bytes: int
    code_bytes: int
    constant_bytes: int
    ram_bytes: int
    arena_bytes: int
    stack_bytes: int
    layers: Mapping[int, Stored]
    layer_instructions: tuple[int, ...] = ()
    cycles: Cycles | None = None


def simulate(
    graph: Graph,
    inputs: npt.ArrayLike,
    *,
    profile: str = profiles.DEFAULT,
    cpu: str | None = None,
    board: str | Board | None = None,
    trace: bool = False,
    by_layer: bool = False,
    layout: Layout = Layout.AUTO,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Generate, compile for the board, and run every input; equals ``execute`` bit by bit.

    Args:
        graph: resolved, or else resolved under ``profile``.
        inputs: stored integers [n, ...], at least one sample.
        profile: name of a rounding profile.
        cpu: a key of ``CPUS``; None for the board's, or without one for a Cortex-M4.
        board: a key of ``BOARDS``, a board of your own, or None for the first one with this CPU.
        trace: also return every activation.
        by_layer: also count the instructions of each layer.
        layout: of the weights, see ``cactus_edge.csource``.
        progress: called with (samples done, samples in all).

    Raises:
        UsageError: an unknown name.
        DoesNotFitError: the board is too small for the model.
        MissingExtraError: a package of the extra ``sim`` is not installed.
        ToolError: the compiler or the emulator failed.
    """
    target = board_of(cpu, board)
    source = generate(graph, profile, layout=layout)
    return simulate_source(graph, source, inputs, target, trace, by_layer, progress)


def fit(source: CSource, board: str | Board) -> Image:
    """Compile C with the default prefix for a board; what the image takes.

    With a console, where there is one: its code, its buffers, and a driver of a few instructions.

    Raises:
        UsageError: no board of this name.
        DoesNotFitError: the board is too small; the message says what needs most.
        MissingExtraError: a package of the extra ``sim`` is not installed.
        ToolError: the compiler failed.
    """
    target = board_named(board)
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        if texts := console.texts_of(source):
            program = console.console_program(texts, Path(name), target)
        else:
            program = build.firmware(source.files, Path(name), target)
        image = read_image(program)
    check_fit(image, target, source.layers)
    return image


def simulate_source(
    graph: Graph,
    source: CSource,
    inputs: npt.ArrayLike,
    board: Board,
    trace: bool = False,
    by_layer: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """``simulate`` of C that was generated before, with the default prefix."""
    data = stored_inputs(graph, inputs)
    if not len(data):
        raise DataError("there are no inputs to simulate")
    traced: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        folder = Path(name)
        program = build.firmware(source.files, folder, board, trace=trace, by_layer=by_layer)
        image = read_image(program)
        callback = (lambda layer, content: traced.append(content)) if trace else None
        machine = Machine(board, image, trace=callback, layers=source.layers)
        counter = BlockCounter(image, board, folder)
        counter.attach(machine.engine)
        meter = _LayerMeter(machine, counter, len(source.layers))
        outputs: list[bytes] = []
        counts: list[int] = []
        mixes: list[tuple[Mix, int]] = []
        for sample in data:
            outputs.append(machine.infer(sample.tobytes(), source.output_bytes))
            counts.append(meter.take())
            mixes.append(counter.take_mix())
            if progress is not None:
                progress(len(counts), len(data))
    layers = split_trace(graph, source.layers, b"".join(traced)) if trace else {}
    return Simulation(
        board,
        as_tensor(graph, graph.logits, b"".join(outputs)),
        Instructions.of(counts),
        image.flash_bytes,
        image.code_bytes,
        image.constant_bytes,
        image.static_bytes,
        source.arena_bytes,
        machine.stack_bytes(),
        layers,
        meter.medians() if by_layer else (),
        Cycles.of(board.cpu, *zip(*mixes, strict=True)),
    )


class _LayerMeter:
    """Instructions of each layer, from the entry of its function to that of the next one's."""

    def __init__(self, machine: Machine, counter: BlockCounter, layers: int) -> None:
        self._counter = counter
        self._current = layers  # what is before the first layer
        self._counts = [0] * (layers + 1)
        self._samples: list[list[int]] = []
        for index in range(layers):
            # Without ``by_layer`` a few functions may be left; nobody asks for them.
            address = machine.image.function(f"layer_{index}")
            if address:
                machine.at(address, partial(self._entered, index, address))

    def _entered(self, index: int, address: int) -> None:
        self._counts[self._current] += self._counter.split(address)
        self._current = index

    def take(self) -> int:
        """All instructions since the last call, noted layer by layer."""
        self._counts[self._current] += self._counter.take()
        total = sum(self._counts)
        self._samples.append(self._counts)
        self._current = len(self._counts) - 1
        self._counts = [0] * len(self._counts)
        return total

    def medians(self) -> tuple[int, ...]:
        """By layer."""
        columns = list(zip(*self._samples, strict=True))[:-1]
        return tuple(Instructions.of(list(column)).median for column in columns)
