"""The verb ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import files, flatbuffer
from cactus_edge.cli.options import ModelsArgument, training_samples
from cactus_edge.cli.output import ForceOption, JsonOption, bar, drawn, emit, table, tell
from cactus_edge.errors import counted

if TYPE_CHECKING:
    from rich.table import Table

    from cactus_edge.bench import Benchmark
    from cactus_edge.bench.ceilings import Ceilings
    from cactus_edge.bench.machine import State
    from cactus_edge.bench.roofline import Roof

_COLUMNS = (
    "runtime", "version", "median us", "quartiles", "x ours", "cold us", "x ours", "images/s",
    "ours x", "start s", "MiB", "outputs that differ",
)  # fmt: skip
_ROOF_COLUMNS = (
    "model", "weights in", "GMAC/s", "without zeros", "roof us", "% of it", "roof without zeros us",
    "% of it",
)  # fmt: skip


class BenchOutput(msgspec.Struct, frozen=True):
    """What ``bench --json`` prints for a model on a number of threads.

    A list of them where there are several. ``ceilings`` and ``roof`` are None unless asked for.
    """

    model: str
    model_sha256: str
    machine: str
    ours: msgspec.Raw
    peers: msgspec.Raw
    absent: dict[str, str]
    threads: int
    batch: int
    profile: str
    layout: str
    python: str
    work: msgspec.Raw
    caches: dict[str, int]
    before: msgspec.Raw
    after: msgspec.Raw
    microjoules: float | None
    ceilings: msgspec.Raw
    roof: msgspec.Raw


def bench(
    models: ModelsArgument,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", help="Threads of each runtime; repeatable. 1 without it."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Only this runtime beside ours; repeatable."),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Interleaved turns of each runtime.")
    ] = 50,
    batch: Annotated[int, typer.Option("--batch", help="Images of the throughput run.")] = 256,
    layout: Annotated[
        str, typer.Option("--layout", help="auto, dense, sparse, blocks, bitmask or skipping.")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data set whose training samples are timed, and calibrate ours; noise without it.",
            metavar="NAME",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Rounding of our runtime; LiteRT's on this CPU without it."),
    ] = None,
    starts: Annotated[
        bool, typer.Option(help="Measure start and memory, in a process for each runtime.")
    ] = True,
    ceilings: Annotated[
        bool, typer.Option("--ceilings", help="Measure what the machine can do at best.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw latency over sparsity (.svg).")
    ] = None,
    roofline: Annotated[
        Path | None, typer.Option("--roofline", help="Draw the models under the ceilings (.svg).")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time inferences beside the installed peers, interleaved in one process.

    Example: cactus-edge bench model.tflite --threads 1 --threads 2
    """
    from cactus_edge.bench import benchmark
    from cactus_edge.bench import ceilings as limits
    from cactus_edge.bench.peers import all_peers, peer_named
    from cactus_edge.kernels.replay import SAMPLES

    for path in (drawn("--plot", plot), drawn("--roofline", roofline)):
        if path is not None:
            files.refuse_existing(path, force)
    candidates = all_peers() if peer is None else [peer_named(name) for name in peer]
    loaded = [(path, *flatbuffer.load(path)) for path in models]
    best = limits.measure() if ceilings or roofline else None
    samples = None
    runs = [(path, graph, content, n) for path, graph, content in loaded for n in threads or [1]]
    results: list[tuple[Path, Benchmark]] = []
    with bar("bench", "runs") as progress:
        for path, graph, content, count in runs:
            progress(len(results), len(runs))
            if data is not None:
                samples = training_samples(data, batch + SAMPLES, graph)
            result = benchmark(
                graph,
                model=content,
                profile=profile,
                layout=layout,
                samples=samples,
                candidates=candidates,
                rounds=rounds,
                batch=batch,
                threads=count,
                starts=starts,
            )
            results.append((path, result))
    _show(results, best, as_json)
    first = [result for _, result in results if result.threads == (threads or [1])[0]]
    _draw(results, first, best, plot, roofline, force)


def _show(results: list[tuple[Path, Benchmark]], best: Ceilings | None, as_json: bool) -> None:
    """On the terminal, or as JSON."""
    roofs = [_roof(result, best) for _, result in results]
    shown = [
        _output(path, result, best, roof)
        for (path, result), roof in zip(results, roofs, strict=True)
    ]
    tables = [_table(path, result) for path, result in results]
    rows = [
        (path.name, *_roof_cells(roof))
        for (path, _), roof in zip(results, roofs, strict=True)
        if roof is not None
    ]
    if best is not None and rows:
        levels = ", ".join(f"{level} {rate:.0f} GB/s" for level, rate in best.bandwidth.items())
        title = f"Ceilings of one thread ({best.tier}): {best.products:.0f} GMAC/s, {levels}"
        tables.append(table(title, _ROOF_COLUMNS, rows))
    emit(shown[0] if len(shown) == 1 else shown, as_json, *tables)
    for _, result in results:
        for name, reason in result.absent.items():
            tell(f"{name}: {reason}")


def _draw(
    results: list[tuple[Path, Benchmark]],
    first: list[Benchmark],
    best: Ceilings | None,
    plot: Path | None,
    roofline: Path | None,
    force: bool,
) -> None:
    from cactus_edge.bench import drawing

    if plot is not None:
        title = f"{results[0][1].machine}, {counted(first[0].threads, 'thread')}"
        drawing.draw_sparsity(first, plot, title, force=force)
    if roofline is not None and best is not None:
        roofs = {path.stem: roof for path, r in results if (roof := _roof(r, best)) is not None}
        title = f"{results[0][1].machine}, 1 thread, {best.tier}"
        drawing.draw_roofline(roofs, best, roofline, title, force=force)


def _roof(result: Benchmark, best: Ceilings | None) -> Roof | None:
    """Ceilings are those of one thread."""
    from cactus_edge.bench.roofline import roof

    if best is None or result.threads != 1:
        return None
    return roof(result.work, result.ours.median_us, best)


def _output(path: Path, result: Benchmark, best: Ceilings | None, roof: Roof | None) -> BenchOutput:
    def raw(value: object) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode(value))

    return BenchOutput(
        model=path.name,
        model_sha256=result.model_sha256,
        machine=result.machine,
        ours=raw(result.ours),
        peers=raw(result.peers),
        absent=result.absent,
        threads=result.threads,
        batch=result.batch,
        profile=result.profile,
        layout=result.layout,
        python=result.python,
        work=raw(result.work),
        caches=result.caches,
        before=raw(result.before),
        after=raw(result.after),
        microjoules=result.microjoules,
        ceilings=raw(best),
        roof=raw(roof),
    )


def _table(path: Path, result: Benchmark) -> Table:
    rows: list[tuple[object, ...]] = []
    for name, figures in {"cactus-edge": result.ours, **result.peers}.items():
        start = figures.start
        memory = start.memory_kib if start else None
        rows.append(
            (
                name,
                figures.version,
                f"{figures.median_us:.2f}",
                f"{figures.lower_quartile_us:.2f} to {figures.upper_quartile_us:.2f}",
                f"{figures.ratio:.2f}",
                f"{figures.cold_us:.1f}",
                f"{figures.cold_ratio:.2f}",
                f"{figures.images_per_second:,.0f}",
                f"{figures.throughput_ratio:.2f}",
                f"{start.load_seconds:.2f}" if start else "-",
                "-" if memory is None else f"{memory / 1024:.1f}",
                f"{figures.differing}/{figures.compared}",
            )
        )
    work = result.work
    energy = "" if result.microjoules is None else f"; {result.microjoules:.1f} uJ an image"
    title = (
        f"{path.name} on {result.machine}, {counted(result.threads, 'thread')}: "
        f"{work.multiplications / 1e6:.2f} million products, "
        f"{100 * work.sparsity:.0f} % of weights zero; batches of {result.batch}{energy}"
        f"{_conditions(result.before, result.after)}"
    )
    return table(title, _COLUMNS, rows)


def _conditions(before: State, after: State) -> str:
    """Clock, heat and what a Raspberry Pi's firmware complains of, where they are reported."""
    parts: list[str] = []
    if before.governor is not None:
        parts.append(f"governor {before.governor}")
    if before.celsius is not None and after.celsius is not None:
        parts.append(f"{before.celsius:.0f} to {after.celsius:.0f} degrees")
    parts += after.throttling or ()
    return "".join(f"; {part}" for part in parts)


def _roof_cells(roof: Roof) -> tuple[object, ...]:
    return (
        roof.level,
        f"{roof.rate:.1f}",
        f"{roof.useful_rate:.1f}",
        f"{roof.dense_us:.2f}",
        f"{100 * roof.dense_share:.0f}",
        f"{roof.useful_us:.2f}",
        f"{100 * roof.useful_share:.0f}",
    )
