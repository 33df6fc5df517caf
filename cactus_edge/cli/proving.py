"""The verbs ``certify``, ``merge``, ``check`` and ``attack``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cactus_edge import certificate as certificates
from cactus_edge import certificate_stream, files, flatbuffer
from cactus_edge import check as checking
from cactus_edge.check import Mapper
from cactus_edge.cli.options import (
    Around,
    BudgetOption,
    EpsilonOption,
    FirstOption,
    JobsOption,
    LevelsOption,
    MaskOption,
    MemoryOption,
    MethodOption,
    ModelArgument,
    ModelsArgument,
    PatchOption,
    ProfileOption,
    RadiiKindOption,
    RadiiOption,
    RestartsOption,
    SamplesOption,
    SplitOption,
    StepsOption,
    StrongOption,
    TopOption,
    attack_of,
    bytes_of,
    method_of,
    settings_of,
    shard_of,
)
from cactus_edge.cli.options import split_of as _split
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    PortOption,
    ServeOption,
    announced,
    bar,
    emit,
    save_json,
    share,
    table,
    tell,
)
from cactus_edge.errors import PropertyNotMetError, ToolError, UsageError, counted

_INTERRUPTED = 130  # as shells have it


class CertifyResult(msgspec.Struct, frozen=True):
    """What ``certify --json`` and ``merge --json`` print; rounding is that of the first model."""

    certificate: str
    models: tuple[str, ...]
    samples: int
    property: str
    radius: str
    patch: tuple[int, ...]
    top: int
    rounding: str
    profiles: tuple[str, ...]
    verifier: str
    standard_accuracy: float
    certified_accuracy: float
    attack_accuracy: float | None
    verdicts: dict[str, int]


def certify(
    models: ModelsArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the certificate goes.")],
    eps: EpsilonOption = None,
    levels: LevelsOption = None,
    radii: RadiiOption = None,
    radii_kind: RadiiKindOption = "epsilon",
    mask: MaskOption = None,
    patch: PatchOption = None,
    top: TopOption = 1,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    method: MethodOption = "interval",
    budget: BudgetOption = 60.0,
    memory: MemoryOption = "2G",
    attack: Annotated[
        bool, typer.Option("--attack", help="Search counterexamples for what stays open.")
    ] = False,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    strong: StrongOption = False,
    jobs: JobsOption = None,
    dask: Annotated[
        str | None, typer.Option("--dask", help="Work on the cluster of this Dask scheduler.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped run left OUTPUT.partial.")
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", help="Only the i-th of n ranges of the samples; see merge.")
    ] = "1/1",
    require: Annotated[
        float | None,
        typer.Option("--require", help="Exit 1 if fewer than this fraction is certified."),
    ] = None,
    serve: ServeOption = False,
    port: PortOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Certify the deployed integers, for all named runtimes, and write a certificate.

    Of several models, each has to decide right. Example:
    cactus-edge certify model.tflite --data mnist --eps 0.1 -o certificate.jsonl
    """
    from cactus_edge import live
    from cactus_edge.certify import Request
    from cactus_edge.certify import certify as run
    from cactus_edge.certify.partial import refuse

    refuse(output, resume=resume, force=force)
    if require is not None and not 0 <= require <= 1:
        raise UsageError(f"--require {require}: a fraction from 0 to 1 is needed")
    loaded = [(path.name, *flatbuffer.load(path)) for path in models]
    around = Around(eps, levels, radii, radii_kind, mask, patch)
    request = Request(
        data=_split(data, split, loaded[0][1]),
        perturbation=around.of(loaded[0][1]),
        top=top,
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=attack_of(attack, steps, restarts, strong),
        models=tuple((name, content) for name, _, content in loaded),
        method=method_of(method),
        budget=budget,
        memory=bytes_of(memory),
        shard=shard_of(shard),
        jobs=jobs,
        dask=dask,
    )
    page = live.serving(output, port) if serve else None
    with resumable(output), announced(page), bar("certify") as progress:
        result = run(request, output, resume=resume, force=force, progress=progress)
    title = f"{', '.join(path.name for path in models)} on {data} {split}"
    _show(result.head, result.summary, output, as_json, title)
    judge(result.summary, output, require)


@contextmanager
def resumable(output: Path | None) -> Generator[None]:
    """Where Ctrl-C ends the block, says what is left to go on from."""
    from cactus_edge.certify.partial import partial_of

    try:
        yield
    except KeyboardInterrupt:
        if output is None:
            raise
        kept = partial_of(output)
        left = f"what is done is in {kept}; --resume goes on from there"
        text = f"stopped; {left if kept.exists() else 'nothing was done yet'}"
        tell(text)
        raise typer.Exit(_INTERRUPTED) from None


def _show(
    head: certificates.Head,
    summary: certificates.Summary,
    output: Path,
    as_json: bool,
    title: str,
) -> None:
    """What ``certify`` and ``merge`` print."""
    assert head.data is not None
    arithmetic = head.arithmetic[0]
    shown = CertifyResult(
        certificate=str(output),
        models=tuple(model.file for model in head.models),
        samples=head.data.count,
        property=head.property.kind,
        radius=head.property.radius or "one for each element",
        patch=head.property.patch,
        top=head.property.top,
        rounding=arithmetic.rounding,
        profiles=arithmetic.profiles,
        verifier=head.verifier,
        standard_accuracy=summary.standard_accuracy,
        certified_accuracy=summary.certified_accuracy,
        attack_accuracy=summary.attack_accuracy,
        verdicts=summary.verdicts,
    )
    roundings = (f"{a.rounding}, {counted(len(a.profiles), 'profile')}" for a in head.arithmetic)
    rows = [
        ("samples", f"{head.data.first}..{head.data.first + head.data.count - 1}"),
        ("perturbation", f"{shown.property} {shown.radius}{_patch(shown.patch)}"),
        ("decision", head.property.decision),
        ("rounding", "; ".join(roundings)),
        ("verifier", shown.verifier),
        ("standard accuracy %", share(shown.standard_accuracy)),
        ("certified accuracy %", share(shown.certified_accuracy)),
        ("attack accuracy %", share(shown.attack_accuracy)),
        *((f"verdict {name}", count) for name, count in shown.verdicts.items()),
        ("certificate", shown.certificate),
    ]
    emit(shown, as_json, table(title, ("", "value"), rows))
    for model, covered in zip(head.models, head.arithmetic, strict=True):
        for name, reason in covered.uncovered.items():
            tell(f"{model.file}: not covered: {name}: {reason}")


def _patch(patch: tuple[int, ...]) -> str:
    return ", in a window of {} x {}, stride {}".format(*patch) if patch else ""


def judge(summary: certificates.Summary, output: Path | None, require: float | None) -> None:
    """Raise where the run does not deserve exit code 0."""
    errors = summary.verdicts["error"]
    if errors:
        raise ToolError(f"{counted(errors, 'sample')} could not be treated, see {output}")
    if require is not None and summary.certified_accuracy < require:
        raise PropertyNotMetError(
            f"{share(summary.certified_accuracy)} % certified, {100 * require:g} % required"
        )


def merge(
    shards: Annotated[
        list[Path], typer.Argument(help="Certificates of consecutive shards.", metavar="SHARD")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the whole goes.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Join the certificates of shards into the one that a single run would have written.

    Example: cactus-edge merge one.jsonl two.jsonl -o certificate.jsonl
    """
    from cactus_edge.certify import merge as run

    with bar("merge") as progress:
        result = run(shards, output, force=force, progress=progress)
    _show(result.head, result.summary, output, as_json, counted(len(shards), "shard"))
    judge(result.summary, output, None)


class CheckOutput(msgspec.Struct, frozen=True):
    """What ``check --json`` prints."""

    agrees: bool
    samples: int
    certified_accuracy: float | None
    problems: tuple[str, ...]


def check(
    certificate: Annotated[Path, typer.Argument(help="certificate.jsonl", metavar="CERTIFICATE")],
    models: ModelsArgument,
    data: Annotated[
        str | None, typer.Option("--data", help="The data set that it is about.", metavar="NAME")
    ] = None,
    query: Annotated[
        Path | None, typer.Option("--query", help="The VNN-LIB file that it is about.")
    ] = None,
    jobs: JobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-derive every line of a certificate from models and data alone, independently.

    Example: cactus-edge check certificate.jsonl model.tflite --data mnist
    """
    if certificate.suffix == ".tflite":
        raise UsageError(f"{certificate} is a model; the certificate comes first, models follow")
    with certificate_stream.reading(certificate) as claim:
        asks = claim.head.query is not None
        if (query is not None, data is not None) != (asks, not asks):
            wanted = "--query FILE" if asks else "--data NAME"
            raise UsageError(f"{certificate} needs {wanted}, and nothing else, to be checked")
        loaded = [flatbuffer.load(path) for path in models]
        split = claim.head.data.split if claim.head.data else "test"
        dataset = None if data is None else _split(data, split, loaded[0][0])
        text = None if query is None else files.read(query, "query")
        contents = [content for _, content in loaded]
        with bar("check") as progress, _mapper(jobs) as mapper:
            result = checking.check(
                claim, contents, dataset, query=text, progress=progress, mapper=mapper
            )
        accuracy = claim.tail.summary.certified_accuracy if claim.tail else None
    shown = CheckOutput(result.agrees, result.samples, accuracy, result.problems)
    verdict = "agrees" if result.agrees else "does NOT agree"
    rows: list[tuple[str, object]] = [("certificate", verdict)]
    if asks:
        rows.append(("boxes of the query re-derived", result.samples))
    else:
        rows.append(("samples re-derived", result.samples))
        rows.append(("certified accuracy %", share(shown.certified_accuracy)))
    names = ", ".join(path.name for path in models)
    emit(shown, as_json, table(f"{certificate.name} with {names}", ("", "value"), rows))
    if not result.agrees:
        for problem in result.problems:
            tell(f"- {problem}")
        found = counted(len(result.problems), "problem")
        raise PropertyNotMetError(f"{certificate}: {found}, see above")


def _mapper(jobs: int | None) -> AbstractContextManager[Mapper]:
    """Several processes, or the plain checker without any of the certifier's code."""
    if jobs is None:
        return nullcontext(map)
    from cactus_edge.certify.parallel import pool

    return pool(jobs)


class AttackOutput(msgspec.Struct, frozen=True):
    """What ``attack --json`` prints; ``output`` holds the samples where one was asked for."""

    samples: int
    standard_accuracy: float
    attack_accuracy: float
    verdicts: dict[str, int]
    output: str


def attack(
    model: ModelArgument,
    data: DataOption,
    eps: EpsilonOption = None,
    levels: LevelsOption = None,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    strong: StrongOption = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write verdicts and counterexamples.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search integer counterexamples: projected gradient, then coordinates.

    Example: cactus-edge attack model.tflite --data mnist --eps 0.1 --samples 1000
    """
    from cactus_edge.certify import Request
    from cactus_edge.certify import attack as run

    if output is not None:
        files.refuse_existing(output, force)
    graph, _ = flatbuffer.load(model)
    request = Request(
        data=_split(data, split, graph),
        perturbation=Around(eps, levels).of(graph),
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=settings_of(steps, restarts, strong),
    )
    with bar("attack") as progress:
        found = run(graph, request, progress=progress)
    summary = certificates.summarize(found, attacked=True)
    assert summary.attack_accuracy is not None
    if output is not None:
        save_json(output, found, force=force)
    shown = AttackOutput(
        len(found),
        summary.standard_accuracy,
        summary.attack_accuracy,
        summary.verdicts,
        str(output) if output else "",
    )
    rows = [
        ("samples", shown.samples),
        ("standard accuracy %", share(shown.standard_accuracy)),
        ("attack accuracy %", share(shown.attack_accuracy)),
        ("refuted", shown.verdicts["refuted"]),
    ]
    emit(shown, as_json, table(f"attack on {model.name}", ("", "value"), rows))


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (certify, merge, check, attack):
        app.command()(verb)
