"""A VNN-LIB 1.0 query: a box around a sample in which the label must have the greatest output."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

_DIGITS = 12


def robustness(
    lower: Sequence[Fraction], upper: Sequence[Fraction], label: int, classes: int, remark: str
) -> str:
    """The text of the query.

    Args:
        lower: of each input element; ``upper`` likewise. Ends are rounded outwards to 12 digits.
        upper: see ``lower``.
        label: the class that must win; a rival that reaches it is a counterexample.
        classes: how many outputs there are.
        remark: a comment, one line.
    """
    lines = [f"; {remark}", ""]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines.append(f"(assert (>= X_{i} {_decimal(low, up=False)}))")
        lines.append(f"(assert (<= X_{i} {_decimal(high, up=True)}))")
    rivals = [f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label]
    lines.append(f"(assert (or {' '.join(rivals)}))")
    return "\n".join(lines) + "\n"


def _decimal(value: Fraction, *, up: bool) -> str:
    scaled = value * 10**_DIGITS
    whole = scaled.__ceil__() if up else scaled.__floor__()
    sign, digits = "-" if whole < 0 else "", f"{abs(whole):0{_DIGITS + 1}d}"
    return f"{sign}{digits[:-_DIGITS]}.{digits[-_DIGITS:]}"
