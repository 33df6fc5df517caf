"""The verb ``faults``: certify against single bit flips in the weights, or check such a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from cactus_edge import fault_report, files, flatbuffer
from cactus_edge.cli.options import (
    EpsilonOption,
    FirstOption,
    LevelsOption,
    ModelArgument,
    ProfileOption,
    SamplesOption,
    SplitOption,
    split_of,
)
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    bar,
    emit,
    share,
    table,
    tell,
)
from cactus_edge.errors import PropertyNotMetError, UsageError, counted
from cactus_edge.fault_report import Report
from cactus_edge.graph import Graph, Linear
from cactus_edge.inputs import Perturbation
from cactus_edge.profiles import PROFILES


class LayerResult(msgspec.Struct, frozen=True):
    """One layer in what ``faults --json`` prints; means over samples where sites were counted."""

    name: str
    kind: str
    sites: int
    uncovered: int
    verdicts: dict[str, int]
    safe_share: float | None
    critical_sites: float | None


class FaultsResult(msgspec.Struct, frozen=True):
    """What ``faults --json`` prints; ``layers_in_model`` counts those that have weights."""

    report: str
    claim: str
    first: int
    samples: int
    kind: str
    radius: str
    profiles: tuple[str, ...]
    layers_in_model: int
    bits: tuple[int, ...]
    bias_bits: int
    folded: bool
    sites: int
    verdicts: dict[str, int]
    certified: float
    layers: tuple[LayerResult, ...]


class FaultCheckResult(msgspec.Struct, frozen=True):
    """What ``faults --check --json`` prints; ``stated``: None unless it agrees."""

    agrees: bool
    samples: int
    problems: tuple[str, ...]
    stated: FaultsResult | None


def faults(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the report goes.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Re-derive this report instead.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="Only this layer; repeatable.")
    ] = None,
    eps: EpsilonOption = None,
    levels: LevelsOption = None,
    bit: Annotated[
        list[int] | None,
        typer.Option("--bit", help="Only this bit of a weight, 0 the lowest; repeatable."),
    ] = None,
    bias_bits: Annotated[
        int, typer.Option("--bias-bits", help="So many of the lowest bits of each bias, too.")
    ] = 0,
    folded: Annotated[
        bool,
        typer.Option("--folded", help="Flips come after zero points were folded into biases."),
    ] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Decide every site: how many are safe and critical.")
    ] = False,
    attack: Annotated[
        bool, typer.Option("--attack", help="Attack flips that stay open, inside the box.")
    ] = False,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    require: Annotated[
        float | None,
        typer.Option("--require", help="Exit 1 if fewer than this fraction is certified."),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Certify that no single bit flip in a layer's weights changes the decision.

    Example: cactus-edge faults model.tflite --data mnist --samples 100 -o faults.json
    """
    if (output is None) == (check is None):
        raise UsageError("give either -o for a new report or --check for an existing one")
    if require is not None and not 0 <= require <= 1:
        raise UsageError(f"--require {require}: a fraction from 0 to 1 is needed")
    if check is not None:
        _check(check, model, data, require, as_json)
        return
    from cactus_edge.certify import Settings
    from cactus_edge.certify.faults import FaultRequest, certify_faults
    from cactus_edge.certify.faults_search import Effort

    assert output is not None
    files.refuse_existing(output, force)
    if eps is not None and levels is not None:
        raise UsageError("give either --eps or --levels, or none for the samples themselves")
    graph, content = flatbuffer.load(model)
    around = Perturbation.levels(levels or 0) if eps is None else Perturbation.epsilon(eps)
    request = FaultRequest(
        data=split_of(data, split, graph),
        perturbation=around,
        layers=tuple(dict.fromkeys(layer)) if layer else None,
        bits=tuple(dict.fromkeys(bit)) if bit else tuple(range(8)),
        bias_bits=bias_bits,
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        effort=Effort(attack=Settings() if attack else None, counted=count),
        folded=folded,
    )
    with bar("faults") as progress:
        report = certify_faults(content, request, file=model.name, progress=progress)
    files.write(output, fault_report.encode(report), force=force)
    shown = _shown(report, output, graph)
    emit(shown, as_json, *_tables(shown, f"weight faults in {model.name} on {data} {split}"))
    for name, reason in report.uncovered_profiles.items():
        tell(f"not covered: {name}: {reason}")
    _judge(shown, require)


def _judge(shown: FaultsResult, require: float | None) -> None:
    """Raise where fewer samples are certified than are required."""
    if require is not None and shown.certified < require:
        raise PropertyNotMetError(
            f"{share(shown.certified)} % certified, {100 * require:g} % required"
        )


def _shown(report: Report, output: Path, graph: Graph) -> FaultsResult:
    total = len(report.samples)
    layers: list[LayerResult] = []
    for position, layer in enumerate(report.layers):
        findings = [s.findings[position] for s in report.samples if s.findings]
        counted = report.faults.counted and bool(findings)
        safe, critical = sum(f.safe for f in findings), sum(f.critical for f in findings)
        layers.append(
            LayerResult(
                layer.name,
                layer.kind,
                layer.sites,
                layer.uncovered,
                layer.verdicts,
                safe / (len(findings) * layer.sites) if counted and layer.sites else None,
                critical / len(findings) if counted else None,
            )
        )
    return FaultsResult(
        report=str(output),
        claim=report.claim,
        first=report.data.first,
        samples=total,
        kind=report.kind,
        radius=report.radius,
        profiles=report.profiles,
        layers_in_model=sum(isinstance(op, Linear) for op in graph.operators),
        bits=report.faults.bits,
        bias_bits=report.faults.bias_bits,
        folded=report.faults.folded,
        sites=sum(layer.sites for layer in report.layers),
        verdicts=report.verdicts,
        certified=report.verdicts["certified"] / max(total, 1),
        layers=tuple(layers),
    )


def _tables(shown: FaultsResult, title: str) -> tuple[Table, Table]:
    rows = [
        ("samples", f"{shown.samples}, from {shown.first}"),
        ("box", f"{shown.kind} {shown.radius}"),
        ("profiles", f"{len(shown.profiles)} of {len(PROFILES)}"),
        ("layers", f"{len(shown.layers)} of {shown.layers_in_model}"),
        ("bits of a weight", ", ".join(map(str, shown.bits))),
        ("bits of a bias", shown.bias_bits),
        ("the flip comes", "after folding" if shown.folded else "before loading"),
        ("sites", shown.sites),
        ("certified %, all these layers", share(shown.certified)),
        ("report", shown.report),
    ]
    heads = ("layer", "sites", "not covered", *fault_report.VERDICTS, "safe %", "critical, mean")
    lines = [
        (
            layer.name,
            layer.sites,
            layer.uncovered,
            *(layer.verdicts[verdict] for verdict in fault_report.VERDICTS),
            "-" if layer.safe_share is None else f"{100 * layer.safe_share:.4f}",
            "-" if layer.critical_sites is None else f"{layer.critical_sites:.2f}",
        )
        for layer in shown.layers
    ]
    return table(title, ("", "value"), rows), table("by layer", heads, lines)


def _check(path: Path, model: Path, data: str, require: float | None, as_json: bool) -> None:
    from cactus_edge.check_faults import check_faults

    report = fault_report.load(path)
    graph, content = flatbuffer.load(model)
    dataset = split_of(data, report.data.split, graph)
    with bar("check") as progress:
        result = check_faults(report, content, dataset, progress=progress)
    verdict = "agrees" if result.agrees else "does NOT agree"
    rows = [("report", verdict), ("samples re-derived", result.samples)]
    stated = _shown(report, path, graph) if result.agrees else None
    shown = FaultCheckResult(result.agrees, result.samples, result.problems, stated)
    outcome = table(f"{path.name} with {model.name}", ("", "value"), rows)
    emit(shown, as_json, outcome, *(_tables(stated, "what it states") if stated else ()))
    if not result.agrees:
        for problem in result.problems:
            tell(f"- {problem}")
        raise PropertyNotMetError(f"{path}: {counted(len(result.problems), 'problem')}, see above")
    if stated is not None:
        _judge(stated, require)


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(faults)
