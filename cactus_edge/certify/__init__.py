"""Certification of the deployed integers: twin, elided margins, attacks, certificates."""

from __future__ import annotations

from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier
from cactus_edge.certify.run import Request, Result, attack, certify
from cactus_edge.certify.shards import merge
from cactus_edge.certify.twin import Twin, twin

__all__ = [
    "Certifier",
    "Request",
    "Result",
    "Settings",
    "Twin",
    "attack",
    "certify",
    "merge",
    "twin",
]
