"""The keys of losses between an attack and interval bounds (De Palma et al. 2024)."""

from __future__ import annotations

from typing import Annotated

import msgspec


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where between the two.

    Attributes:
        alpha: 0 is adversarial training, 1 is IBP.
        attack_scale: radius of the attack relative to that of the bounds.
    """

    alpha: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.5
    attack_scale: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
