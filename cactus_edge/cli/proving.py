"""The verbs ``certify``, ``check`` and ``attack``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import certificate as certificates
from cactus_edge import check as checking
from cactus_edge import datasets, files, flatbuffer, inputs
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    bar,
    console,
    emit,
    percent,
    save_json,
    table,
)
from cactus_edge.errors import PropertyNotMetError, ToolError, UsageError
from cactus_edge.inputs import Perturbation

if TYPE_CHECKING:
    from cactus_edge.graph import Graph

logger = logging.getLogger(__name__)

ModelArgument = Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")]
EpsilonOption = Annotated[
    str | None,
    typer.Option("--eps", help="Radius on real inputs in [0, 1], such as 0.1 or 8/255."),
]
LevelsOption = Annotated[
    int | None, typer.Option("--levels", help="Radius in stored integer levels instead.")
]
SplitOption = Annotated[str, typer.Option("--split", help="test, validation or train.")]
SamplesOption = Annotated[
    int | None, typer.Option("--samples", "-n", help="How many samples; all without it.")
]
FirstOption = Annotated[int, typer.Option("--first", help="Index of the first sample.")]
ProfileOption = Annotated[
    list[str] | None,
    typer.Option("--profile", help="Restrict the claim to this rounding profile; repeatable."),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Gradient steps of the attack.")]
RestartsOption = Annotated[int, typer.Option("--restarts", help="Random restarts of the attack.")]


class CertifyResult(msgspec.Struct, frozen=True):
    """What ``certify --json`` prints."""

    certificate: str
    samples: int
    property: str
    radius: str
    rounding: str
    profiles: tuple[str, ...]
    verifier: str
    standard_accuracy: float
    certified_accuracy: float
    attack_accuracy: float | None
    verdicts: dict[str, int]


def _perturbation(epsilon: str | None, levels: int | None) -> Perturbation:
    if (epsilon is None) == (levels is None):
        raise UsageError("give either --eps or --levels")
    if epsilon is not None:
        return inputs.Perturbation.epsilon(epsilon)
    assert levels is not None
    return inputs.Perturbation.levels(levels)


def _split(name: str, split: str, graph: Graph) -> datasets.Dataset:
    """A split; what a model's training held out is known from the model's provenance."""
    if split not in ("train", "validation", "test"):
        raise UsageError(f"no split '{split}'; use test, validation or train")
    fraction = datasets.VALIDATION_FRACTION
    provenance = dict(graph.metadata).get("cactus_edge.provenance", b"{}")
    try:
        fraction = float(json.loads(provenance)["recipe"]["data"]["validation"])
    except (ValueError, KeyError, TypeError, RecursionError):
        logger.info("the model does not say what training held out; taking %g", fraction)
    return datasets.load(name, split, fraction)  # pyright: ignore[reportArgumentType]


def certify(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the certificate goes.")],
    eps: EpsilonOption = None,
    levels: LevelsOption = None,
    split: SplitOption = "test",
    first: FirstOption = 0,
    samples: SamplesOption = None,
    profile: ProfileOption = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Search counterexamples for what stays open.")
    ] = False,
    steps: StepsOption = 20,
    restarts: RestartsOption = 2,
    require: Annotated[
        float | None,
        typer.Option("--require", help="Exit 1 if fewer than this fraction is certified."),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Certify the deployed integers, for all named runtimes, and write a certificate.

    Example: cactus-edge certify model.tflite --data mnist --eps 0.1 -o certificate.json
    """
    from cactus_edge.certify import Request, Settings
    from cactus_edge.certify import certify as run

    files.refuse_existing(output, force)
    if require is not None and not 0 <= require <= 1:
        raise UsageError(f"--require {require}: a fraction from 0 to 1 is needed")
    perturbation = _perturbation(eps, levels)
    graph, content = flatbuffer.load(model)
    request = Request(
        data=_split(data, split, graph),
        perturbation=perturbation,
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=Settings(steps=steps, restarts=restarts) if attack else None,
    )
    with bar("certify") as progress:
        result = run(content, request, file=model.name, progress=progress)
    files.write(output, certificates.encode(result), force=force)
    summary = result.summary
    shown = CertifyResult(
        certificate=str(output),
        samples=len(result.samples),
        property=result.property.kind,
        radius=result.property.radius,
        rounding=result.arithmetic.rounding,
        profiles=result.arithmetic.profiles,
        verifier=result.verifier,
        standard_accuracy=summary.standard_accuracy,
        certified_accuracy=summary.certified_accuracy,
        attack_accuracy=summary.attack_accuracy,
        verdicts=summary.verdicts,
    )
    rows = [
        ("samples", shown.samples),
        ("perturbation", f"{shown.property} {eps if eps is not None else shown.radius}"),
        ("rounding", f"{shown.rounding}, {len(shown.profiles)} profiles"),
        ("verifier", shown.verifier),
        ("standard accuracy %", percent(shown.standard_accuracy)),
        ("certified accuracy %", percent(shown.certified_accuracy)),
        ("attack accuracy %", percent(shown.attack_accuracy)),
        *((f"verdict {name}", count) for name, count in shown.verdicts.items()),
        ("certificate", shown.certificate),
    ]
    emit(shown, as_json, table(f"{model.name} on {data} {split}", ("", "value"), rows))
    for name, reason in result.arithmetic.uncovered.items():
        console.print(
            f"not covered: {name}: {reason}", highlight=False, markup=False, soft_wrap=True
        )
    if shown.verdicts["error"]:
        raise ToolError(f"{shown.verdicts['error']} samples could not be treated, see {output}")
    if require is not None and summary.certified_accuracy < require:
        raise PropertyNotMetError(
            f"{percent(summary.certified_accuracy)} % certified, {percent(require)} % required"
        )


class CheckOutput(msgspec.Struct, frozen=True):
    """What ``check --json`` prints."""

    agrees: bool
    samples: int
    certified_accuracy: float
    problems: tuple[str, ...]


def check(
    certificate: Annotated[Path, typer.Argument(help="certificate.json", metavar="CERTIFICATE")],
    model: ModelArgument,
    data: DataOption,
    as_json: JsonOption = False,
) -> None:
    """Re-derive every line of a certificate from model and data alone, independently.

    Example: cactus-edge check certificate.json model.tflite --data mnist
    """
    claim = certificates.load(certificate)
    graph, content = flatbuffer.load(model)
    dataset = _split(data, claim.data.split, graph)
    with bar("check") as progress:
        result = checking.check(claim, content, dataset, progress=progress)
    shown = CheckOutput(
        result.agrees, result.samples, claim.summary.certified_accuracy, result.problems
    )
    verdict = "agrees" if result.agrees else "does NOT agree"
    rows = [
        ("certificate", verdict),
        ("samples re-derived", result.samples),
        ("certified accuracy %", percent(shown.certified_accuracy)),
    ]
    emit(shown, as_json, table(f"{certificate.name} with {model.name}", ("", "value"), rows))
    if not result.agrees:
        for problem in result.problems:
            console.print(f"- {problem}", highlight=False, markup=False, soft_wrap=True)
        raise PropertyNotMetError(f"{certificate}: {len(result.problems)} problems, see above")


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
    steps: StepsOption = 20,
    restarts: RestartsOption = 2,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write verdicts and counterexamples.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search integer counterexamples: projected gradient, then coordinates.

    Example: cactus-edge attack model.tflite --data mnist --eps 0.1 --samples 1000
    """
    from cactus_edge.certify import Request, Settings
    from cactus_edge.certify import attack as run

    if output is not None:
        files.refuse_existing(output, force)
    graph, _ = flatbuffer.load(model)
    request = Request(
        data=_split(data, split, graph),
        perturbation=_perturbation(eps, levels),
        first=first,
        count=samples,
        profiles=tuple(dict.fromkeys(profile)) if profile else None,
        attack=Settings(steps=steps, restarts=restarts),
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
        ("standard accuracy %", percent(shown.standard_accuracy)),
        ("attack accuracy %", percent(shown.attack_accuracy)),
        ("refuted", shown.verdicts["refuted"]),
    ]
    emit(shown, as_json, table(f"attack on {model.name}", ("", "value"), rows))


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (certify, check, attack):
        app.command()(verb)
