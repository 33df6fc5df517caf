"""The verbs ``radius``, ``sweep`` and ``verify``."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import files, flatbuffer, inputs
from cactus_edge.certificate import Sample
from cactus_edge.certificate_stream import Reader, reading
from cactus_edge.cli import proving
from cactus_edge.cli.options import (
    BudgetOption,
    FirstOption,
    JobsOption,
    MemoryOption,
    MethodOption,
    ModelArgument,
    ProfileOption,
    RestartsOption,
    SamplesOption,
    SplitOption,
    StepsOption,
    StrongOption,
    a_radius,
    attack_of,
    bytes_of,
    method_of,
    settings_of,
    split_of,
)
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    bar,
    drawn,
    emit,
    save_json,
    share,
    table,
)
from cactus_edge.errors import PropertyNotMetError, UsageError, counted
from cactus_edge.inputs import Perturbation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cactus_edge.certify.engine import Certifier
    from cactus_edge.certify.query import Answer
    from cactus_edge.graph import Graph, Int64Array

AttackOption = Annotated[
    bool, typer.Option("--attack", help="Search counterexamples for what stays open.")
]
OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")
]
CertificateOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write a certificate, see check.")
]


class RadiusRow(msgspec.Struct, frozen=True):
    """One sample; ``certified`` is -1 where not even radius 0 is.

    ``refuted``: the distance of the nearest counterexample that was found, under ``profile``.
    """

    index: int
    label: int
    prediction: int
    certified: int
    refuted: int | None
    profile: str


class RadiusOutput(msgspec.Struct, frozen=True):
    """What ``radius --json`` prints.

    ``mean`` is that of the certified radii, where a sample without one counts -1. ``certificate``
    is the file that was asked for, or empty.
    """

    samples: int
    largest: int
    profiles: tuple[str, ...]
    median: int
    mean: float
    at_least: dict[int, int]
    refuted: int
    certificate: str
    rows: list[RadiusRow]


class VerifyOutput(msgspec.Struct, frozen=True):
    """What ``verify --json`` prints. ``result`` is VNN-COMP's word: unsat, sat or unknown.

    ``counterexample`` and ``logits`` are stored integers, flat, in the model's order.
    """

    model: str
    model_sha256: str
    query: str
    query_sha256: str
    variables: str
    cases: int
    verdict: str
    result: str
    method: str
    profiles: tuple[str, ...]
    profile: str
    counterexample: list[int] | None
    logits: list[int] | None
    certificate: str


def _samples(
    graph: Graph, data: str, split: str, first: int, samples: int | None
) -> tuple[npt.NDArray[np.generic], Int64Array]:
    """The chosen part of a data set's split, and its labels."""
    from cactus_edge.certify.shards import selected

    dataset = split_of(data, split, graph)
    count = selected(first, samples, len(dataset.labels), f"'{data}' {split}")
    part = slice(first, first + count)
    return dataset.images[part], dataset.labels[part].astype("int64")


def _certifier(graph: Graph, profile: list[str] | None) -> tuple[Certifier, tuple[str, ...]]:
    from cactus_edge import profiles
    from cactus_edge.certify.engine import Certifier

    for name in profile or ():
        profiles.profile_of(name)
    certifier = Certifier(graph, tuple(dict.fromkeys(profile)) if profile else None)
    groups = certifier.coverage.groups
    return certifier, tuple(name for group in groups for name in group.names)


def radius(
    model: ModelArgument,
    data: DataOption,
    largest: Annotated[
        int, typer.Option("--largest", help="Search up to this many stored levels.")
    ] = 64,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    method: MethodOption = "interval",
    budget: BudgetOption = 60.0,
    memory: MemoryOption = "2G",
    attack: AttackOption = False,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    strong: StrongOption = False,
    jobs: JobsOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped run left OUTPUT.partial.")
    ] = False,
    output: CertificateOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the largest certified radius of each sample, and the nearest counterexample.

    Example: cactus-edge radius model.tflite --data mnist --samples 100 --attack -o radii.jsonl
    """
    from cactus_edge.certify import Request
    from cactus_edge.certify import certify as run
    from cactus_edge.certify.partial import refuse

    if output is not None:
        refuse(output, resume=resume, force=force)
    elif resume:
        raise UsageError("--resume goes on with a certificate; give it with -o")
    graph, content = flatbuffer.load(model)
    request = Request(
        data=split_of(data, split, graph),
        perturbation=Perturbation.levels(largest),
        each_radius=True,
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=attack_of(attack, steps, restarts, strong),
        models=((model.name, content),),
        method=method_of(method),
        budget=budget,
        memory=bytes_of(memory),
        jobs=jobs,
    )
    kept = BytesIO()
    with proving.resumable(output), bar("radius") as progress:
        head, summary = run(request, output or kept, resume=resume, force=force, progress=progress)
    if output is None:
        kept.seek(0)
        found = [_row(sample) for sample in Reader(kept, "radius").samples()]
    else:
        with reading(output) as claim:
            found = [_row(sample) for sample in claim.samples()]
    certified = sorted(row.certified for row in found)
    shown = RadiusOutput(
        samples=len(found),
        largest=largest,
        profiles=head.arithmetic[0].profiles,
        median=certified[(len(found) - 1) // 2],
        mean=sum(certified) / len(found),
        at_least={level: sum(c >= level for c in certified) for level in _steps(largest)},
        refuted=sum(row.refuted is not None for row in found),
        certificate="" if output is None else str(output),
        rows=found,
    )
    rows = [
        ("samples", shown.samples),
        ("median certified radius", shown.median),
        *(
            (f"certified at {counted(level, 'level')}, %", share(count / len(found)))
            for level, count in shown.at_least.items()
        ),
        ("counterexample found", shown.refuted),
    ]
    emit(shown, as_json, table(f"radii of {model.name} on {data} {split}", ("", "value"), rows))
    proving.judge(summary, output, None)


def _steps(largest: int) -> list[int]:
    """0, powers of two, and the largest."""
    powers = [1 << i for i in range(8) if 1 << i < largest]
    return list(dict.fromkeys([0, *powers, largest]))


def _row(sample: Sample) -> RadiusRow:
    import numpy as np

    refuted = None
    if sample.verdict == "refuted":
        difference = np.frombuffer(bytes.fromhex(sample.counterexample), "<i2")
        refuted = int(np.abs(difference.astype(np.int64)).max(initial=0))
    return RadiusRow(
        sample.index,
        sample.label,
        sample.prediction,
        -1 if sample.radius is None else sample.radius,
        refuted,
        sample.profile,
    )


def sweep(
    model: ModelArgument,
    data: DataOption,
    eps: Annotated[
        list[str] | None,
        typer.Option("--eps", callback=a_radius, help="A radius on real inputs; repeatable."),
    ] = None,
    levels: Annotated[
        list[int] | None, typer.Option("--levels", help="A radius in stored levels; repeatable.")
    ] = None,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    attack: AttackOption = False,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    strong: StrongOption = False,
    output: OutputOption = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the curve.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Certify at many radii and draw the curve.

    Example: cactus-edge sweep model.tflite --data mnist --eps 0.05 --eps 0.1 --svg curve.svg
    """
    from cactus_edge.certify import sweep as sweeping

    if bool(eps) == bool(levels):
        raise UsageError("give radii either with --eps or with --levels")
    perturbations = [Perturbation.epsilon(text) for text in eps or ()]
    perturbations += [Perturbation.levels(count) for count in levels or ()]
    for path in (output, drawn("--svg", svg)):
        if path is not None:
            files.refuse_existing(path, force)
    graph, content = flatbuffer.load(model)
    images, labels = _samples(graph, data, split, first, samples)
    certifier, _ = _certifier(graph, profile)
    settings = attack_of(attack, steps, restarts, strong)
    with bar("sweep") as progress:
        curve = sweeping.sweep(
            certifier, images, labels, perturbations, settings=settings, progress=progress
        )
    curve = msgspec.structs.replace(
        curve, model_sha256=hashlib.sha256(content).hexdigest(), data=f"{data} {split}"
    )
    if output is not None:
        save_json(output, curve, force=force)
    if svg is not None:
        sweeping.draw(curve, svg, f"{model.name} on {data} {split}", force=force)
    rows = [
        (
            point.radius,
            share(point.certified / curve.samples),
            share((curve.samples - point.refuted) / curve.samples) if curve.attacked else "-",
        )
        for point in curve.points
    ]
    columns = ("eps" if eps else "levels", "certified %", "not refuted %")
    title = f"{model.name} on {data} {split}: {share(curve.correct / curve.samples)} % correct"
    emit(curve, as_json, table(title, columns, rows))


def verify(
    model: ModelArgument,
    query: Annotated[Path, typer.Argument(help="A VNN-LIB file.", metavar="QUERY")],
    stored: Annotated[
        bool, typer.Option("--stored", help="X and Y are stored integers, not real values.")
    ] = False,
    profile: ProfileOption = None,
    method: MethodOption = "linear",
    budget: Annotated[
        float, typer.Option("--budget", help="Seconds a box for --method complete.")
    ] = 60.0,
    memory: MemoryOption = "2G",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Gradient steps of the attack; 40 without it.")
    ] = None,
    restarts: RestartsOption = None,
    strong: StrongOption = False,
    attack: Annotated[
        bool, typer.Option("--attack/--no-attack", help="Search for a counterexample.")
    ] = True,
    output: CertificateOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a VNN-LIB query on the deployed integers; exit 0 only where it is certified.

    Example: cactus-edge verify model.tflite property.vnnlib -o certificate.jsonl
    """
    from cactus_edge.certify.query_certificate import QueryRequest, answered, certify_query

    if output is not None:
        files.refuse_existing(output, force)
    graph, content = flatbuffer.load(model)
    text = files.read(query, "query")
    request = QueryRequest(
        model=(model.name, content),
        query=(query.name, text),
        variables="stored" if stored else "real",
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=settings_of(40 if steps is None else steps, restarts, strong) if attack else None,
        method=method_of(method),
        budget=budget,
        memory=bytes_of(memory),
    )
    with bar("verify", "boxes") as progress:
        if output is None:
            answer, names, boxes = answered(request, progress=progress)
        else:
            with files.writing(output, force=force) as stream:
                head, summary, answer = certify_query(request, stream, progress=progress)
            names, boxes = head.arithmetic[0].profiles, sum(summary.verdicts.values())
    point = answer.counterexample
    shown = VerifyOutput(
        model=model.name,
        model_sha256=hashlib.sha256(content).hexdigest(),
        query=query.name,
        query_sha256=hashlib.sha256(text).hexdigest(),
        variables=request.variables,
        cases=boxes,
        verdict=answer.verdict,
        result={"certified": "unsat", "refuted": "sat", "unknown": "unknown"}[answer.verdict],
        method=answer.method,
        profiles=names,
        profile=answer.profile,
        counterexample=None if point is None else point.reshape(-1).tolist(),
        logits=list(answer.logits) if answer.logits else None,
        certificate="" if output is None else str(output),
    )
    emit(shown, as_json, table(f"{query.name} on {model.name}", ("", "value"), _rows(shown, graph)))
    if answer.verdict != "certified":
        raise PropertyNotMetError(_why(query, answer))


def _rows(shown: VerifyOutput, graph: Graph) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("verdict", f"{shown.verdict} ({shown.result})"),
        ("method", shown.method),
        ("boxes", shown.cases),
        ("profiles", len(shown.profiles)),
    ]
    if shown.counterexample is not None:
        rows += [("broken under", shown.profile), ("stored logits", shown.logits)]
        if len(shown.counterexample) <= 32:
            rows.append(("stored input", shown.counterexample))
            if shown.variables == "real":
                mapping = inputs.input_map(graph)
                reals = [mapping.scale * (v - mapping.zero_point) for v in shown.counterexample]
                rows.append(("real input", ", ".join(f"{float(real):.6g}" for real in reals)))
    return rows


def _why(query: Path, answer: Answer) -> str:
    if answer.verdict == "refuted":
        return f"{query}: a stored input breaks the property under '{answer.profile}'"
    return f"{query}: neither proved nor refuted"


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (radius, sweep, verify):
        app.command()(verb)
