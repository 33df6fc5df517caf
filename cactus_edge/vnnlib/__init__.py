"""VNN-LIB 1.0 and 2.0: queries about a network, read exactly and bound to a model's integers.

Real inputs become stored integers through the model's input map, ties outwards, as in
``inputs.box``; they are not clipped to [0, 1], because the stored type limits what they become.
Real outputs are what stored logits stand for, ``scale * (q - zero_point)``, exactly. With
``variables="stored"`` X are stored integers and Y stored logits, and nothing is rounded.

Input elements are counted in the order in which the model stores them: height, width, channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from cactus_edge import inputs, specification
from cactus_edge.errors import DataError
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import InputMap
from cactus_edge.specification import Atom, Specification
from cactus_edge.vnnlib.query import Bound, Case, Query, Tensor, parse

__all__ = ["BoundCase", "Query", "Variables", "bind", "parse"]

Variables = Literal["real", "stored"]


@dataclass(frozen=True, eq=False)
class BoundCase:
    """A box of stored inputs, int64 [1, *input shape], and what must not happen in it."""

    lower: Int64Array
    upper: Int64Array
    specification: Specification


def bind(query: Query, graph: Graph, variables: Variables = "real") -> tuple[BoundCase, ...]:
    """A query about this model, in stored integers.

    Args:
        query: as parsed.
        graph: the model, resolved or not.
        variables: whether X and Y are real values or stored integers.

    Returns:
        The cases that hold some stored input, at least one.

    Raises:
        DataError: the query does not fit the model, or no stored input is in any case.
        MalformedModelError: the model's input has no scale.
    """
    if variables not in ("real", "stored"):
        raise DataError(f"variables are 'real' or 'stored', not '{variables}'")
    _check_tensor(query, "input", query.input, graph.tensors[graph.core_input].shape)
    _check_tensor(query, "output", query.output, graph.tensors[graph.logits].shape)
    for name, tensor in (("input", query.input), ("output", query.output)):
        if tensor.stored and variables == "real":
            raise DataError(
                f"{query.file}: the {name} is declared {tensor.type}; "
                "read the query with stored variables"
            )
    tensor = graph.tensors[graph.core_input]
    mapping = inputs.input_map(graph) if variables == "real" else None
    found: list[BoundCase] = []
    for case in query.cases:
        lower = _ends(mapping, case.lower, up=False)
        upper = _ends(mapping, case.upper, up=True)
        least, greatest = tensor.dtype.range
        low, high = np.maximum(lower, least), np.minimum(upper, greatest)
        if (low > high).any():
            continue
        shape = (1, *tensor.shape[1:])
        unsafe = _specification(graph, case, variables)
        found.append(BoundCase(low.reshape(shape), high.reshape(shape), unsafe))
    if not found:
        raise DataError(f"{query.file}: no stored input lies in the query's boxes")
    return tuple(found)


def _check_tensor(query: Query, name: str, declared: Tensor, shape: tuple[int, ...]) -> None:
    """Sizes have to agree, and so does the order of elements."""
    size = int(np.prod(shape))
    extents = [extent for extent in declared.shape or () if extent != 1]
    flat = len(extents) < 2
    if declared.size != size or not (flat or extents == [e for e in shape if e != 1]):
        shown = declared.size if declared.shape is None else list(declared.shape)
        raise DataError(
            f"{query.file}: declares an {name} of {shown}, the model's is {list(shape)}; "
            "a query states elements in the model's own order"
        )


def _ends(mapping: InputMap | None, bounds: Sequence[Bound], *, up: bool) -> Int64Array:
    """Stored ends of a box, one for each input element."""
    known: dict[Bound, int] = {}
    for bound in dict.fromkeys(bounds):
        known[bound] = _end(mapping, bound, up=up)
    return np.array([known[bound] for bound in bounds], np.int64)


def _end(mapping: InputMap | None, bound: Bound, *, up: bool) -> int:
    if mapping is not None:
        return inputs.real_level(mapping, bound.value, up=up, strict=bound.strict)
    if up:
        level = bound.value.__ceil__() - 1 if bound.strict else bound.value.__floor__()
    else:
        level = bound.value.__floor__() + 1 if bound.strict else bound.value.__ceil__()
    return min(max(level, -(1 << 40)), 1 << 40)  # what is out of any type's range stays so


def _specification(graph: Graph, case: Case, variables: Variables) -> Specification:
    unsafe: list[tuple[Atom, ...]] = []
    for conjunction in case.unsafe:
        atoms: list[Atom] = []
        for constraint in conjunction:
            terms: dict[int, Fraction | int] = {k: c for (_, k), c in constraint.terms}
            bound, strict = -constraint.constant, constraint.strict
            if variables == "real":
                atoms.append(specification.real_atom(graph, terms, bound, strict=strict))
            else:
                atoms.append(specification.atom(terms, bound, strict=strict))
        unsafe.append(tuple(atoms))
    return Specification(tuple(unsafe))
