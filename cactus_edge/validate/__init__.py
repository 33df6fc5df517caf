"""Certificate = device, shown: every installed runtime computes the integers of its profile."""

from cactus_edge.validate.compare import (
    Difference,
    PeerResult,
    Validation,
    prefix,
    validate_model,
)
from cactus_edge.validate.runtimes import Peer, peers

__all__ = [
    "Difference",
    "Peer",
    "PeerResult",
    "Validation",
    "peers",
    "prefix",
    "validate_model",
]
