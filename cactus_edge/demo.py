"""The whole main job on the embedded digits: train, convert, certify, attack, time, emulate.

Everything below is what the verbs do, in one process, with every result kept as a file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from cactus_edge import certificate_stream, check, datasets, files, flatbuffer, inputs
from cactus_edge.certify import Request, Settings, certify
from cactus_edge.errors import PropertyNotMetError
from cactus_edge.inputs import Perturbation
from cactus_edge.runtime import Session

VARIANTS = (("int8", 8, 0.0), ("int4, 70 % sparse", 4, 0.7))
RECIPE = "digits.toml"
_LATENCY_RUNS = 300
_EMULATED = 20


class DemoRow(msgspec.Struct, frozen=True):
    """One line of the table.

    ``latency`` in microseconds on this machine; ``instructions`` of one inference on an emulated
    Cortex-M4, None for the float network.
    """

    model: str
    standard_accuracy: float
    certified_accuracy: float
    attack_accuracy: float
    bytes: int
    latency: float
    instructions: int | None
    verifier: str


class DemoResult(msgspec.Struct, frozen=True):
    """The table, and where the files are."""

    data: str
    epsilon: str
    samples: int
    rows: tuple[DemoRow, ...]
    files: tuple[str, ...]
    seconds: float


def recipe_path(name: str = RECIPE) -> Path:
    """A recipe that ships with the package, or lies in the repository beside it."""
    package = Path(__file__).resolve().parent
    shipped = package / "recipes" / name
    return shipped if shipped.exists() else package.parent / "recipes" / name


def run(
    output: Path,
    *,
    train_progress: object = None,
    say: Callable[[str], None] = lambda text: None,
    force: bool = False,
) -> DemoResult:
    """Run the demo and write its files to ``output``.

    Raises:
        OutputError: ``output`` holds an earlier demo and ``force`` is not given.
        PropertyNotMetError: the independent checker does not agree with a certificate.
    """
    from cactus_edge.train import load_recipe, lower, train

    started = time.monotonic()
    recipe = load_recipe(recipe_path())
    run_directory = output / "run"
    say(f"training {recipe.network.name} on {recipe.data.name} ({recipe_path().name})")
    summary = train(recipe, run_directory, force=force, progress=train_progress)  # type: ignore[arg-type]
    data = datasets.load(recipe.data.name, "test")
    epsilon = f"{summary.epsilon:g}"
    rows = [_float_row(run_directory, summary.members[0].test.certified, data, epsilon)]
    written = [run_directory / "model.safetensors"]
    for label, bits, sparsity in VARIANTS:
        say(f"converting, certifying, attacking and emulating {label}")
        stem = f"digits-int{bits}"
        model = output / f"{stem}.tflite"
        lower.convert(run_directory, model, bits=bits, sparsity=sparsity, force=force)
        row, certificate_path = _deployed_row(label, model, data, epsilon, force)
        rows.append(row)
        written += [model, certificate_path]
    result = DemoResult(
        data=f"{data.name} {data.split}",
        epsilon=epsilon,
        samples=len(data.labels),
        rows=tuple(rows),
        files=tuple(str(path) for path in written),
        seconds=round(time.monotonic() - started, 1),
    )
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    files.write(output / "results.json", text + b"\n", force=force)
    return result


def _float_row(directory: Path, certified: float, data: datasets.Dataset, epsilon: str) -> DemoRow:
    """The trained float network: its own bounds, a gradient attack, torch's latency."""
    from cactus_edge.train.measure import float_measurement

    measured = float_measurement(directory, data, float(epsilon), runs=_LATENCY_RUNS)
    return DemoRow(
        model="float32",
        standard_accuracy=measured.standard_accuracy,
        certified_accuracy=certified,
        attack_accuracy=measured.attack_accuracy,
        bytes=(directory / "model.safetensors").stat().st_size,
        latency=measured.latency,
        instructions=None,
        verifier="interval with elided margin, in floats: no certificate of any device",
    )


def _deployed_row(
    label: str, model: Path, data: datasets.Dataset, epsilon: str, force: bool
) -> tuple[DemoRow, Path]:
    from firmware_sim import simulate

    graph, content = flatbuffer.load(model)
    request = Request(
        data, Perturbation.epsilon(epsilon), attack=Settings(), models=((model.name, content),)
    )
    path = model.with_suffix(".certificate.jsonl")
    head, summary = certify(request, path, force=force)
    with certificate_stream.reading(path) as claim:
        checked = check.check(claim, [content], data)
    if not checked.agrees:
        raise PropertyNotMetError(f"{path}: the checker does not agree: {checked.problems[0]}")
    stored = inputs.stored(graph, data.images)
    session = Session(graph)
    emulated = simulate(graph, stored[:_EMULATED], cpu="cortex-m4")
    if not np.array_equal(emulated.outputs, session.run(stored[:_EMULATED])):
        raise PropertyNotMetError(f"{model}: the emulated Cortex-M4 computed other integers")
    row = DemoRow(
        model=label,
        standard_accuracy=summary.standard_accuracy,
        certified_accuracy=summary.certified_accuracy,
        attack_accuracy=summary.attack_accuracy or 0.0,
        bytes=len(content),
        latency=_latency(lambda: session.run(stored[:1])),
        instructions=int(emulated.instructions.median),
        verifier=head.verifier,
    )
    return row, path


def _latency(call: Callable[[], object]) -> float:
    """Median of single calls, in microseconds, after a warm-up."""
    for _ in range(20):
        call()
    times: list[float] = []
    for _ in range(_LATENCY_RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
