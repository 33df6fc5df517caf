"""Certificate = device, shown: every installed runtime computes the integers of its profile."""

from cactus_edge.validate.child import Python
from cactus_edge.validate.compare import (
    Difference,
    PeerResult,
    Validation,
    prefix,
    validate_model,
)
from cactus_edge.validate.learning import Fit, Learned, learn
from cactus_edge.validate.runtimes import Peer, onnx_peer, peers

__all__ = [
    "Difference",
    "Fit",
    "Learned",
    "Peer",
    "PeerResult",
    "Python",
    "Validation",
    "onnx_peer",
    "learn",
    "peers",
    "prefix",
    "validate_model",
]
