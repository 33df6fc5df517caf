"""Options that a command would ignore, in one table: each is a usage error with a way out.

Only what stands on the command line counts, the value that an option has anyway included.
``--force`` is never ignored: it is a permission, not a wish. What depends on what a file holds is
refused by the verb that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cactus_edge.errors import UsageError

Values = Mapping[str, object]


@dataclass(frozen=True)
class Rule:
    """``options``, by parameter, are ignored by ``verbs`` ``when`` the command's values say so."""

    verbs: tuple[str, ...]
    options: tuple[str, ...]
    when: Callable[[Values], bool]
    remedy: str


def _lacks(*names: str) -> Callable[[Values], bool]:
    """Whether one of these was left out."""
    return lambda values: any(not values[name] for name in names)


def _has(name: str) -> Callable[[Values], bool]:
    return lambda values: bool(values[name])


_SITES = ("layer", "bit", "bias_bits", "folded", "count", "attack")
_RANGE = ("eps", "levels", "split", "first", "samples", "profile")

RULES = (
    Rule(("certify", "train"), ("port",), _lacks("serve"), "it is the port of --serve; give both"),
    Rule(("certify",), ("radii_kind",), _lacks("radii"), "it says what --radii holds; give both"),
    Rule(
        ("certify", "radius", "verify"),
        ("budget", "memory"),
        lambda values: values["method"] in ("interval", "linear"),
        "it is about the complete search; give --method complete, too",
    ),
    Rule(
        ("verify",),
        ("steps", "restarts", "strong"),
        _lacks("attack"),
        "it is about the attack; leave out --no-attack",
    ),
    Rule(
        ("convert",),
        ("percentile",),
        lambda values: values["ranges"] in ("minmax", "mse"),
        "other --ranges leave out no share; give --ranges percentile",
    ),
    Rule(
        ("export-onnx",),
        ("samples",),
        _has("real"),
        "--float compares nothing; --index is the sample of its query",
    ),
    Rule(
        ("export-onnx",),
        ("samples", "split"),
        _lacks("data"),
        "there are no samples without --data; give both",
    ),
    Rule(
        ("export-onnx",),
        ("index",),
        lambda values: bool(values["real"]) and values["eps"] is None and values["data"] is None,
        "it is the sample of a query; give --data and --eps, too",
    ),
    Rule(
        ("supported-ops",),
        ("as_json",),
        _has("write"),
        "--write writes Markdown, and prints nothing; give one of them",
    ),
    Rule(
        ("faults",),
        (*_SITES, *_RANGE),
        _has("check"),
        "a report says itself which flips, boxes and samples it is about; leave it out of --check",
    ),
    Rule(
        ("faults",),
        ("attack",),
        lambda values: values["eps"] is None and not values["levels"],
        "it searches a box, and samples alone are none; give --eps or --levels, too",
    ),
    Rule(
        ("explain",),
        ("data",),
        _has("batch"),
        "batches skip no activations; leave out --batch or --data",
    ),
    Rule(
        ("compare",),
        ("eps",),
        _lacks("with_costs"),
        "it is the radius of the costs; leave out --no-costs",
    ),
    Rule(
        ("validate",),
        (
            *("samples", "layer_samples", "profile", "onnx", "device", "baud", "timeout"),
            "levels",
        ),
        _has("learn_profile"),
        "--learn-profile probes the installed runtimes, each with inputs of its own; leave it out",
    ),
    Rule(
        ("validate",),
        ("onnx", "profile"),
        _has("device"),
        "a board says itself which rounding it has, and is compared with the reference alone; "
        "validate runtimes in a command of their own, without --device",
    ),
    Rule(
        ("validate",),
        ("baud", "timeout", "levels"),
        _lacks("device"),
        "it is about a board; give --device, too",
    ),
    Rule(
        ("simulate",),
        ("volts",),
        lambda values: values["current"] is None,
        "it is for the estimate of energy; give --microamp-per-mhz, too",
    ),
    Rule(
        ("bench",),
        ("ceilings", "roofline"),
        lambda values: 1 not in _numbers(values["threads"]),
        "ceilings are those of one thread; give --threads 1, too",
    ),
    Rule(
        ("report",),
        ("data", "samples", "title"),
        _lacks("output"),
        "it is about the page; give -o PAGE.html, too",
    ),
)


def _numbers(value: object) -> Collection[object]:
    """What a repeatable option holds; one thread without it."""
    return value if isinstance(value, list) and value else (1,)  # pyright: ignore[reportUnknownVariableType]


def refuse_ignored(verb: str, given: Mapping[str, str], values: Values) -> None:
    """Check a command.

    Args:
        verb: its name.
        given: options on the command line by parameter, as they are spelled.
        values: of all parameters.

    Raises:
        UsageError: one of ``given`` would be ignored.
    """
    for rule in RULES:
        if verb in rule.verbs and rule.when(values):
            for name in rule.options:
                if name in given:
                    raise UsageError(f"{given[name]} would be ignored: {rule.remedy}")
