"""What ONNX Runtime makes of the file in float32: the translation is compared with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cactus_edge.errors import MissingExtraError, ToolError
from cactus_edge.lowering.stages import FloatArray, run
from cactus_edge.onnx_io.building import Translation
from cactus_edge.onnx_io.reading import File

# Of the largest output: float32 sums of thousands of products, in another order.
TOLERANCE = 1e-3


def float_outputs(file: File, inputs: FloatArray) -> FloatArray:
    """The file's outputs, float64 [N, ...], for inputs [N, ...] of the file's own shape.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ToolError: it does not run the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", "importing ONNX files") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session: Any = onnxruntime.InferenceSession(
            file.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kind = session.get_inputs()[0].type
        values = inputs.astype(np.float64 if "double" in kind else np.float32)
        batch = max(file.batch, 1)
        outputs: list[Any] = []
        for sample in values:
            whole = np.repeat(sample[None], batch, axis=0)
            outputs.append(session.run([file.output], {file.input: whole})[0][:1])
    except Exception as error:  # onnxruntime's classes of errors have no public root
        raise ToolError(f"onnxruntime cannot run the file: {error}") from None
    return np.concatenate(outputs).astype(np.float64)


def difference(file: File, translation: Translation, samples: FloatArray) -> float:
    """The largest difference of outputs between the stages and ONNX Runtime, as a share.

    Args:
        file: the model.
        translation: its stages.
        samples: float64 [N, C, H, W] or [N, F], as the stages take them.

    Raises:
        ToolError: more than rounding of float32, so that the translation is wrong.
    """
    flat = samples.reshape(len(samples), -1)
    expected = float_outputs(file, flat[:, translation.order])
    expected = expected.reshape(len(samples), -1)
    *_, (_, _, found) = run(translation.stages, samples)
    found = found.reshape(len(samples), -1)
    for kind in translation.tail:
        found = found - found.max(axis=1, keepdims=True)
        found = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
        found = np.exp(found) if kind == "Softmax" else found
    worst = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if not worst <= TOLERANCE:
        raise ToolError(
            f"the translated network differs from ONNX Runtime by {worst:.2g} of its largest "
            "output; this is a defect of the import, please report it"
        )
    return worst
