"""Generated firmware on emulated boards: instructions, self-certification and faults."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.certify import Certifier
from cactus_edge.csource import generate
from cactus_edge.execute import execute
from cactus_edge.graph import (
    Activation,
    Conv2D,
    FullyConnected,
    Graph,
    Linear,
    Operator,
    Pad,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from firmware_sim import (
    BOARDS,
    Injector,
    Simulation,
    certify_board,
    certify_host,
    certify_qemu,
    flip_tables,
    run_qemu,
    simulate,
)
from firmware_sim.injection import PLACES
from firmware_sim.qemu import MACHINES
from firmware_sim.simulation import simulate_source
from tests.evidence import results

MODEL = Path(__file__).resolve().parents[2] / "models" / "mnist-0.1" / "model.tflite"
ONE_OF_EACH = ("RP2040", "STM32L152RE", "STM32F405", "STM32H743", "nRF5340", "ESP32-C3")
CERTIFYING = ("RP2040", "STM32F405", "STM32H743", "nRF5340", "ESP32-C3")
COMPRESSIONS = ((8, 0.0), (4, 0.0), (8, 0.8), (4, 0.8), (4, 0.9))
COMMAND = "make evidence-firmware"

INFERENCES = 100
PRODUCTS = 637_608
SAMPLES = 1000
RADII = (2, 13, 25)
FLIPS = 10_000
FLIP_INPUTS = 20
FLIPS_ON_BOARD = 500
DRAWN = 500


def small_cnn(bits: int, sparsity: float) -> Graph:
    """Conv16 5x5 /2, conv32 4x4 /2, fc100, fc10 on 28x28, random weights of fixed sparsity."""
    rng = np.random.default_rng(0)
    tensors = [Tensor("x", (1, 28, 28, 1), quantization=Quantization.of(1 / 255, -128))]
    operators: list[Operator] = []

    def head(shape: tuple[int, ...], scaling: Quantization | None = None) -> dict[str, object]:
        source = tensors[-1]
        tensors.append(replace(source, shape=shape, quantization=scaling or source.quantization))
        place = len(tensors) - 1
        return {"name": f"layer{place}", "inputs": (place - 1,), "output": place}

    def linear(kind: type[Linear], weights: tuple[int, ...], output: tuple[int, ...]) -> None:
        largest = (1 << (bits - 1)) - 1
        values = rng.integers(1, largest + 1, weights) * rng.choice([-1, 1], weights)
        values.flat[rng.permutation(values.size)[: round(sparsity * values.size)]] = 0
        scale = 2 / (largest * np.sqrt(values[0].size * (1 - sparsity)))
        scale_bits = np.full(1, scale, np.float32).view(np.uint32)
        last = output == (1, 10)
        operators.append(
            kind(
                **head(output, Quantization.of(0.02, 0 if last else -128)),  # type: ignore
                weights=Weights(values, bits, scale_bits),
                bias=rng.integers(-50, 50, weights[0]),
                activation=Activation.NONE if last else Activation.RELU,
                **({"stride": (2, 2)} if kind is Conv2D else {}),
            )
        )

    def pad(around: tuple[int, int], extent: int, channels: int) -> None:
        paddings = ((0, 0), around, around, (0, 0))
        shape = (1, extent, extent, channels)
        operators.append(Pad(**head(shape), paddings=paddings))  # type: ignore

    pad((2, 1), 31, 1)
    linear(Conv2D, (16, 5, 5, 1), (1, 14, 14, 16))
    pad((1, 1), 16, 16)
    linear(Conv2D, (32, 4, 4, 16), (1, 7, 7, 32))
    operators.append(Reshape(**head((1, 1568))))  # type: ignore
    linear(FullyConnected, (100, 1568), (1, 100))
    linear(FullyConnected, (10, 100), (1, 10))
    return Graph(tuple(tensors), tuple(operators), 0, len(tensors) - 1)


@pytest.mark.evidence
def test_instructions() -> None:
    """Every board and compression; all outputs equal the reference executor's."""
    rows: list[dict[str, object]] = []
    first: dict[str, tuple[int, int]] = {}
    medians: dict[tuple[str, int, float], list[int]] = {}
    for bits, sparsity in COMPRESSIONS:
        graph = small_cnn(bits, sparsity)
        table_bytes = generate(graph).table_bytes
        rng = np.random.default_rng(0)
        samples = rng.integers(-128, 128, (INFERENCES, *graph.tensors[0].shape[1:]))
        expected = execute(graph, samples)
        assert len(np.unique(expected)) > 50
        for name in ONE_OF_EACH:
            run = simulate(graph, samples, cpu=BOARDS[name].cpu, board=name)
            np.testing.assert_array_equal(run.outputs, expected)
            apart = simulate(graph, samples[:5], cpu=run.board.cpu, board=name, by_layer=True)
            counts = list(apart.layer_instructions)
            medians[name, bits, sparsity] = [run.instructions.median, *counts]
            instructions, tables = first.setdefault(name, (run.instructions.median, table_bytes))
            assert run.code_bytes < 8192, (name, bits, sparsity)
            if BOARDS[name].cpu == "cortex-m4":
                usual = medians[name, bits, 0.0][1:]
                pairs = zip(counts, usual, strict=True)
                assert all(one <= other for one, other in pairs), (bits, sparsity)
            rows.append(
                {
                    "board": name,
                    "CPU": BOARDS[name].cpu,
                    "weights": f"int{bits}",
                    "zeros": f"{sparsity:.0%}",
                    "instructions (median)": f"{run.instructions.median:,}",
                    "of dense int8": f"{run.instructions.median / instructions:.1%}",
                    "without DSP": _portable(graph, samples[:5], name),
                    "by layer": " ".join(f"{n:,}" for n in counts if n),
                    "cycles (estimate)": _estimate(run),
                    "flash": f"{run.flash_bytes:,}",
                    "tables": f"{table_bytes:,}",
                    "tables of dense int8": f"{table_bytes / tables:.1%}",
                    "code": f"{run.code_bytes:,}",
                    "RAM": f"{run.ram_bytes:,}",
                    "stack": f"{run.stack_bytes:,}",
                }
            )
    whole, pruned = (medians["STM32F405", 8, sparsity][0] for sparsity in (0.0, 0.8))
    assert whole <= 3.5 * PRODUCTS and pruned <= 0.45 * whole
    results.write(
        "firmware",
        "Firmware on emulated boards",
        "A PAD and a convolution of 16 channels (5x5, stride 2), a PAD and one of 32 (4x4, stride "
        "2), fully connected layers of 100 and 10, on 28x28 pixels: 166,550 parameters, "
        f"{PRODUCTS:,} "
        "multiplications when dense. Weights are random with the given share of zeros. "
        f"{INFERENCES} inputs each, all outputs equal to `execute`; instructions are exact. Those "
        "by layer, in this order, are of a build whose layers are not inlined, which takes up to "
        "a sixth more. `without DSP` is C without instructions of the DSP extension. Cycles are "
        "an estimate without wait states, from least to most, see "
        "[docs/firmware.md](../firmware.md); the cores without one have no table in their manual. "
        "`tables` are weights, biases and factors, `code` is the rest of flash. On a Cortex-M4 no "
        "sparse layer takes more instructions than the dense one of the same width. "
        "ziglang 0.17.1, `-O2`. Self-certification: "
        "[firmware-certified.md](firmware-certified.md); faults: "
        "[firmware-faults.md](firmware-faults.md); QEMU: [firmware-qemu.md](firmware-qemu.md).",
        rows,
        COMMAND,
    )


def _estimate(run: Simulation) -> str:
    return "" if run.cycles is None else f"{run.cycles.minimum:,} to {run.cycles.maximum:,}"


def _portable(graph: Graph, samples: np.ndarray, board: str) -> str:
    """Median instructions of C without assembly; empty for cores that have none."""
    if BOARDS[board].cpu not in ("cortex-m4", "cortex-m7", "cortex-m33"):
        return ""
    source = generate(graph)
    text = "#define CACTUS_EDGE_PORTABLE\n" + source.files["cactus_edge.c"]
    source = replace(source, files={**source.files, "cactus_edge.c": text})
    run = simulate_source(graph, source, samples, BOARDS[board])
    np.testing.assert_array_equal(run.outputs, execute(graph, samples))
    return f"{run.instructions.median:,}"


def test_the_guide_quotes_what_was_counted() -> None:
    """The table of docs/firmware.md, row by row."""
    guide = (results.FOLDER.parent / "firmware.md").read_text(encoding="utf-8")
    table = guide[guide.index("| weights | zeros | portable C |") :].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + len(COMPRESSIONS)
    for row in json.loads((results.FOLDER / "firmware.json").read_bytes())["rows"]:
        if row["board"] == "STM32F405":
            cells = ("weights", "zeros", "without DSP", "instructions (median)")
            assert f"| {' | '.join(row[cell] for cell in cells)} |" in table


@pytest.mark.evidence
def test_boards_certify_as_the_host_does(data_dir: Path) -> None:
    """Label, verdict, method and bounds of each image and radius."""
    graph, _ = flatbuffer.load(MODEL)
    stored = inputs.stored(graph, datasets.load("mnist", "test").images[:SAMPLES])
    certifier = Certifier(graph)
    assert certifier.coverage.universal, "one profile speaks for all"
    source = generate(graph, certified=True)
    plain = generate(graph)
    predicted = certifier.predictions(stored)
    rows: list[dict[str, object]] = []
    for name in CERTIFYING:
        usual = simulate(graph, stored[:INFERENCES], cpu=BOARDS[name].cpu, board=name)
        for radius in RADII:
            lower, upper = inputs.around(graph, stored, np.array(radius))
            lines = certifier.verdicts(0, stored, lower, upper, predicted)
            [(low, high)] = certifier.bounds(lower, upper)
            found = certify_board(graph, source, stored, radius, BOARDS[name])
            expected = np.array([line.verdict == "certified" for line in lines])
            by_bounds = (found.leads >= 0).all(axis=1)
            method = np.array([line.method == "interval" for line in lines])
            wrong = (found.labels != predicted) | (found.certified != expected)
            wrong |= (found.lower != low).any(axis=1) | (found.upper != high).any(axis=1)
            wrong |= expected & (by_bounds != method)
            assert not wrong.any()
            rows.append(
                {
                    "board": name,
                    "CPU": BOARDS[name].cpu,
                    "radius": radius,
                    "images": len(stored),
                    "certified": int(expected.sum()),
                    "by margin alone": int((found.certified & ~by_bounds).sum()),
                    "disagreements": int(wrong.sum()),
                    "instructions (median)": f"{int(np.median(found.instructions)):,}",
                    "of plain inference": f"{usual.instructions.median:,}",
                    "arena": f"{source.arena_bytes:,} ({plain.arena_bytes:,})",
                }
            )
    results.write(
        "firmware-certified",
        "Self-certifying inference on emulated boards",
        f"`models/mnist-0.1` under its predicted label, {SAMPLES} test images, radii in stored "
        "levels of 255 a unit. Label, verdict, method (interval or elided margin) and both bounds "
        "of every logit are compared with `certify`; any difference fails. The arena is that of "
        "self-certification, in brackets that of plain inference.",
        rows,
        COMMAND,
    )


@pytest.mark.evidence
def test_another_emulator_agrees(data_dir: Path) -> None:
    """QEMU on the cores that both have, and on the Cortex-M55 with and without vectors."""
    graph, _ = flatbuffer.load(MODEL)
    stored = inputs.stored(graph, datasets.load("mnist", "test").images[:SAMPLES])
    expected = execute(graph, stored)
    sources = {False: generate(graph), True: generate(graph, certified=True)}
    radii = np.tile(RADII, len(stored))[: len(stored)]
    by_host = certify_host(graph, sources[True], stored, radii)
    rows: list[dict[str, object]] = []
    for cpu in MACHINES:
        differing = int((run_qemu(graph, sources[False], stored, cpu) != expected).sum())
        found = certify_qemu(graph, sources[True], stored, radii, cpu)
        fields = ("labels", "certified", "margins", "leads", "logits", "lower", "upper")
        verdicts = sum(int((getattr(found, f) != getattr(by_host, f)).sum()) for f in fields)
        assert differing == verdicts == 0
        rows.append(
            {
                "CPU": cpu,
                "machine": MACHINES[cpu].name,
                "images": len(stored),
                "differing outputs": differing,
                "differing fields of verdicts": verdicts,
            }
        )
    results.write(
        "firmware-qemu",
        "Firmware in another emulator",
        "`models/mnist-0.1` in QEMU's system emulation: outputs against `execute`, and labels, "
        "verdicts, margins and bounds of self-certifying inference (radii "
        f"{', '.join(map(str, RADII))} in turn) against the build for this computer, which the "
        "tests compare with `certify`.",
        rows,
        COMMAND,
    )


@pytest.mark.evidence
def test_faults(data_dir: Path) -> None:
    """Every single-bit flip of the tables is found; what passes without a check is counted."""
    graph, _ = flatbuffer.load(MODEL)
    images = datasets.load("mnist", "test").images[:FLIP_INPUTS]
    stored = inputs.stored(graph, images)
    source = generate(graph)
    rng = np.random.default_rng(0)
    flips = np.stack([rng.integers(source.table_bytes, size=FLIPS), rng.integers(8, size=FLIPS)], 1)
    found = flip_tables(graph, source, flips, stored)
    assert found.noticed.all()
    rows = [
        _row(
            "this computer",
            "tables, before the start",
            FLIPS,
            Counter(detected=int(found.noticed.sum())),
        ),
        _row(
            "this computer",
            f"tables, no check, {FLIP_INPUTS} images",
            found.labels.size,
            Counter(
                {
                    "crash": int((found.labels < 0).sum()),
                    "wrong-label": int(((found.labels != found.right) & (found.labels >= 0)).sum()),
                }
            ),
        ),
    ]
    for name in CERTIFYING:
        device = Injector(graph, source, stored[:1], BOARDS[name])
        start = [device.run(device.draw(rng, "weights", start=True)) for _ in range(FLIPS_ON_BOARD)]
        # A few bytes behind the tables only fill up a word: a flip there is masked.
        padding = device.sizes()["weights"] - source.table_bytes
        assert set(start) <= ({"detected", "masked"} if padding else {"detected"})
        rows.append(_row(name, "constants, before the start", len(start), Counter(start)))
        for place in PLACES:
            drawn = [device.run(device.draw(rng, place)) for _ in range(DRAWN)]
            what = (
                "constants, the rest erased" if place == "truncated" else f"{place}, while running"
            )
            rows.append(_row(name, what, len(drawn), Counter(drawn)))
    results.write(
        "firmware-faults",
        "Faults in firmware",
        f"`models/mnist-0.1`. {FLIPS:,} single bits of weights and tables, flipped in a build for "
        "this computer: `init` finds all of them, and where nobody checks, the share below gets "
        "another label. On emulated boards bits are drawn uniformly from constants, code, static "
        "RAM and general registers, instructions uniformly from one inference; what happens while "
        "it runs is after the check of the CRC. Silent are `other-logits` and `wrong-label`.",
        rows,
        COMMAND,
    )


def _row(where: str, what: str, count: int, outcomes: Counter[str]) -> dict[str, object]:
    names = ("detected", "masked", "other-logits", "wrong-label", "crash", "hang")
    shown = {name: f"{outcomes[name]} ({outcomes[name] / count:.2%})" for name in names}
    if where == "this computer" and "no check" in what:
        rest = count - sum(outcomes.values())
        shown["masked"] = f"{rest} ({rest / count:.2%}) same label"
    return {"where": where, "fault": what, "runs": count, **shown}
