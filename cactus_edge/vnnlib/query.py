"""A VNN-LIB file as a query: boxes of inputs, each with the outputs that would be a counterexample.

Version 1.0 declares ``X_i`` and ``Y_j`` one by one; 2.0 declares a network with one input and one
output tensor. What is asserted is split into cases: a box of inputs and a disjunction of
conjunctions of linear constraints on outputs. The file asks whether some input of some box has
outputs in that case's set; a property is certified when there is none.

Constraints on inputs have to be bounds of single variables; constraints that relate inputs with one
another, or with outputs, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from cactus_edge.errors import DataError
from cactus_edge.vnnlib.formula import (
    Conjunction,
    Constraint,
    Formula,
    Joined,
    Reader,
    Variable,
    normal_form,
)
from cactus_edge.vnnlib.syntax import Node, Source, read

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_FLAT = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
_VERSION = re.compile(r"<([0-9]{1,4})\.([0-9]{1,4})>")
_REALS = ("real", "float16", "float32", "float64", "bfloat16")
_INTEGERS = ("int8", "uint8", "int16", "int32")
_LARGEST_TENSOR = 1 << 24
_MOST_BOUNDS = 1 << 22


@dataclass(frozen=True, slots=True)
class Bound:
    """An end of an interval; ``strict``: the end itself is outside."""

    value: Fraction
    strict: bool = False


@dataclass(frozen=True)
class Case:
    """A box, and the outputs that break the property there.

    ``lower`` and ``upper`` have a bound for each input element; ``unsafe`` is a disjunction of
    conjunctions of constraints on ``Y``.
    """

    lower: tuple[Bound, ...]
    upper: tuple[Bound, ...]
    unsafe: tuple[Conjunction, ...]


@dataclass(frozen=True)
class Tensor:
    """A declared input or output; ``shape`` None where variables are declared one by one."""

    size: int
    shape: tuple[int, ...] | None
    type: str

    @property
    def stored(self) -> bool:
        """Whether the declared type is an integer one."""
        return self.type in _INTEGERS


@dataclass(frozen=True)
class Query:
    """A whole file; ``cases`` is never empty."""

    file: str
    version: int
    input: Tensor
    output: Tensor
    cases: tuple[Case, ...]


def parse(content: bytes, file: str = "query.vnnlib") -> Query:
    """Read VNN-LIB 1.0 or 2.0.

    Args:
        content: the file's bytes.
        file: its name, for messages.

    Raises:
        DataError: not VNN-LIB, beyond what is supported, or no input satisfies its constraints; the
            message names the line.
    """
    source = Source(file)
    document = _Document(source)
    for node in read(content, source):
        document.command(node)
    return document.query()


class _Document:
    """What a file has declared and asserted so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.version: int | None = None
        self.flat: dict[str, Variable] = {}
        self.tensors: dict[str, tuple[str, Tensor]] = {}
        self.asserted: list[Formula] = []
        self.reader = Reader(source, self.variable)

    def command(self, node: Node) -> None:
        """One list at the top of the file."""
        match node.head:
            case "vnnlib-version":
                self._declared_version(node)
            case "declare-const":
                self._need_version(node, 1)
                self._declare_const(node)
            case "declare-network":
                self._need_version(node, 2)
                self._declare_network(node)
            case "assert":
                if len(node.arguments) != 1:
                    raise self.source.error(node.line, "'assert' takes one formula")
                self.asserted.append(self.reader.formula(node.arguments[0]))
            case "set-logic" | "set-info":
                pass  # SMT-LIB's headers, which change no meaning
            case head:
                raise self.source.error(
                    node.line,
                    f"unknown command '{head}'; known: vnnlib-version, declare-const, "
                    "declare-network, assert",
                )

    def _declared_version(self, node: Node) -> None:
        match = _VERSION.fullmatch(node.arguments[0].text) if len(node.arguments) == 1 else None
        if match is None or match[1] not in ("1", "2"):
            raise self.source.error(node.line, "the version is <1.0> or <2.0>")
        if self.version is not None or self.asserted:
            raise self.source.error(node.line, "the version stands once, at the top")
        self.version = int(match[1])

    def _need_version(self, node: Node, version: int) -> None:
        if self.version is None:
            self.version = version
        if self.version != version:
            raise self.source.error(
                node.line, f"'{node.head}' belongs to version {version}, this is {self.version}"
            )

    def _declare_const(self, node: Node) -> None:
        match = _FLAT.fullmatch(node.arguments[0].text) if len(node.arguments) == 2 else None
        if match is None or node.arguments[1].text != "Real" or _indexed(node.arguments):
            raise self.source.error(node.line, "write (declare-const X_0 Real), or Y_0")
        if match[0] in self.flat:
            raise self.source.error(node.line, f"'{match[0]}' is declared twice")
        self.flat[match[0]] = (match[1], int(match[2]))

    def _declare_network(self, node: Node) -> None:
        if self.tensors:
            raise self.source.error(node.line, "a second network; queries about one are supported")
        if not node.arguments or not _is_name(node.arguments[0]):
            raise self.source.error(node.line, "the network has no name")
        for declaration in node.arguments[1:]:
            kind = {"declare-input": "X", "declare-output": "Y"}.get(declaration.head)
            if kind is None:
                shown = declaration.head or declaration.text
                raise self.source.error(
                    declaration.line, f"'{shown}' is not supported; one input and one output are"
                )
            name, tensor = self._tensor(declaration)
            if name in self.tensors or any(known == kind for known, _ in self.tensors.values()):
                raise self.source.error(
                    declaration.line, "one input and one output, of different names, are supported"
                )
            self.tensors[name] = (kind, tensor)
        if len(self.tensors) != 2:
            raise self.source.error(node.line, "the network needs one input and one output")

    def _tensor(self, node: Node) -> tuple[str, Tensor]:
        parts = list(node.arguments)
        if len(parts) == 3 and parts[2].text.startswith('"'):
            parts.pop()  # the name in the model's file: there is one tensor it can be
        if len(parts) != 2 or not _is_name(parts[0]) or parts[1].indices is None:
            raise self.source.error(node.line, f"write ({node.head} X real [1,784])")
        kind = parts[1].text.lower()
        if kind not in (*_REALS, *_INTEGERS):
            known = ", ".join((*_REALS, *_INTEGERS))
            raise self.source.error(node.line, f"no element type '{parts[1].text}'; known: {known}")
        size = prod(parts[1].indices)
        if not 0 < size <= _LARGEST_TENSOR:
            raise self.source.error(node.line, f"a tensor of {size} elements")
        return parts[0].text, Tensor(size, parts[1].indices, kind)

    def variable(self, node: Node) -> Variable | None:
        """The variable that a symbol names."""
        if node.indices is None and node.text in self.flat:
            return self.flat[node.text]
        if node.text not in self.tensors:
            return None
        kind, tensor = self.tensors[node.text]
        shape, indices = tensor.shape or (), node.indices or ()
        if len(indices) != len(shape):
            raise self.source.error(
                node.line, f"'{node.text}' has {len(shape)} dimensions, not {len(indices)}"
            )
        flat = 0
        for index, extent in zip(indices, shape, strict=True):
            if index >= extent:
                raise self.source.error(
                    node.line, f"{node.text}{list(indices)} is outside of shape {list(shape)}"
                )
            flat = flat * extent + index
        return kind, flat

    def query(self) -> Query:
        """Everything together, once the file has ended."""
        if self.version is None:
            raise DataError(f"{self.source.file}: declares nothing; is it a VNN-LIB file?")
        if not self.asserted:
            raise DataError(f"{self.source.file}: asserts nothing")
        input_, output = (self._declared(kind) for kind in "XY")
        common, choices = normal_form(Joined(True, tuple(self.asserted)), self.source)
        cases = _cases(common, choices, input_.size, self.source)
        return Query(self.source.file, self.version, input_, output, cases)

    def _declared(self, kind: str) -> Tensor:
        if self.tensors:
            return next(tensor for known, tensor in self.tensors.values() if known == kind)
        indices = [index for known, index in self.flat.values() if known == kind]
        if not indices or len(indices) != max(indices) + 1:
            known = set(indices)
            missing = next(i for i in range(len(indices) + 1) if i not in known)
            raise DataError(f"{self.source.file}: '{kind}_{missing}' is not declared")
        return Tensor(len(indices), None, "real")


def _is_name(node: Node) -> bool:
    return node.indices is None and _NAME.fullmatch(node.text) is not None


def _indexed(nodes: Sequence[Node]) -> bool:
    return any(node.indices is not None for node in nodes)


def _cases(
    common: Conjunction, choices: Sequence[Conjunction], inputs: int, source: Source
) -> tuple[Case, ...]:
    """Choices with the same bounds of inputs make one case; empty boxes are left out."""
    own, shared = _divided(common, source)
    grouped: dict[Conjunction, list[Conjunction]] = {}
    for choice in choices:
        bounds, outputs = _divided(choice, source)
        key = tuple(sorted(bounds, key=lambda c: (c.terms, c.constant, c.strict)))
        grouped.setdefault(key, []).append(shared + outputs)
    if len(grouped) * inputs > _MOST_BOUNDS:
        raise DataError(
            f"{source.file}: {len(grouped)} boxes of {inputs} inputs are more than "
            f"{_MOST_BOUNDS} bounds; split the query"
        )
    lower: list[Bound | None] = [None] * inputs
    upper: list[Bound | None] = [None] * inputs
    _tighten(own, lower, upper)
    found: list[Case] = []
    for bounds, unsafe in grouped.items():
        low, high = lower.copy(), upper.copy()
        _tighten(bounds, low, high)
        if _is_empty(low, high):
            continue
        ends = [[bound for bound in side if bound is not None] for side in (low, high)]
        for side, name, kept in zip((low, high), ("lower", "upper"), ends, strict=True):
            if len(kept) != inputs:
                index = side.index(None)
                raise DataError(f"{source.file}: input {index} has no {name} bound; assert one")
        found.append(Case(tuple(ends[0]), tuple(ends[1]), tuple(dict.fromkeys(unsafe))))
    if not found:
        raise DataError(
            f"{source.file}: no input satisfies the constraints, so that nothing would be shown"
        )
    return tuple(found)


def _divided(conjunction: Conjunction, source: Source) -> tuple[Conjunction, Conjunction]:
    """Bounds of inputs and constraints on outputs."""
    bounds: list[Constraint] = []
    outputs: list[Constraint] = []
    for constraint in conjunction:
        kinds = {kind for (kind, _), _ in constraint.terms}
        if kinds == {"Y"}:
            outputs.append(constraint)
        elif kinds == {"X"} and len(constraint.terms) == 1:
            bounds.append(constraint)
        else:
            what = "inputs with outputs" if len(kinds) > 1 else "inputs with one another"
            raise source.error(
                constraint.line, f"relates {what}; inputs can have bounds of their own alone"
            )
    return tuple(bounds), tuple(outputs)


def _tighten(bounds: Conjunction, lower: list[Bound | None], upper: list[Bound | None]) -> None:
    """Intersect with ``coefficient * X + constant >= 0``, for each of ``bounds``."""
    for constraint in bounds:
        ((_, index), coefficient) = constraint.terms[0]
        value = -constraint.constant / coefficient  # exact: a Fraction
        side, sign = (lower, 1) if coefficient > 0 else (upper, -1)
        known = side[index]
        if known is None or (sign * value, constraint.strict) > (sign * known.value, known.strict):
            side[index] = Bound(value, constraint.strict)


def _is_empty(lower: Sequence[Bound | None], upper: Sequence[Bound | None]) -> bool:
    for low, high in zip(lower, upper, strict=True):
        if low is None or high is None:
            continue
        if low.value > high.value or (low.value == high.value and (low.strict or high.strict)):
            return True
    return False
