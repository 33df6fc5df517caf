"""How a certificate writes down a proof that needed more than intervals.

A ``Proof`` excludes one rival in one group on one box: a tree of cases in preorder. ``Split``
divides the range of one stored value; each ``Leaf`` says how its case is closed.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag="split"):
    """First child: element ``element`` of tensor ``tensor`` is at most ``level``; second: above."""

    tensor: int
    element: int
    level: int


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag="leaf"):
    """How a case is closed.

    ``bounds``: intervals leave no input, or suffice. ``multipliers``: a linear bound with those
    that are packed here. ``points``: every input of the case was run. ``bits``: the target's scale.
    """

    method: Literal["bounds", "multipliers", "points"]
    multipliers: str = ""
    bits: int = 26


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Excludes ``rival`` (a logit, or a disjunct of a query) in group ``group`` on one box.

    ``box`` counts the boxes of a sample's set, such as the placements of a patch.
    """

    group: int
    rival: int
    nodes: tuple[Split | Leaf, ...]
    box: int = 0
