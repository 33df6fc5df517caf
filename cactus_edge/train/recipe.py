"""One TOML file per training run, read strictly.

Contract: ``load_recipe`` returns a frozen ``Recipe`` in which every field has a value, or raises
one ``DataError`` that names file, section and key and says what to write instead. Unknown keys are
errors. ``write_recipe`` writes the resolved recipe, which loads to an equal ``Recipe``.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tomli_w

from cactus_edge.errors import DataError, meant, shortened
from cactus_edge.train import losses
from cactus_edge.train.compress import Clipping, Quantizer
from cactus_edge.train.members import Dense, Member, Perturbed, Pruning

UnitInterval = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
PositiveUnit = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]  # limits keep infinity out
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e3)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # torch's seeds and sizes
PositiveCount = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Option = bool | int | float | str
_LONGEST, _DEEPEST = 1 << 16, 8
# The parser of TOML takes quadratic time and room for keys of many parts.
_DEEP_KEY = re.compile(
    r"""(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % _DEEPEST  # noqa: UP031
)


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which data.

    Attributes:
        name: one of ``datasets.NAMES`` or the path of an ``.npz``.
        validation: fraction of the training data held out for everything that is tuned.
        augment: ``crop`` shifts images by up to two pixels, ``flip-crop`` mirrors them too.
    """

    name: str
    validation: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.1
    augment: Literal["none", "crop", "flip-crop"] = "none"


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trained network to go on from, instead of an initialisation; see ``train.start``.

    Attributes:
        source: directory of a run or its ``model.safetensors``; the key is ``from``.
    """

    source: Annotated[str, msgspec.Meta(min_length=1)] = msgspec.field(name="from")


class NetworkChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which network of ``zoo.NETWORKS``, and a factor for the width of its hidden layers."""

    name: str
    width: Positive = 1.0


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The certified loss and its schedules (epochs may be fractions).

    Attributes:
        epsilon: radius in training, in units of the pixel range [0, 1] (2/255 is 0.0078431).
        certify_epsilon: radius of the reported certified accuracy; 0 means ``epsilon``.
        loss: a name of ``losses.LOSSES``.
        options: keys that belong to this loss alone; completed by its defaults.
        sabr_lambda: size of SABR's small box relative to the whole.
        attack_steps: steps of the attack, in losses that use one.
        lambda_max: final weight of the certified loss; the standard loss has the rest.
        lambda_ramp: epochs over which that weight grows from 0; 0 means constant.
        warmup: epochs with epsilon 0 before it grows.
        epsilon_ramp: epochs over which epsilon grows.
        shi_regulariser: weight of Shi et al.'s regulariser, active while epsilon grows.
        l1: weight of the sum of absolute weights.
        nrs: weight of the instability of ReLUs (Li et al. 2023); see ``objective.instability``.
        initialisation: ``default`` is torch's, ``ibp`` is Shi et al.'s.
    """

    epsilon: PositiveUnit
    certify_epsilon: UnitInterval = 0.0
    loss: str = "ibp"
    options: dict[str, Option] = {}
    sabr_lambda: PositiveUnit = 0.4
    attack_steps: PositiveCount = 8
    lambda_max: UnitInterval = 0.75
    lambda_ramp: NonNegative = 0.0
    warmup: NonNegative = 0.0
    epsilon_ramp: NonNegative = 0.0
    shi_regulariser: NonNegative = 0.5
    l1: NonNegative = 0.0
    nrs: NonNegative = 0.0
    initialisation: Literal["default", "ibp"] = "default"

    def __post_init__(self) -> None:
        """Check the options against the loss, and complete them."""
        if self.loss not in losses.LOSSES:
            names = ", ".join(repr(name) for name in losses.LOSSES)
            raise ValueError(
                f"[objective] loss: there is no '{self.loss}'"
                f"{meant(self.loss, losses.LOSSES)} use one of {names}"
            )
        kind = losses.LOSSES[self.loss].options
        try:
            options = msgspec.to_builtins(msgspec.convert(self.options, kind))
        except msgspec.ValidationError as error:
            raise ValueError(_explain(str(error), kind, ".objective.options")) from error
        msgspec.structs.force_setattr(self, "options", options)

    @property
    def reported_epsilon(self) -> float:
        """The radius at which certified accuracy is reported."""
        return self.certify_epsilon or self.epsilon


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The compression set C(theta).

    Attributes:
        members: what the loss is averaged over; see ``cactus_edge.train.members``.
        draw: ``all`` members in every step, or ``one`` or several members drawn per step (same
            expectation at the cost of as many networks).
        quantizer: how quantized members get their weights: rounding with a ``straight-through``
            gradient, the same without slopes at 0 (``plain-straight-through``), or the adversarial
            perturbation that bounds any rounding.
        clipping: ``none``, or weights are clipped where rounding has the least ``mse``.
        activations: quantized members propagate ``float`` or fake-quantized ``int8`` activations.
        scope: single weights are pruned ``layer`` by layer, or by their ``global`` ranking.
        prune_last: whether single weights, groups and blocks of the output layer are pruned too.
        mask_refresh: masks are recomputed every ``step`` or every ``epoch``, or computed ``once``,
            before the first step, and kept.
        importance: patterns rank weights by ``magnitude``, or by learned ``scores``, which are then
            all that is trained; see ``train.importance``.
        warmup: epochs in which the whole network is trained alone, before the members are.
    """

    members: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1)] = (Dense(),)
    draw: Literal["all", "one"] | PositiveCount = "all"
    quantizer: Quantizer = "straight-through"
    clipping: Clipping = "none"
    activations: Literal["float", "int8"] = "float"
    scope: Literal["layer", "global"] = "layer"
    prune_last: bool = True
    mask_refresh: Literal["step", "epoch", "once"] = "step"
    importance: Literal["magnitude", "scores"] = "magnitude"
    warmup: NonNegative = 0.0

    @property
    def pruning(self) -> Pruning:
        """What patterns need to know."""
        return Pruning(self.scope, self.prune_last)

    def __post_init__(self) -> None:
        """Check what involves several keys."""
        if isinstance(self.draw, int) and self.draw > len(self.members):
            raise ValueError(
                f"draw = {self.draw}, but there are {len(self.members)} members; write 'all' or a "
                "smaller number"
            )
        bounded = self.quantizer == "weight-perturbation" or any(
            isinstance(member, Perturbed) for member in self.members
        )
        if self.clipping != "none" and bounded:
            raise ValueError(
                "[compression] clipping moves weights by more than half a step, which weight "
                "perturbations do not cover; write clipping = 'none' or quantizer = "
                "'straight-through' without perturbed members"
            )
        if self.warmup and (self.mask_refresh == "once" or self.importance == "scores"):
            raise ValueError(
                "[compression] warmup trains weights before any are chosen, but mask_refresh = "
                "'once' and importance = 'scores' choose among those of the start; write [start] "
                "from = the run of a recipe without members"
            )
        if self.importance == "scores":
            if self.mask_refresh != "step":
                raise ValueError(
                    f"importance = 'scores' with mask_refresh = '{self.mask_refresh}': scores move "
                    "in every step; write mask_refresh = 'step'"
                )
            whole = [member.label() for member in self.members if not member.pattern().key()]
            if whole:
                raise ValueError(
                    f"importance = 'scores' trains the choice of weights alone, but '{whole[0]}' "
                    "keeps them all; write members that prune"
                )


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adam and its schedule.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples per step; an incomplete last batch is left out.
        learning_rate: before the first milestone.
        milestones: fractions of all epochs after which the rate is multiplied by ``decay``.
        decay: the factor at each milestone.
        gradient_clip: largest norm of the gradient; 0 switches clipping off.
    """

    epochs: PositiveCount
    batch_size: PositiveCount = 256
    learning_rate: Positive = 5e-4
    milestones: tuple[PositiveUnit, ...] = (0.7, 0.9)
    decay: PositiveUnit = 0.2
    gradient_clip: NonNegative = 10.0


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that determines a training run.

    Attributes:
        data: see ``Data``.
        network: see ``NetworkChoice``.
        objective: see ``Objective``.
        optimizer: see ``Optimizer``.
        compression: see ``Compression``.
        start: see ``Start``.
        seed: of initialisation, order, augmentation, attacks and draws.
        threads: of torch on the CPU; 0 leaves torch's choice.
    """

    data: Data
    network: NetworkChoice
    objective: Objective
    optimizer: Optimizer
    compression: Compression = Compression()
    start: Start | None = None
    seed: Count = 0
    threads: Count = 0

    def __post_init__(self) -> None:
        """Check what involves several keys."""
        ramp = self.objective.warmup + self.objective.epsilon_ramp
        if ramp > self.optimizer.epochs or self.objective.lambda_ramp > self.optimizer.epochs:
            raise ValueError(
                f"[objective] warmup + epsilon_ramp and lambda_ramp must not exceed [optimizer] "
                f"epochs = {self.optimizer.epochs}"
            )
        if self.compression.warmup > self.optimizer.epochs:
            raise ValueError(
                f"[compression] warmup must not exceed [optimizer] epochs = {self.optimizer.epochs}"
            )


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        DataError: no such file, not TOML, unknown key, wrong type or value out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such recipe") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the recipe ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the recipe is not UTF-8 text: {error}") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Check the text of a recipe; ``where`` is the name that errors carry.

    Raises:
        DataError: see ``load_recipe``.
    """
    if len(text) > _LONGEST or _DEEP_KEY.search(text):
        raise DataError(
            f"{where}: no recipe has more than {_LONGEST} characters or keys of more than "
            f"{_DEEPEST} parts"
        )
    try:
        return msgspec.toml.decode(text.encode(), type=Recipe)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {shortened(_explain(str(error)), 900)}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
        raise DataError(f"{where}: not a TOML file: {shortened(error)}") from error


def parse_member(text: str) -> Member:
    """A member as a recipe writes it, ``{ kind = "pruned", sparsity = 0.5 }``.

    Raises:
        DataError: no member, or no TOML.
    """
    try:
        return msgspec.toml.decode(f"member = {text}".encode(), type=dict[str, Member])["member"]
    except msgspec.ValidationError as error:
        what = str(error).split(" - at `")[0]
        raise DataError(f"{what}{_remedy(Member, fields=False)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a table of TOML: {shortened(error)}") from error


def format_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML: every key with its value."""
    document: dict[str, object] = msgspec.to_builtins(recipe)
    if not recipe.objective.options:  # as recipes read that know of no options
        document["objective"] = {
            key: value
            for key, value in msgspec.to_builtins(recipe.objective).items()
            if key != "options"
        }
    if recipe.start is None:
        del document["start"]
    scalars = {key: value for key, value in document.items() if not isinstance(value, dict)}
    return tomli_w.dumps(scalars | document)


def _explain(message: str, root: object = None, above: str = "") -> str:
    """Turn msgspec's message into section, key and remedy.

    ``root`` is the type that was read, by default the recipe, and ``above`` the path it stands at.
    """
    matched = re.fullmatch(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", message, re.DOTALL)
    assert matched is not None  # the pattern matches every text
    what, path = matched["what"], matched["path"] or ""
    if what.startswith("["):  # a check across keys, which names its place
        return what
    keys = [key for key in (above + path).split(".") if key]
    place = f"[{keys[0]}] {'.'.join(keys[1:])}".strip() if keys else "top level"
    unknown = re.search(r"unknown field `(.*)`", what)
    kind = _type_at(path, Recipe if root is None else root)
    remedy = _remedy(kind, fields=unknown is not None)
    word = unknown or re.match(r"Invalid (?:enum )?value '(.*)'", what)
    if unknown:
        what = f"unknown key '{unknown[1]}'"
    if word and remedy:
        known = re.findall(r"[\w-]+" if unknown else r"'([\w-]+)'", remedy)
        remedy = f"{meant(word[1], known)} {remedy.removeprefix('; ')}"
    return f"{place}: {what}{remedy}"


def _type_at(path: str, root: object) -> object:
    """The annotation below ``root`` at a path such as ``.compression.members[...].sparsity``."""
    kind = root
    for key in re.findall(r"\.(\w+)|(\[)", path):
        name, index = key
        if index:
            arguments = typing.get_args(_bare(kind))
            kind = arguments[0] if arguments else None
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            kind = typing.get_type_hints(kind, include_extras=True).get(name)
        elif name != "kind":  # the kind of a member is a matter of the whole union
            candidates = [
                typing.get_type_hints(option, include_extras=True).get(name)
                for option in typing.get_args(_bare(kind))
                if isinstance(option, type) and issubclass(option, msgspec.Struct)
            ]
            kind = next((candidate for candidate in candidates if candidate), None)
    return kind


def _bare(kind: object) -> object:
    """Strip ``Annotated``."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _remedy(kind: object, *, fields: bool) -> str:
    """What may be written there."""
    bare = _bare(kind)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        names = ", ".join(field.encode_name for field in msgspec.structs.fields(bare)) or "none"
        return f"; known keys: {names}" if fields else f"; needed and known keys: {names}"
    if typing.get_origin(bare) is Literal:
        return f"; use one of {', '.join(repr(choice) for choice in typing.get_args(bare))}"
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        options = typing.get_args(bare)
        kinds = [
            option
            for option in options
            if isinstance(option, type) and issubclass(option, msgspec.Struct)
        ]
        if len(kinds) < len(options):
            texts = [_remedy(option, fields=fields).removeprefix("; ") for option in options]
            return f"; {', or '.join(text for text in texts if text)}"  # None has no remedy
        keys = [", ".join(kind.__struct_fields__) or "no more keys" for kind in kinds]
        tags = [repr(kind.__struct_config__.tag) for kind in kinds]
        texts = [f"{tag} ({text})" for tag, text in zip(tags, keys, strict=True)]
        return f"; kind is one of {', '.join(texts)}"
    if typing.get_origin(kind) is Annotated:
        limits = [m for m in typing.get_args(kind)[1:] if isinstance(m, msgspec.Meta)]
        texts = [
            f"{word} {value:g}"
            for meta in limits
            for word, value in (
                ("at least", meta.ge),
                ("above", meta.gt),
                ("at most", meta.le),
                ("below", meta.lt),
            )
            if value is not None
        ]
        name = bare.__name__ if isinstance(bare, type) else ""
        return f"; write a number ({name}) {' and '.join(texts)}" if texts else ""
    return ""
