"""These tests need the extra ``onnx``."""

from __future__ import annotations

import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
    collect_ignore_glob = ["test_*.py"]
