"""Converts and certifies on this machine: `python -m tests.evidence.remade FOLDER METHOD...`.

The folder holds ``model.onnx``, a float network, ``data.npz``, and ``trained.tflite``. Prints the
SHA-256 of each file that was made, as a JSON object; nothing is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cactus_edge import datasets, files, flatbuffer
from cactus_edge.certificate import Method
from cactus_edge.certify.run import Request, certify
from cactus_edge.inputs import Perturbation
from cactus_edge.onnx_io import convert, samples

BITS = (8, 4)
SAMPLES = 20
METHODS: dict[str, Method] = {"interval": "interval", "linear": "linear"}


def made(folder: Path, methods: Sequence[Method]) -> dict[str, str]:
    """SHA-256 of the models and of a certificate of each by each method."""
    source = files.read(folder / "model.onnx", "network")
    calibration = samples.load(str(folder / "data.npz"), convert.Settings.samples)
    data = datasets.load(folder / "data.npz", "test")
    models = {"trained": files.read(folder / "trained.tflite", "model")}
    for bits in BITS:
        graph, _ = convert.import_onnx(source, calibration, convert.Settings(bits))
        models[f"converted, int{bits}"] = flatbuffer.write_tflite(graph)
    found = {f"{name}: model": digest(content) for name, content in models.items()}
    for name, content in models.items():
        for method in methods:
            stream = io.BytesIO()
            request = Request(
                data=data,
                perturbation=Perturbation.levels(5),
                count=SAMPLES,
                models=(("model.tflite", content),),
                method=method,
                budget=3600,
            )
            certify(request, stream)
            found[f"{name}: certificate, {method}"] = digest(stream.getvalue())
    return found


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    print(json.dumps(made(Path(sys.argv[1]), [METHODS[name] for name in sys.argv[2:]])))
