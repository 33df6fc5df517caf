"""The verbs ``warm-up`` and ``explain``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cactus_edge import flatbuffer, profiles
from cactus_edge.cli.options import ModelArgument, training_samples
from cactus_edge.cli.output import JsonOption, bar, emit, table

TierOption = Annotated[
    str | None, typer.Option("--tier", help="Instructions to use; the fastest there are without.")
]


class WarmUpOutput(msgspec.Struct, frozen=True):
    """What ``warm-up --json`` prints: seconds by tier, near 0 where the cache had the kernels."""

    tiers: dict[str, float]
    models: dict[str, float]
    cache: str


def warm_up(
    models: Annotated[
        list[Path] | None, typer.Argument(help=".tflite files to load too.", metavar="MODEL")
    ] = None,
    tier: TierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile the kernels into the cache on disk, and choose the layouts of models.

    What is then loaded starts at once. Example: cactus-edge warm-up model.tflite
    """
    from cactus_edge.certify.intervals import IntervalSession
    from cactus_edge.kernels.simd.tiers import choose
    from cactus_edge.kernels.walk import cache_folder, walker
    from cactus_edge.runtime import Session

    chosen = choose(tier)
    loaded = [(path, *flatbuffer.load(path)) for path in models or ()]
    seconds: dict[str, float] = {}
    with bar("warm-up", "models") as progress:
        begin = time.perf_counter()
        walker(chosen)
        compiled = time.perf_counter() - begin
        for number, (path, graph, _) in enumerate(loaded, 1):
            begin = time.perf_counter()
            session = Session(graph, tier=chosen)
            IntervalSession(profiles.resolve(graph), tier=chosen)
            del session
            seconds[str(path)] = time.perf_counter() - begin
            progress(number, len(loaded))
    folder = cache_folder()
    shown = WarmUpOutput({str(chosen): compiled}, seconds, "" if folder is None else str(folder))
    rows = [
        (f"kernels, {chosen}", f"{compiled:.2f}"),
        *((name, f"{value:.2f}") for name, value in seconds.items()),
        ("kept in", shown.cache or "nothing could be kept"),
    ]
    emit(shown, as_json, table("ready", ("", "seconds"), rows))


class ExplainedLayer(msgspec.Struct, frozen=True):
    """One layer.

    ``share``: of the dot products at best, with zeros counted as work. ``live``: of the inputs that
    are not skipped, in groups of four or eight; None where none is, or it is not known.
    """

    name: str
    kind: str
    kernel: str
    sparsity: float
    packed_bytes: int
    multiplications: int
    microseconds: float
    share: float | None
    live: float | None


class ExplainOutput(msgspec.Struct, frozen=True):
    """What ``explain --json`` prints. ``ceiling`` in GMAC/s; None on the plain tier."""

    model: str
    tier: str
    batch: bool
    ceiling: float | None
    packed_bytes: int
    layers: tuple[ExplainedLayer, ...]


def explain(
    model: ModelArgument,
    batch: Annotated[bool, typer.Option("--batch", help="As in batches, not one image.")] = False,
    layout: Annotated[
        str, typer.Option("--layout", help="auto, dense, sparse, blocks, bitmask or skipping.")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data set whose training samples show which activations are zero.",
            metavar="NAME",
        ),
    ] = None,
    tier: TierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print which kernel each layer runs, its size and time, and how near the ceiling that is.

    Example: cactus-edge explain model.tflite --data mnist
    """
    from cactus_edge.bench import ceilings
    from cactus_edge.errors import ToolError
    from cactus_edge.kernels.replay import SAMPLES
    from cactus_edge.runtime import Session

    graph, _ = flatbuffer.load(model)
    samples = None if data is None else training_samples(data, SAMPLES, graph)
    with bar("explain", "layers") as progress:
        session = Session(graph, tier=tier, layout=layout, calibration=samples)
        try:
            best = ceilings.measure().products
        except ToolError:
            best = None
        found = session.explain(batch=batch, progress=progress)
    layers = tuple(
        ExplainedLayer(
            layer.name,
            layer.kind,
            layer.kernel,
            layer.sparsity,
            layer.packed_bytes,
            layer.multiplications,
            layer.microseconds,
            None if best is None else _rate(layer.multiplications, layer.microseconds) / best,
            layer.live,
        )
        for layer in found
    )
    size = sum(layer.packed_bytes for layer in layers)
    shown = ExplainOutput(model.name, str(session.tier), batch, best, size, layers)
    rows = [
        (
            layer.name,
            layer.kernel,
            f"{100 * layer.sparsity:.0f}",
            f"{layer.packed_bytes:,}",
            f"{layer.microseconds:.2f}",
            "-" if layer.share is None or not layer.multiplications else f"{100 * layer.share:.0f}",
            "-" if layer.live is None else f"{100 * layer.live:.0f}",
        )
        for layer in layers
    ]
    columns = ("layer", "kernel", "zeros %", "bytes", "us", "% of peak", "live %")
    peak = "" if best is None else f", dot products at best {best:.0f} GMAC/s"
    emit(shown, as_json, table(f"{model.name} on {shown.tier}{peak}", columns, rows))


def _rate(multiplications: int, microseconds: float) -> float:
    """Thousand millions a second; those with zeros are counted, as if the layer were dense."""
    return multiplications / max(microseconds, 1e-3) / 1e3


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command("warm-up")(warm_up)
    app.command()(explain)
