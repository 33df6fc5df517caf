"""cactus_edge: train, convert, run and certify quantized networks, bit for bit as deployed.

The names below are the public interface; they are imported on first use, so that a device needs
neither torch nor Numba to read a model or to check a certificate. Functions that share the name of
their module are imported from it: ``cactus_edge.execute.execute``, ``cactus_edge.certify.certify``,
``cactus_edge.check.check``, ``cactus_edge.constraints.validate``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Activation": "graph",
    "Add": "graph",
    "AddRequantization": "graph",
    "AveragePool2D": "graph",
    "Conv2D": "graph",
    "DType": "graph",
    "Dequantize": "graph",
    "DepthwiseConv2D": "graph",
    "FullyConnected": "graph",
    "Graph": "graph",
    "MaxPool2D": "graph",
    "Pad": "graph",
    "Padding": "graph",
    "Quantization": "graph",
    "Quantize": "graph",
    "Requantization": "graph",
    "Reshape": "graph",
    "Softmax": "graph",
    "Tensor": "graph",
    "Weights": "graph",
    "AddRounding": "semantics",
    "Rounding": "semantics",
    "PROFILES": "profiles",
    "resolve": "profiles",
    "is_universal": "universal",
    "execute_all": "execute",
    "Session": "runtime",
    "read_tflite": "flatbuffer",
    "write_tflite": "flatbuffer",
    "Certifier": "certify",
    "Perturbation": "inputs",
    "Request": "certify",
    "attack": "certify",
    "twin": "certify",
    "lower": "train.lower",
    "benchmark": "bench",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cactus_edge' has no attribute '{name}'")
    module = importlib.import_module(f"cactus_edge.{_PUBLIC[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
