"""Certificate = device, shown: every installed runtime computes the integers of its profile."""

from cactus_edge.validate.child import Python
from cactus_edge.validate.compare import (
    Difference,
    PeerResult,
    Validation,
    prefix,
    validate_model,
)
from cactus_edge.validate.console import Console, opened
from cactus_edge.validate.device import DeviceReport, validate_device
from cactus_edge.validate.learning import Fit, Learned, learn
from cactus_edge.validate.runtimes import Peer, onnx_peer, peers

__all__ = [
    "Console",
    "DeviceReport",
    "Difference",
    "Fit",
    "Learned",
    "Peer",
    "PeerResult",
    "Python",
    "Validation",
    "learn",
    "onnx_peer",
    "opened",
    "peers",
    "prefix",
    "validate_device",
    "validate_model",
]
