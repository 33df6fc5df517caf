"""How shares are shown: in percent with two digits, rounded down."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal

_HUNDREDTH = Decimal("0.01")


def percent(fraction: float) -> str:  # float: reported
    """Such as ``93.77``: no share is shown that was not reached, ``100.00`` least of all."""
    hundredths = Decimal(repr(float(fraction))) * 100  # the shortest decimal: 0.29 is not 28.99 %
    return str(hundredths.quantize(_HUNDREDTH, ROUND_FLOOR))
