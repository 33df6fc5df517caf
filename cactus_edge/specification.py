"""Properties of the stored logits: an unsafe set of linear atoms with integer coefficients.

An *atom* is ``sum(c_k * q_k) >= d`` over stored logits ``q``; a *disjunct* is a conjunction of
atoms. A vector of logits is unsafe when more than ``allowed`` disjuncts hold for it: with
``allowed`` 0 the unsafe set is the disjunction of all; the k-th rival of a top-k property needs
``allowed = k - 1``, and no list of all sets of k rivals. So a property holds on a box of inputs as
soon as ``excluded_needed`` disjuncts are shown never to hold there, each on its own.

Behind SOFTMAX some logits are neither surely right nor surely wrong (see ``decision``). Then
``unsafe`` is what a certificate has to exclude and ``refuting``, a smaller set, is what breaks the
property for sure. Everywhere else the two are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cactus_edge import decision, scales
from cactus_edge.errors import DataError, UsageError
from cactus_edge.graph import Graph, Int64Array


@dataclass(frozen=True)
class Atom:
    """``sum(coefficient * logit) >= bound``.

    ``terms`` are (index of the logit, coefficient), indices ascending, no coefficient 0. No terms:
    ``0 >= bound``, which is true or false whatever the logits are.
    """

    terms: tuple[tuple[int, int], ...]
    bound: int

    def holds(self, logits: Sequence[int]) -> bool:
        """Whether stored logits satisfy it."""
        return sum(c * logits[k] for k, c in self.terms) >= self.bound

    def most(self, lower: Sequence[int], upper: Sequence[int]) -> int:
        """The greatest sum over a box of logits, exactly."""
        return sum(c * (upper[k] if c > 0 else lower[k]) for k, c in self.terms)

    def pair(self) -> tuple[int, int, int] | None:
        """``(label, rival, gap)`` where it denies ``q_label >= q_rival + gap``, or else None."""
        if len(self.terms) != 2 or {c for _, c in self.terms} != {1, -1}:
            return None
        (first, sign), (second, _) = self.terms
        label, rival = (second, first) if sign > 0 else (first, second)
        return label, rival, 1 - self.bound


Disjunct = tuple[Atom, ...]


@dataclass(frozen=True)
class Specification:
    """See the module's docstring; ``refuting`` is None where it is ``unsafe`` itself."""

    unsafe: tuple[Disjunct, ...]
    allowed: int = 0
    refuting: tuple[Disjunct, ...] | None = None

    def __post_init__(self) -> None:
        """Check the count.

        Raises:
            UsageError: a negative ``allowed``.
        """
        if self.allowed < 0:
            raise UsageError(f"{self.allowed} disjuncts cannot be allowed")

    @property
    def excluded_needed(self) -> int:
        """How many disjuncts have to be excluded for the property to hold; at least 0."""
        return max(len(self.unsafe) - self.allowed, 0)

    @property
    def breaking(self) -> tuple[Disjunct, ...]:
        """The disjuncts that refute, see ``refuting``."""
        return self.unsafe if self.refuting is None else self.refuting

    def violated(self, logits: Sequence[int] | Int64Array) -> bool:
        """Whether stored logits break the property for sure, exactly.

        Args:
            logits: integers [classes].
        """
        return self._count(self.breaking, logits) > self.allowed

    def satisfied(self, logits: Sequence[int] | Int64Array) -> bool:
        """Whether stored logits have the property for sure; behind SOFTMAX neither may be true."""
        return self._count(self.unsafe, logits) <= self.allowed

    @staticmethod
    def _count(disjuncts: tuple[Disjunct, ...], logits: Sequence[int] | Int64Array) -> int:
        values = [int(value) for value in logits]
        return sum(all(atom.holds(values) for atom in disjunct) for disjunct in disjuncts)

    def holds_on_bounds(
        self, lower: Sequence[int] | Int64Array, upper: Sequence[int] | Int64Array
    ) -> tuple[bool, ...]:
        """For each disjunct whether bounds of the logits exclude it: it holds nowhere between them.

        Args:
            lower: integers [classes], the least stored logits; ``upper`` likewise.
            upper: see ``lower``.

        Returns:
            One bool for each disjunct of ``unsafe``. A disjunct is excluded by any one of its
            atoms, whose greatest sum over the bounds is exact.
        """
        low, high = [int(v) for v in lower], [int(v) for v in upper]
        return tuple(
            any(atom.most(low, high) < atom.bound for atom in disjunct) for disjunct in self.unsafe
        )

    def check(self, classes: int) -> None:
        """Whether every atom is about logits that exist.

        Raises:
            DataError: an atom about a logit that the model does not have.
        """
        for disjunct in (*self.unsafe, *(self.refuting or ())):
            for atom in disjunct:
                for index, _ in atom.terms:
                    if not 0 <= index < classes:
                        raise DataError(
                            f"the property is about logit {index}, the model has {classes}"
                        )


def atom(
    coefficients: Mapping[int, Fraction | int], bound: Fraction | int, *, strict: bool
) -> Atom:
    """``sum(c_k q_k) >= bound``, or ``>`` if strict, for integers ``q``, with the least integers.

    Args:
        coefficients: rationals by index of the logit.
        bound: a rational.
        strict: whether equality is outside.

    Returns:
        An atom that holds for exactly the same integers: coefficients without a common divisor,
        the bound rounded up to the next sum that integers can have.
    """
    exact = {k: Fraction(c) for k, c in sorted(coefficients.items()) if c}
    if not exact:
        holds = bound < 0 if strict else bound <= 0
        return Atom((), 0 if holds else 1)
    unit = math.lcm(*(c.denominator for c in exact.values()))
    integers = {k: int(c * unit) for k, c in exact.items()}
    divisor = math.gcd(*integers.values())
    threshold = Fraction(bound) * unit / divisor  # exact: a Fraction
    least = threshold.__floor__() + 1 if strict else threshold.__ceil__()
    return Atom(tuple((k, c // divisor) for k, c in integers.items()), least)


def real_atom(
    graph: Graph, coefficients: Mapping[int, Fraction | int], bound: Fraction | int, *, strict: bool
) -> Atom:
    """``sum(c_k y_k) >= bound`` over the real outputs ``y = scale * (q - zero_point)``.

    Args:
        graph: gives scale and zero point of the logits.
        coefficients: rationals by index of the output.
        bound: a rational.
        strict: whether equality is outside.

    Raises:
        DataError: the logits have no scale, or SOFTMAX makes the outputs something else.
    """
    tensor = graph.tensors[graph.logits]
    if graph.has_softmax:
        raise DataError(
            "the model's outputs are probabilities behind SOFTMAX; state the property over stored "
            "logits instead"
        )
    if tensor.quantization is None:
        raise DataError(
            f"the logits '{tensor.name}' have no scale; state the property over stored logits"
        )
    scale = scales.decode_float32(tensor.quantization.scale_bits).fraction()
    scaled = {k: c * scale for k, c in coefficients.items()}
    offset = tensor.quantization.zero_point * sum(scaled.values(), Fraction(0))
    return atom(scaled, bound + offset, strict=strict)


def top(graph: Graph, label: int, count: int = 1) -> Specification:
    """The label is among the ``count`` greatest logits, the lowest index first among equals.

    A disjunct for each rival, ascending: "it precedes the label". ``decision.gaps`` says by how
    much the label has to lead, so that SOFTMAX is seen to.

    Args:
        graph: gives the number of logits and whether SOFTMAX follows.
        label: index of a logit.
        count: 1 for the usual property.

    Raises:
        DataError: the model has no such logit.
        UsageError: ``count`` below 1.
    """
    classes = graph.tensors[graph.logits].size
    if not 0 <= label < classes:
        raise DataError(f"label {label}, the model has {classes} logits")
    if count < 1:
        raise UsageError(f"the {count} greatest logits hold no label; give at least 1")
    gaps = decision.gaps(graph, label, classes, count)
    rivals = [rival for rival in range(classes) if rival != label]
    unsafe = tuple((_precedes(label, rival, 1 - int(gaps[rival])),) for rival in rivals)
    if not graph.has_softmax:
        return Specification(unsafe, count - 1)
    ahead = decision.lead(graph)
    refuting = [(_precedes(label, rival, 0),) for rival in rivals if rival < label]
    if count == 1:
        # That the rival is the greatest logit, as a sure gap asks, is no matter here: if it is not,
        # then the greatest leads by that gap as well.
        refuting += [(_precedes(label, rival, ahead),) for rival in rivals if rival > label]
    return Specification(unsafe, count - 1, tuple(refuting))


def _precedes(label: int, rival: int, least: int) -> Atom:
    """``q_rival - q_label >= least``."""
    return Atom(tuple(sorted(((label, -1), (rival, 1)))), least)
