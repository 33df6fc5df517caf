"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cactus_edge import certificate as certificates
from cactus_edge import datasets, inputs
from cactus_edge.errors import UsageError, meant
from cactus_edge.inputs import Perturbation
from cactus_edge.radii import read_radii

if TYPE_CHECKING:
    from cactus_edge.certify.attack import Settings
    from cactus_edge.graph import Graph, Int64Array

logger = logging.getLogger(__name__)

ModelArgument = Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")]
ModelsArgument = Annotated[
    list[Path], typer.Argument(help="One or more .tflite files.", metavar="MODEL")
]
JobsOption = Annotated[int | None, typer.Option("--jobs", help="Work with this many processes.")]


def a_radius(given: str | list[str] | None) -> str | list[str] | None:
    """Refuse radii that are no number, with the option's name."""
    for text in [given] if isinstance(given, str) else given or []:
        try:
            inputs.rational(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None
    return given


EpsilonOption = Annotated[
    str | None,
    typer.Option(
        "--eps", callback=a_radius, help="Radius on real inputs in [0, 1], such as 0.1 or 8/255."
    ),
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
RadiiOption = Annotated[
    Path | None,
    typer.Option("--radii", help="A file with a radius for each input element, instead of --eps."),
]
RadiiKindOption = Annotated[
    str, typer.Option("--radii-kind", help="What --radii holds: epsilon or levels.")
]
MaskOption = Annotated[
    Path | None, typer.Option("--mask", help="A file of bool: which elements may change at all.")
]
PatchOption = Annotated[
    str | None,
    typer.Option("--patch", help="Changes within one window alone: HxW or HxW/STRIDE."),
]
TopOption = Annotated[
    int, typer.Option("--top", help="The label has to be among that many largest logits.")
]
MethodOption = Annotated[
    str, typer.Option("--method", help="Strongest method: interval, linear or complete.")
]
BudgetOption = Annotated[
    float, typer.Option("--budget", help="Seconds a sample for --method complete.")
]
MemoryOption = Annotated[
    str, typer.Option("--memory", help="Memory of the complete search, such as 2G.")
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Gradient steps of the attack; 20 without it.")
]
RestartsOption = Annotated[
    int | None, typer.Option("--restarts", help="Random restarts of the attack; 2 without it.")
]
StrongOption = Annotated[
    bool, typer.Option("--strong", help="Attack with some twenty times the work.")
]


@dataclass(frozen=True)
class Around:
    """What the options say about the set around each sample."""

    eps: str | None = None
    levels: int | None = None
    radii: Path | None = None
    radii_kind: str = "epsilon"
    mask: Path | None = None
    patch: str | None = None

    def of(self, graph: Graph) -> Perturbation:
        """The set for inputs of a model.

        Raises:
            UsageError: options that do not go together.
            DataError: a file that does not fit the model.
        """
        given = [self.eps is not None, self.levels is not None, self.radii is not None]
        if sum(given) != 1:
            raise UsageError("give either --eps or --levels, or a file with --radii")
        kind = "levels" if self.levels is not None else "epsilon"
        radius = self.eps if self.levels is None else self.levels
        if self.radii is not None:
            if self.mask is not None:
                raise UsageError("--mask: a radius of 0 in --radii fixes an element already")
            if self.radii_kind not in ("epsilon", "levels"):
                raise UsageError(f"--radii-kind {self.radii_kind}: give epsilon or levels")
            found = read_radii(graph, self.radii, self.radii_kind)
        elif self.mask is not None:
            found = read_radii(graph, self.mask, kind, radius)
        else:
            assert radius is not None
            found = Perturbation(kind, inputs.rational(radius))
        return found if self.patch is None else found.patched(*_window(self.patch))


def _window(text: str) -> tuple[int, int, int]:
    """Height, width and stride of ``5x5`` or ``5x5/2``."""
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})(?:/([0-9]{1,6}))?", text)
    if found is None:
        raise UsageError(f"--patch {text}: give HEIGHTxWIDTH or HEIGHTxWIDTH/STRIDE, such as 5x5/2")
    height, width, stride = (int(number) for number in found.groups("1"))
    return height, width, stride


def split_of(name: str, split: str, graph: Graph) -> datasets.Dataset:
    """A split; what a model's training held out is known from the model's provenance."""
    splits = ("train", "validation", "test")
    if split not in splits:
        raise UsageError(f"no split '{split}'{meant(split, splits)} use test, validation or train")
    fraction = datasets.VALIDATION_FRACTION
    provenance = dict(graph.metadata).get("cactus_edge.provenance", b"{}")
    try:
        fraction = float(json.loads(provenance)["recipe"]["data"]["validation"])
    except (ValueError, KeyError, TypeError, RecursionError):
        logger.info("the model does not say what training held out; taking %g", fraction)
    return datasets.load(name, split, fraction)  # pyright: ignore[reportArgumentType]


def training_samples(name: str, count: int, graph: Graph) -> Int64Array:
    """The first samples of a data set's training split, as stored integers."""
    return inputs.stored(graph, split_of(name, "train", graph).images[:count])


def settings_of(steps: int | None, restarts: int | None, strong: bool) -> Settings:
    """Strength of an attack; what is not given is that of an ordinary or a strong one."""
    from cactus_edge.certify.attack import Settings

    settings = Settings.strong() if strong else Settings()
    given = {"steps": steps, "restarts": restarts}
    return replace(settings, **{name: n for name, n in given.items() if n is not None})


def attack_of(
    attack: bool, steps: int | None, restarts: int | None, strong: bool
) -> Settings | None:
    """The attack that was asked for, by ``--attack`` or ``--strong``; None for no attack.

    Raises:
        UsageError: its strength without the attack.
    """
    if attack or strong:
        return settings_of(steps, restarts, strong)
    if steps is not None or restarts is not None:
        raise UsageError("--steps and --restarts are about the attack; give --attack, too")
    return None


def shard_of(text: str) -> tuple[int, int]:
    """The numbers of ``i/n``."""
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        raise UsageError(f"--shard {text}: give i/n, such as 2/8")
    return int(found[1]), int(found[2])


def bytes_of(text: str) -> int:
    """A size such as 512M or 2G, in bytes."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = re.fullmatch("([0-9]{1,15})([KMG]?)", text.upper())
    if found is None:
        raise UsageError(f"--memory {text}: give bytes, or a number with K, M or G")
    return int(found[1]) * units[found[2]]


def method_of(text: str) -> certificates.Method:
    """The method of that name."""
    for method in certificates.VERIFIERS:
        if text == method:
            return method
    known = certificates.VERIFIERS
    raise UsageError(f"no method '{text}'{meant(text, known)} known: {', '.join(known)}")
