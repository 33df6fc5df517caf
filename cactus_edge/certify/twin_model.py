"""The twin as a model of its own: any runtime that runs it computes certified bounds.

A file holds scales, not multipliers, so each runtime derives its integers for the twin anew, and
some choose the rounding by the shape of a layer. ``twin_model`` therefore resolves both under every
named profile: the twin of the resolved model and the resolved twin. Where their integers are the
same, that runtime's bounds are those of ``certify`` under its profile. Of a universal model whose
twin is universal too, this has to be seen under one profile: each computes what all do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from cactus_edge import files, flatbuffer, profiles, universal
from cactus_edge.certify.twin import Twin, twin
from cactus_edge.constraints import validate
from cactus_edge.errors import InvalidGraphError, UnsupportedModelError
from cactus_edge.graph import Add, Graph, Linear, Requantization
from cactus_edge.operators import Lookup

METADATA = "cactus_edge.twin"
LAYOUT = "last axis: lower ends, then upper ends"


class TwinReport(msgspec.Struct, frozen=True):
    """What the file is, and on which runtimes its bounds are those of ``certify``.

    Attributes:
        model_sha256: of the model.
        sha256: of the twin.
        bytes: of the twin.
        input_shape: [1, ..., 2 c]: the lower ends of all c channels, then the upper ends.
        output_shape: [1, 2 k]: lower bounds of the k logits, then upper bounds.
        universal: whether every runtime computes the same bounds.
        profiles: under which the twin computes the bounds of ``certify``.
        others: profile -> why it does not.
    """

    model_sha256: str
    sha256: str
    bytes: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    universal: bool
    profiles: tuple[str, ...]
    others: dict[str, str]


@dataclass(frozen=True, eq=False)
class TwinModel:
    """A twin with scales, and the profiles under which it is exact; ``others``, with the reason."""

    twin: Twin
    universal: bool
    profiles: tuple[str, ...]
    others: dict[str, str]


def twin_model(graph: Graph) -> TwinModel:
    """The twin of a model, as a file can hold it.

    Raises:
        UnsupportedModelError: the model has no twin with scales, or it is exact under no profile.
        InvalidGraphError: the twin breaks a constraint.
    """
    if any(isinstance(op, (Linear, Add)) and op.requantization is not None for op in graph.core):
        raise UnsupportedModelError(
            "a twin for runtimes is made from a model with scales; give the graph as read from a "
            "file, before `resolve`"
        )
    core = Graph(graph.tensors, graph.core, graph.core_input, graph.logits)
    double = twin(core, tables=True)
    entries = ((METADATA, json.dumps({"layout": LAYOUT}).encode()),)
    double = replace(double, graph=replace(double.graph, metadata=entries))
    validate(double.graph)
    others = profiles.uncovered(core)
    for name, reason in profiles.uncovered(double.graph).items():
        others.setdefault(name, f"of the twin: {reason}")
    covering = [name for name in profiles.PROFILES if name not in others]
    differing = {name: _difference(core, double.graph, name) for name in covering}
    same = universal.is_universal(core) and universal.is_universal(double.graph)
    if not (same and not all(differing.values())):
        others |= {name: reason for name, reason in differing.items() if reason}
    exact = tuple(name for name in covering if name not in others)
    if not exact:
        raise UnsupportedModelError(
            "the twin is exact under no profile: "
            + "; ".join(f"{name}: {reason}" for name, reason in others.items())
        )
    return TwinModel(double, same, exact, others)


def make_twin(model: Path, output: Path, *, force: bool = False) -> TwinReport:
    """Write the twin of a ``.tflite`` file as another one.

    Raises:
        OutputError: ``output`` exists, or cannot be written.
        UnsupportedModelError: see ``twin_model``, or a file cannot hold the twin.
    """
    files.refuse_existing(output, force)
    graph, content = flatbuffer.load(model)
    made = twin_model(graph)
    whole = made.twin.graph
    written = flatbuffer.save(whole, output, force)
    return TwinReport(
        model_sha256=hashlib.sha256(content).hexdigest(),
        sha256=hashlib.sha256(written).hexdigest(),
        bytes=len(written),
        input_shape=whole.tensors[whole.input].shape,
        output_shape=whole.tensors[whole.output].shape,
        universal=made.universal,
        profiles=made.profiles,
        others=made.others,
    )


def _difference(core: Graph, double: Graph, name: str) -> str:
    """Where the integers of the twin's layers are not those of the model's; empty if nowhere."""
    try:
        wanted = twin(profiles.resolve(core, name), tables=True).graph
        found = profiles.resolve(double, name)
        validate(found)
    except (InvalidGraphError, UnsupportedModelError) as error:
        return str(error)
    own = {op.output for op in core.operators}
    for old, new in zip(wanted.operators, found.operators, strict=True):
        if old.output not in own:
            equal = True  # puts halves in order, exactly under every rounding
        elif isinstance(old, Linear) and isinstance(new, Linear):
            assert old.requantization is not None and new.requantization is not None  # resolved
            equal = _equal(old.requantization, new.requantization)
        elif isinstance(old, Add) and isinstance(new, Add):
            equal = old.requantization == new.requantization
        elif isinstance(old, Lookup) and isinstance(new, Lookup):
            assert old.table is not None and new.table is not None  # resolved
            equal = np.array_equal(old.table, new.table)
        else:
            equal = True  # pools, PAD and RESHAPE have one arithmetic
        if not equal:
            return f"'{old.name}' is rounded by its shape, and the twin has twice the channels"
    return ""


def _equal(a: Requantization, b: Requantization) -> bool:
    pairs = ((a.rounding, b.rounding), (a.multiplier, b.multiplier), (a.shift, b.shift))
    return all(np.array_equal(x, y) for x, y in pairs)
