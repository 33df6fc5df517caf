"""Arithmetic and logic of VNN-LIB assertions: exact linear constraints, and their normal form.

An assertion becomes linear constraints over input and output variables, joined by *and* and *or*;
``not`` is moved inwards. The normal form is a conjunction of what is always required and a choice
of one among many conjunctions. It can be exponentially larger than the file, so its size is limited
before it is made. Recursion is as deep as the lists of a file may be, see ``syntax.DEEPEST``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from cactus_edge.errors import DataError
from cactus_edge.vnnlib.syntax import Node, Source, number

MOST_DISJUNCTS = 1 << 14
_MOST_CONSTRAINTS = 1 << 21
_MOST_BITS = 4096
_COMPARISONS = ("<=", ">=", "<", ">", "=", "==", "!=")

Variable = tuple[str, int]
"""("X", flat index of an input element) or ("Y", index of an output)."""
Terms = dict[Variable, Fraction]


@dataclass(frozen=True, slots=True)
class Constraint:
    """``sum(coefficient * variable) + constant >= 0``, or ``> 0`` if strict."""

    terms: tuple[tuple[Variable, Fraction], ...]
    constant: Fraction
    strict: bool
    line: int

    @property
    def truth(self) -> bool | None:
        """What it says where it is about no variable; None otherwise."""
        if self.terms:
            return None
        return self.constant > 0 if self.strict else self.constant >= 0


@dataclass(frozen=True, slots=True)
class Joined:
    """All (``every``) or at least one of the parts; no part is true and false respectively."""

    every: bool
    parts: tuple[Constraint | Joined, ...]


Formula = Constraint | Joined
Conjunction = tuple[Constraint, ...]


@dataclass(frozen=True)
class Reader:
    """Reads expressions; ``variable`` finds the variable that a symbol names, or None."""

    source: Source
    variable: Callable[[Node], Variable | None]

    def formula(self, node: Node, negated: bool = False) -> Formula:
        """A Boolean expression.

        Raises:
            DataError: not one, or not linear.
        """
        head = node.head
        if node.children is not None and head in ("and", "or"):
            self._count(node, 1, None)
            parts = tuple(self.formula(child, negated) for child in node.arguments)
            return Joined((head == "and") != negated, parts)
        if node.children is not None and head == "not":
            self._count(node, 1, 1)
            return self.formula(node.arguments[0], not negated)
        if node.children is not None and head in _COMPARISONS:
            return self._comparison(node, negated)
        shown = head or node.text or "()"
        raise self.source.error(
            node.line, f"'{shown}' is no formula; use and, or, not, {', '.join(_COMPARISONS)}"
        )

    def _comparison(self, node: Node, negated: bool) -> Formula:
        unequal = node.head == "!="
        self._count(node, 2, 2 if unequal else None)
        sides = [self._linear(child) for child in node.arguments]
        parts: list[Formula] = []
        for left, right in pairwise(sides):
            if node.head in ("=", "==", "!="):
                alike = [(left, right), (right, left)]
                strict = unequal != negated
                found = [self._at_least(a, b, strict, node.line) for a, b in alike]
                parts.append(Joined(not strict, tuple(found)))
                continue
            greater, smaller = (right, left) if node.head[0] == "<" else (left, right)
            strict = len(node.head) == 1
            if negated:
                greater, smaller, strict = smaller, greater, not strict
            parts.append(self._at_least(greater, smaller, strict, node.line))
        return parts[0] if len(parts) == 1 else Joined(not negated, tuple(parts))

    def _at_least(
        self, a: tuple[Terms, Fraction], b: tuple[Terms, Fraction], strict: bool, line: int
    ) -> Constraint:
        terms = dict(a[0])
        for variable, coefficient in b[0].items():
            terms[variable] = terms.get(variable, Fraction(0)) - coefficient
        kept = tuple(sorted((v, c) for v, c in terms.items() if c))
        return Constraint(kept, a[1] - b[1], strict, line)

    def _linear(self, node: Node) -> tuple[Terms, Fraction]:
        """An arithmetic expression as coefficients and a constant."""
        if node.children is None:
            value = number(node, self.source)
            if value is not None:
                return {}, value
            variable = self.variable(node)
            if variable is None:
                raise self.source.error(node.line, f"'{node.text}' is not declared")
            return {variable: Fraction(1)}, Fraction(0)
        if node.head not in ("+", "-", "*", "/") or node.children[0].indices is not None:
            shown = node.head or "()"
            raise self.source.error(node.line, f"'{shown}' is no arithmetic; use + - * /")
        self._count(node, 2 if node.head == "/" else 1, 2 if node.head == "/" else None)
        parts = [self._linear(child) for child in node.arguments]
        if node.head in ("*", "/"):
            return self._product(node, parts)
        if node.head == "-" and len(parts) == 1:
            parts = [({}, Fraction(0)), *parts]
        sign = 1 if node.head == "+" else -1
        terms, constant = dict(parts[0][0]), parts[0][1]
        for other, value in parts[1:]:
            constant = self._limited(node, constant + sign * value)
            for variable, coefficient in other.items():
                total = terms.get(variable, Fraction(0)) + sign * coefficient
                terms[variable] = self._limited(node, total)
        return terms, constant

    def _product(self, node: Node, parts: list[tuple[Terms, Fraction]]) -> tuple[Terms, Fraction]:
        """Constants are multiplied first, so that long products of long sums stay cheap."""
        forms = [part for part in parts if part[0]]
        divided = node.head == "/" and bool(parts[1][0])
        if len(forms) > 1 or divided:
            raise self.source.error(node.line, "not linear: variables are multiplied or divide")
        factor = Fraction(1)
        for position, (terms, value) in enumerate(parts):
            if terms:
                continue
            if node.head == "/" and position == 1:
                if not value:
                    raise self.source.error(node.line, "division by 0")
                value = 1 / value  # exact: a Fraction
            factor = self._limited(node, factor * value)
        terms, constant = forms[0] if forms else ({}, Fraction(1))
        scaled = {v: self._limited(node, c * factor) for v, c in terms.items()}
        return scaled, self._limited(node, constant * factor)

    def _limited(self, node: Node, value: Fraction) -> Fraction:
        """``value``; refuses numbers that grow with the length and the nesting of a file."""
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
            raise self.source.error(node.line, f"a number of more than {_MOST_BITS} bits")
        return value

    def _count(self, node: Node, least: int, most: int | None) -> None:
        count = len(node.arguments)
        if count < least or (most is not None and count > most):
            raise self.source.error(node.line, f"'{node.head}' with {count} operands")


def normal_form(formula: Formula, source: Source) -> tuple[Conjunction, list[Conjunction]]:
    """What is required in any case, and the conjunctions of which one has to hold besides.

    Args:
        formula: as read.
        source: for messages.

    Returns:
        (common, choices). No choices: the formula is false. One empty choice: ``common`` is all.

    Raises:
        DataError: the normal form is too large.
    """
    if isinstance(formula, Constraint):
        truth = formula.truth
        if truth is None:
            return (formula,), [()]
        return (), [()] if truth else []
    if formula.every:
        common: list[Constraint] = []
        choices: list[Conjunction] = [()]
        for part in formula.parts:
            own, others = normal_form(part, source)
            common += own
            _check(source, len(choices) * len(others), choices, others)
            if others != [()]:
                choices = [a + b for a in choices for b in others]
        return tuple(common), choices
    found: list[Conjunction] = []
    total = 0
    for part in formula.parts:
        own, others = normal_form(part, source)
        total += sum(len(own) + len(other) for other in others)
        if len(found) + len(others) > MOST_DISJUNCTS or total > _MOST_CONSTRAINTS:
            raise _too_large(source)
        found += [own + other for other in others]
    return ((), found) if len(found) != 1 else (found[0], [()])


def _check(source: Source, count: int, a: Sequence[Conjunction], b: Sequence[Conjunction]) -> None:
    if count > MOST_DISJUNCTS:
        raise _too_large(source)
    total = len(b) * sum(len(c) for c in a) + len(a) * sum(len(c) for c in b)
    if total > _MOST_CONSTRAINTS:
        raise _too_large(source)


def _too_large(source: Source) -> DataError:
    return DataError(
        f"{source.file}: written as a disjunction of conjunctions the query has more than "
        f"{MOST_DISJUNCTS} disjuncts or {_MOST_CONSTRAINTS} constraints; split it into several"
    )
