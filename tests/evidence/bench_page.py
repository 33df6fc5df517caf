"""The pages about performance: what was measured, as Markdown, JSON and SVG.

CPUs with other instructions give other figures, so each tier has a page and a JSON of its own, made
on whatever machine has it; ``performance.md`` lists those that there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cactus_edge import files
from cactus_edge.bench import Benchmark, Figures
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.drawing import draw_roofline, draw_sparsity
from cactus_edge.bench.peers import PIECE
from cactus_edge.bench.roofline import Roof, roof
from tests.evidence.bench_networks import Entry, Trained

COMMAND = "make bench"
TITLE = "Latency, throughput, start and memory"
OURS = "cactus-edge"


@dataclass(frozen=True)
class Row:
    """One model: accuracy of its deployed integers, and its figures by number of threads."""

    entry: Entry
    accuracy: float
    samples: int
    results: dict[int, Benchmark]

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.entry.network} int{self.entry.bits} {self.kept}"

    @property
    def kept(self) -> str:
        """Sparsity and its pattern."""
        return _kept(self.entry.sparsity, self.entry.pattern)


@dataclass(frozen=True)
class Record:
    """Everything that one run of ``make bench`` found."""

    rows: tuple[Row, ...]
    trained: tuple[Trained, ...]
    ceilings: Ceilings | None
    rounds: int
    compile_seconds: float

    @property
    def first(self) -> Benchmark:
        """For what all have in common: the machine."""
        return next(iter(self.rows[0].results.values()))

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return f"performance-{'plain' if self.ceilings is None else self.ceilings.tier}"


def write(record: Record, folder: Path) -> None:
    """The page, the JSON and the figures of a tier, and ``performance.md`` anew."""
    drawn = draw(record, folder)
    files.write(folder / f"{record.stem}.md", page(record, drawn).encode(), force=True)
    files.write(folder / f"{record.stem}.json", content(record), force=True)
    files.write(folder / "performance.md", overview(folder).encode(), force=True)


def overview(folder: Path) -> str:
    """Markdown: the ratios of every tier that was measured, from the JSON files in a folder."""
    sections = [
        f"# {TITLE}",
        "Latency of other runtimes over ours: one image, one thread, medians of ratios, so more "
        f"than 1 is faster than they are. Each page has all figures. Reproduce: `{COMMAND}`, which "
        "measures the machine that it runs on.",
    ]
    for file in sorted(folder.glob("performance-*.json")):
        stored = json.loads(file.read_text())
        singles = [(row, row["threads"]["1"]["peers"]) for row in stored["rows"]]
        names = list(dict.fromkeys(name for _, peers in singles for name in peers))
        rows = [
            [
                f"{row['network']} int{row['bits']} {_kept(row['sparsity'], row['pattern'])}",
                *(f"{peers[name]['ratio']:.2f}" if name in peers else "-" for name in names),
            ]
            for row, peers in singles
        ]
        tier = file.stem.removeprefix("performance-")
        sections += [
            f"## Tier {tier}: {stored['machine']}",
            f"[All figures]({file.stem}.md)",
            _table(["model", *names], rows),
        ]
    return "\n\n".join(sections) + "\n"


def _kept(sparsity: float, pattern: str) -> str:
    """Sparsity and its pattern, as tables have them."""
    blocks = "" if pattern == "unstructured" else f" in {pattern}"
    return f"{round(100 * sparsity)} %{blocks}"


def content(record: Record) -> bytes:
    """JSON: for each model ``ours`` and ``peers``, by number of threads."""
    rows = [
        {
            "network": row.entry.network,
            "bits": row.entry.bits,
            "sparsity": row.entry.sparsity,
            "pattern": row.entry.pattern,
            "accuracy": row.accuracy,
            "samples": row.samples,
            "roof": msgspec.to_builtins(_roof(row, record.ceilings)),
            "threads": {str(n): msgspec.to_builtins(r) for n, r in row.results.items()},
        }
        for row in record.rows
    ]
    text = json.dumps(
        {
            "title": TITLE,
            "machine": record.first.machine,
            "command": COMMAND,
            "rounds": record.rounds,
            "compile_seconds": record.compile_seconds,
            "ceilings": msgspec.to_builtins(record.ceilings),
            "training": msgspec.to_builtins(record.trained),
            "rows": rows,
        },
        indent=2,
    )
    return text.encode() + b"\n"


def draw(record: Record, folder: Path) -> list[str]:
    """Figures; their file names."""
    drawn: list[str] = []
    for network, bits in dict.fromkeys((r.entry.network, r.entry.bits) for r in record.rows):
        results = [
            row.results[1]
            for row in record.rows
            if (row.entry.network, row.entry.bits) == (network, bits)
            and row.entry.pattern == "unstructured"
        ]
        name = f"{record.stem}-{network}-int{bits}.svg"
        title = f"{network}, int{bits}, one thread, {record.first.machine}"
        draw_sparsity(results, folder / name, title, force=True)
        drawn.append(name)
    if record.ceilings is not None:
        roofs = {row.name: r for row in record.rows if (r := _roof(row, record.ceilings))}
        name = f"{record.stem}-roofline.svg"
        draw_roofline(roofs, record.ceilings, folder / name, "Roofline, one thread", force=True)
        drawn.append(name)
    return drawn


def page(record: Record, drawn: Sequence[str]) -> str:
    """Markdown."""
    first = record.first
    batches = sorted({row.results[1].batch for row in record.rows})
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in first.caches.items())
    sections = [
        f"# {TITLE}",
        "Every runtime computes the same images on the same integers, in turn, in one process; "
        f"`x` is the other's median over ours. {record.rounds} rounds of 20 counted calls each, "
        f"uniform random images. Batches: ours whole, all others in pieces of {PIECE}. "
        "int4 weights are int8 of the same value where a runtime has no int4. Our rounding is that "
        f"of LiteRT on this CPU. {_agreement(record)}",
        f"Machine: {first.machine} ({caches or 'caches unknown'}), Python {first.python}. "
        f"Reproduce: `{COMMAND}`. Versions: {_versions(record)}.",
        "## Networks",
        _how(record),
        _table(["network", "weights", "zero", "accuracy %", "of images", "million products"], (
            [r.entry.network, f"int{r.entry.bits}", r.kept, f"{100 * r.accuracy:.2f}",
             r.samples, f"{r.results[1].work.multiplications / 1e6:.2f}"] for r in record.rows
        )),
        "## One image, one thread",
        "Median microseconds, weights in the caches that hold them.",
        _latencies(record, 1, lambda f: f.median_us, lambda f: f.ratio),
        "## One image, cold caches, one thread",
        "Before each call a buffer larger than every cache was written.",
        _latencies(record, 1, lambda f: f.cold_us, lambda f: f.cold_ratio),
        *_two_threads(record),
        "## Images a second, in batches",
        f"Batches of {' or '.join(map(str, batches))} images. `x` is ours over the other's.",
        *(
            f"{threads} thread{'s' if threads > 1 else ''}:\n\n" + _latencies(
                record, threads, lambda f: f.images_per_second, lambda f: f.throughput_ratio, 0
            )
            for threads in first_threads(record)
        ),
        "## Ceilings of the machine",
        *_ceilings(record),
        "## Start and memory",
        "A fresh process: import, compiled kernels from the cache, load; the first call; memory "
        "gained, which for ours is Numba's and LLVM's above all. Where nothing is compiled yet, "
        f"our first load takes {record.compile_seconds:.0f} s.",
        _starts(record),
        _energy(record),
        *(f"![{name}]({name})" for name in drawn),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def first_threads(record: Record) -> list[int]:
    """Numbers of threads that were measured."""
    return sorted(record.rows[0].results)


def _two_threads(record: Record) -> list[str]:
    if first_threads(record) == [1]:
        return []
    return [
        "## One image, two threads",
        _latencies(record, 2, lambda f: f.median_us, lambda f: f.ratio),
    ]


def _how(record: Record) -> str:
    lines = [
        f"- {t.network}, {t.pattern}, {round(100 * t.sparsity)} %: {100 * t.float_accuracy:.2f} % "
        f"in floats, {t.seconds:.0f} s"
        for t in record.trained
    ]
    return (
        "Plain training (cross-entropy, no bounds) by `tests/evidence/bench_networks.py`, pruned "
        "by magnitude within each layer, quantized in one shot with universal scales. `mlp` and "
        "`cnn-small`: `recipes/bench-*.toml`, one set of weights for all sparsities, on MNIST. "
        "`cnn-7`: a small subset of CIFAR-10, a few hundred steps, then pruned in steps with a "
        "short fine-tuning each; its accuracy is not the point. Training took, on one core:\n\n"
        + "\n".join(lines)
    )


def _agreement(record: Record) -> str:
    """What the outputs say."""
    counts: dict[str, tuple[int, int]] = {}
    for row in record.rows:
        for name, figures in row.results[1].peers.items():
            differing, compared = counts.get(name, (0, 0))
            counts[name] = (differing + figures.differing, compared + figures.compared)
    other = [f"{name} in {d} of {c}" for name, (d, c) in counts.items() if d]
    if not other:
        return "All runtimes gave the same integers."
    return (
        f"All runtimes gave the same integers, except for single logits: {', '.join(other)}. "
        "(torch rounds biases in its own way, and adds pairs of products with saturation where the "
        "CPU has no VNNI; ONNX Runtime would do so too and is told not to.)"
    )


def _names(results: Iterable[Benchmark]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.peers))


def _versions(record: Record) -> str:
    found = {OURS: record.first.ours.version}
    for row in record.rows:
        found |= {name: f.version for name, f in row.results[1].peers.items()}
    absent = {name: why for row in record.rows for name, why in row.results[1].absent.items()}
    parts = [f"{name} {version}" for name, version in found.items()]
    return ", ".join([*parts, *(f"{name} absent ({why})" for name, why in absent.items())])


def _latencies(
    record: Record,
    threads: int,
    value: Callable[[Figures], float],
    ratio: Callable[[Figures], float],
    digits: int = 2,
) -> str:
    names = _names(row.results[threads] for row in record.rows)
    rows: list[list[object]] = []
    for row in record.rows:
        result = row.results[threads]
        cells: list[object] = [row.name, f"{value(result.ours):,.{digits}f}"]
        for name in names:
            figures = result.peers.get(name)
            cells.append(
                f"{value(figures):,.{digits}f} (x{ratio(figures):.2f})" if figures else "-"
            )
        rows.append(cells)
    return _table(["model", OURS, *names], rows)


def _roof(row: Row, ceilings: Ceilings | None) -> Roof | None:
    if ceilings is None:
        return None
    return roof(row.results[1].work, row.results[1].ours.median_us, ceilings)


def _ceilings(record: Record) -> list[str]:
    best = record.ceilings
    if best is None:
        return ["Not measured: the CPU has none of the vector instructions."]
    levels = ", ".join(f"{level} {rate:.0f} GB/s" for level, rate in best.bandwidth.items())
    rows: list[list[object]] = []
    for row in record.rows:
        there = _roof(row, best)
        assert there is not None
        rows.append(
            [
                row.name,
                there.level,
                f"{there.rate:.1f}",
                f"{there.useful_rate:.1f}",
                f"{100 * there.dense_share:.0f} %",
                f"{100 * there.useful_share:.0f} %",
            ]
        )
    columns = ["model", "weights in", "GMAC/s", "without zeros", "of dense roof", "of sparse roof"]
    return [
        f"One thread, instructions of tier {best.tier}: {best.products:.0f} thousand million int8 "
        f"products a second (GMAC/s); {levels}, read. A roof is the time of all products or of "
        "all weights at these rates, whichever is longer; above 100 % zeros were skipped.",
        _table(columns, rows),
    ]


def _starts(record: Record) -> str:
    rows: list[list[object]] = []
    for row in record.rows:
        result = row.results[1]
        for name, figures in {OURS: result.ours, **result.peers}.items():
            begun = figures.start
            if begun is not None:
                gained = begun.memory_kib
                memory = "-" if gained is None else f"{gained / 1024:.1f}"
                first = f"{begun.first_call_us:.0f}"
                rows.append([row.name, name, f"{begun.load_seconds:.2f}", first, memory])
    return _table(["model", "runtime", "load s", "first call us", "MiB"], rows)


def _energy(record: Record) -> str:
    known = [(row, j) for row in record.rows if (j := row.results[1].microjoules) is not None]
    if not known:
        return "Energy: this machine has no counter that may be read."
    rows = [[row.name, f"{microjoules:.1f}"] for row, microjoules in known]
    return "## Energy\n\n" + _table(["model", "microjoules an image, whole package"], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
