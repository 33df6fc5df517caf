"""Certified losses: one module and one line of ``LOSSES`` each.

``[objective] loss`` of a recipe is a name of this table; ``[objective] options`` are the keys of
that loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cactus_edge.train.losses import cc_ibp, convex, crown_ibp, ibp, mtl_ibp, qa_ibp, sabr
from cactus_edge.train.losses.base import SMALLEST_EPSILON, Case, CertifiedLoss, NoOptions

__all__ = ["LOSSES", "SMALLEST_EPSILON", "Case", "CertifiedLoss", "NoOptions"]

LOSSES: Mapping[str, CertifiedLoss] = MappingProxyType(
    {
        "ibp": CertifiedLoss(ibp.loss),
        "sabr": CertifiedLoss(sabr.loss, share=sabr.share),
        "crown-ibp": CertifiedLoss(crown_ibp.loss, crown_ibp.Options),
        "mtl-ibp": CertifiedLoss(mtl_ibp.loss, convex.Options),
        "cc-ibp": CertifiedLoss(cc_ibp.loss, convex.Options),
        "qa-ibp": CertifiedLoss(qa_ibp.loss, qa_ibp.Options),
    }
)
