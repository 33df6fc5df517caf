"""The verbs ``validate``, ``bench``, ``simulate`` and ``demo``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import datasets, files, flatbuffer, inputs, profiles
from cactus_edge.cli.boards import BoardOptions, show_difference, validate_board
from cactus_edge.cli.making import require_training, training_bar
from cactus_edge.cli.measuring import bench
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    bar,
    emit,
    say,
    share,
    table,
    tell,
)
from cactus_edge.errors import RuntimesDisagreeError, UsageError, counted
from cactus_edge.execute import execute

if TYPE_CHECKING:
    from cactus_edge.graph import Graph, Int64Array

ModelArgument = Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")]
SamplesOption = Annotated[int, typer.Option("--samples", "-n", help="How many test samples.")]
_SOURCE_WIDTH = 60


def _samples(graph: Graph, data: str, count: int) -> Int64Array:
    """The first ``count`` test samples as stored integers."""
    if count < 1:
        raise UsageError(f"--samples {count}: at least one sample is needed")
    return inputs.stored(graph, datasets.load(data, "test").images[:count])


def validate(
    model: Annotated[Path | None, typer.Argument(help="A .tflite file.", metavar="MODEL")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A data set's name or an .npz file.")
    ] = None,
    samples: SamplesOption = 100,
    layer_samples: Annotated[
        int,
        typer.Option(
            "--layer-samples",
            help="Samples on which every layer is compared; 4 at most on the emulated Cortex-M4.",
        ),
    ] = 32,
    profile: Annotated[
        str, typer.Option("--profile", help="Rounding profile of our own executors.")
    ] = profiles.DEFAULT,
    learn_profile: Annotated[
        bool,
        typer.Option(
            "--learn-profile",
            help="Find out by probing models which named profile each installed runtime follows; "
            "takes no model.",
        ),
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="ONNX Runtime as well, on the model's QDQ form.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="A board with the console of export-c --console, instead of runtimes: "
            "/dev/ttyACM0, COM3, socket://host:port or rfc2217://host:port.",
        ),
    ] = None,
    baud: Annotated[int, typer.Option("--baud", help="Speed of the board's line.")] = 115_200,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds to wait for the board's answers.")
    ] = 10.0,
    levels: Annotated[
        int, typer.Option("--levels", help="Radius of the proofs of a self-certifying board.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Run every installed runtime, or a board, on the same inputs and compare bit for bit.

    Example: cactus-edge validate model.tflite --data mnist --samples 1000
    """
    from cactus_edge.validate import onnx_peer, peers, validate_model

    if learn_profile:
        if model is not None or data is not None:
            raise UsageError("--learn-profile runs models of its own; give no model and no --data")
        _learn(as_json)
        return
    if model is None or data is None:
        raise UsageError("give a MODEL and --data, or --learn-profile")
    profiles.profile_of(profile)
    graph, content = flatbuffer.load(model)
    stored = _samples(graph, data, samples)
    if device is not None:
        options = BoardOptions(device, baud, timeout, levels, layer_samples)
        validate_board(model, graph, stored, options, as_json)
        return
    with bar("validate", "runtimes") as progress:
        result = validate_model(
            graph,
            stored,
            data=content,
            candidates=(*peers(profile), *([onnx_peer()] if onnx else [])),
            layer_samples=layer_samples,
            progress=progress,
        )
    rows = [
        (
            peer.name,
            peer.version or "-",
            peer.profile,
            peer.status,
            peer.elements,
            peer.mismatches,
            peer.layer_elements,
            peer.layer_mismatches,
            peer.output[:12] or peer.message,
        )
        for peer in result.peers
    ]
    columns = (
        "runtime",
        "version",
        "profile",
        "status",
        "logits",
        "differ",
        "layer elements",
        "differ",
        "output",
    )
    kind = "universal" if result.universal else "not universal"
    title = (
        f"{model.name}, {kind}, {counted(result.samples, 'sample')}: "
        f"{counted(result.outputs, 'distinct output')}; "
        f"runtimes differ in {counted(result.runtimes_differ, 'logit')}, "
        f"{counted(result.decisions_differ, 'decision')}"
    )
    emit(result, as_json, table(title, columns, rows))
    for peer in result.peers:
        if peer.first is not None:
            show_difference(peer.name, peer.first)
    if not result.agrees:
        bad = [peer.name for peer in result.peers if peer.status in ("different", "error")]
        raise RuntimesDisagreeError(f"{model}: {', '.join(bad) or 'universal outputs differ'}")


def _learn(as_json: bool) -> None:
    """``validate --learn-profile``."""
    from cactus_edge.validate import learn

    with bar("probe", "runtimes") as progress:
        found = learn(progress=progress)
    rows = [
        (
            runtime.name,
            runtime.version or "-",
            runtime.documented,
            ", ".join(runtime.fitting) or runtime.status,
            max((fit.elements for fit in runtime.fits), default=0),
            ", ".join(runtime.refused) or runtime.message or "-",
        )
        for runtime in found
    ]
    columns = ("runtime", "version", "documented", "follows", "elements", "not run")
    emit(found, as_json, table("Which rounding profile runtimes follow", columns, rows))
    run = [runtime for runtime in found if runtime.status != "absent"]
    if not run:
        raise RuntimesDisagreeError(
            "no stock runtime is installed; pip install 'cactus-edge[runtimes]'"
        )
    other = [runtime.name for runtime in run if runtime.documented not in runtime.fitting]
    if other:
        raise RuntimesDisagreeError(f"not as documented: {', '.join(other)}")


class LayerInstructions(msgspec.Struct, frozen=True):
    """Median of one layer, whose function is not inlined then."""

    index: int
    kind: str
    name: str
    instructions: int


class SimulateOutput(msgspec.Struct, frozen=True):
    """What ``simulate --json`` prints; bytes are those of the board's memories.

    Estimates are of one inference, least and most; None where the core's manual has no timings, and
    for energy without the options that it takes.
    """

    board: str
    cpu: str
    profile: str
    samples: int
    mismatches: int
    instructions_median: int
    instructions_maximum: int
    instructions_samples: int
    flash_bytes: int
    code_bytes: int
    constant_bytes: int
    ram_bytes: int
    arena_bytes: int
    stack_bytes: int
    cycles_estimate: tuple[int, int] | None = None
    cycles_source: str | None = None
    microjoules_estimate: tuple[float, float] | None = None
    layers: tuple[LayerInstructions, ...] = ()


def simulate(
    model: ModelArgument,
    data: DataOption,
    samples: SamplesOption = 100,
    cpu: Annotated[
        str | None,
        typer.Option("--cpu", help="cortex-m3, cortex-m7, ...; the board's, or cortex-m4."),
    ] = None,
    board: Annotated[
        str | None, typer.Option("--board", help="A named board instead of the CPU's usual one.")
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="Rounding profile of the C code.")
    ] = profiles.DEFAULT,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Also count the instructions of each layer.")
    ] = False,
    current: Annotated[
        float | None,
        typer.Option(
            "--microamp-per-mhz",
            help="Current in run mode, from the board's data sheet: estimates energy.",
        ),
    ] = None,
    volts: Annotated[float, typer.Option("--volts", help="Supply voltage, for energy.")] = 3.0,
    as_json: JsonOption = False,
) -> None:
    """Run the model as C on an emulated microcontroller and compare with the reference.

    Example: cactus-edge simulate model.tflite --data mnist --cpu cortex-m4
    """
    from firmware_sim import simulate as run

    if not (current is None or 0 < current < 1e6) or not 0 < volts < 100:
        raise UsageError("--microamp-per-mhz and --volts have to be above 0")
    graph, _ = flatbuffer.load(model)
    stored = _samples(graph, data, samples)
    with bar("simulate") as progress:
        result = run(
            graph,
            stored,
            profile=profile,
            cpu=cpu,
            board=board,
            by_layer=by_layer,
            progress=progress,
        )
    expected = execute(graph, stored, profile)
    counts, cycles = result.instructions, result.cycles
    if current is not None and cycles is None:
        raise UsageError(f"--microamp-per-mhz: the cycles of a {result.board.cpu} are not known")
    shown = SimulateOutput(
        board=result.board.name,
        cpu=result.board.cpu,
        profile=profile,
        samples=len(stored),
        mismatches=int((result.outputs != expected).sum()),
        instructions_median=int(counts.median),
        instructions_maximum=int(counts.maximum),
        instructions_samples=counts.samples,
        flash_bytes=result.flash_bytes,
        code_bytes=result.code_bytes,
        constant_bytes=result.constant_bytes,
        ram_bytes=result.ram_bytes,
        arena_bytes=result.arena_bytes,
        stack_bytes=result.stack_bytes,
        cycles_estimate=None if cycles is None else (cycles.minimum, cycles.maximum),
        cycles_source=None if cycles is None else cycles.source,
        microjoules_estimate=(
            None if cycles is None or current is None else cycles.microjoules(current, volts)
        ),
        layers=tuple(
            LayerInstructions(index, op.kind, op.name, count)
            for index, (op, count) in enumerate(
                zip(graph.core, result.layer_instructions, strict=by_layer)
            )
        ),
    )
    tables = [table(f"{model.name} as firmware", ("", "value"), _firmware_rows(shown))]
    if by_layer:
        lines = [(n.index, n.kind, n.name, f"{n.instructions:,}") for n in shown.layers]
        tables.append(table("layers", ("", "operator", "name", "instructions"), lines))
    emit(shown, as_json, *tables)
    if shown.mismatches:
        raise RuntimesDisagreeError(
            f"{model}: not those of the reference: {counted(shown.mismatches, 'output')}"
        )


def _firmware_rows(shown: SimulateOutput) -> list[tuple[str, object]]:
    """What ``simulate`` prints, by name; ranges as such, a long source on lines of its own."""
    rows: list[tuple[str, object]] = []
    for name, value in msgspec.structs.asdict(shown).items():
        match value:
            case int():
                text = f"{value:,}"
            case (int() as least, int() as most):
                text = f"{least:,} to {most:,}"
            case (float() as least, float() as most):
                text = f"{least:,.2f} to {most:,.2f}"
            case str():
                text = textwrap.fill(value, _SOURCE_WIDTH)
            case _:  # layers, and what is not known
                continue
        rows.append((name.replace("_", " "), text))
    return rows


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of the demonstration.")
    ] = Path("build/demo"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train, convert, certify, attack and emulate on the embedded digits.

    Example: cactus-edge demo --output build/demo
    """
    require_training("the demonstration")
    from cactus_edge import demo as demonstration

    files.refuse_existing(output / "results.json", force)
    with training_bar() as progress:
        result = demonstration.run(output, train_progress=progress, say=tell, force=force)
    rows = [
        (
            row.model,
            share(row.standard_accuracy),
            share(row.certified_accuracy),
            share(row.attack_accuracy),
            f"{row.bytes:,}",
            f"{row.latency:.1f}",
            "-" if row.instructions is None else f"{row.instructions:,}",
        )
        for row in result.rows
    ]
    columns = (
        "model",
        "standard %",
        "certified %",
        "attack %",
        "bytes",
        "latency us",
        "Cortex-M4 instructions",
    )
    title = (
        f"{result.data}, {counted(result.samples, 'sample')}, epsilon {result.epsilon}; certified: "
        f"interval bounds with elided margin ({result.seconds:.0f} s)"
    )
    emit(result, as_json, table(title, columns, rows))
    if not as_json:
        for path in result.files:
            say(str(path))


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (validate, bench, simulate, demo):
        app.command()(verb)
