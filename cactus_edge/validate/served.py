"""The program of the child process: a stock runtime that answers one request.

It imports nothing of this package, whose kernels would take longer to load than the runtime. See
``child`` for the records.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import TracebackType
from typing import IO, Any

import numpy as np

ARENA_BYTES = 32 << 20
_XNNPACK_QUANTIZED = 3  # TFLITE_XNNPACK_DELEGATE_FLAG_QS8 | FLAG_QU8


def serve(source: IO[bytes], target: IO[bytes]) -> None:
    """Answer one request."""
    head = json.loads(source.readline())
    models = [source.read(size) for size in head["models"]]
    module, mode = importlib.import_module(head["module"]), head["mode"]
    outputs: list[np.ndarray[Any, Any]] = []
    for model, shape, dtype in zip(models, head["shapes"], head["dtypes"], strict=True):
        batch = np.frombuffer(
            source.read(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype
        ).reshape(shape)
        call = _LOADERS.get(mode, _stock)(module, mode, model)
        outputs.append(np.stack([call(sample[None]) for sample in batch]))
    shapes, dtypes = zip(*((output.shape, output.dtype.name) for output in outputs), strict=True)
    answer = json.dumps({"shapes": shapes, "dtypes": dtypes}).encode() + b"\n"
    target.write(answer + b"".join(output.tobytes() for output in outputs))


def _onnx(module: Any, mode: str, model: bytes) -> Any:
    options = module.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Without it, int8 convolutions are computed in floats on x86.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = module.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name

    def call(sample: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return session.run(None, {source: sample})[0][0]

    return call


def _micro(module: Any, mode: str, model: bytes) -> Any:
    interpreter = module.Interpreter.from_bytes(model, arena_size=ARENA_BYTES)

    def call(sample: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        interpreter.set_input(sample, 0)
        interpreter.invoke()
        return interpreter.get_output(0)[0].copy()

    return call


def _stock(module: Any, mode: str, model: bytes) -> Any:
    options: dict[str, Any] = {}
    resolver = mode
    if mode == "XNNPACK":
        resolver = "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
        options["experimental_delegates"] = [_XnnpackDelegate()]
    interpreter = module.Interpreter(
        model_content=model,
        num_threads=1,
        experimental_op_resolver_type=getattr(module.OpResolverType, resolver),
        **options,
    )
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]

    def call(sample: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        interpreter.set_tensor(source, sample)
        interpreter.invoke()
        return interpreter.get_tensor(target)[0].copy()

    return call


_LOADERS: dict[str, Any] = {"micro": _micro, "onnx": _onnx}


class _XnnpackDelegate:
    """XNNPACK for int8 inside tflite-runtime, which does not use it by itself.

    The library exports the C functions; the Python interface offers no way to set the flags.
    """

    def __init__(self) -> None:
        import ctypes
        from pathlib import Path

        folder = Path(str(importlib.import_module("tflite_runtime").__file__)).parent
        library = ctypes.PyDLL(str(next(folder.glob("_pywrap*.so"))))

        class Options(ctypes.Structure):
            # The first two fields are all that is set; the rest is larger than any version's.
            _fields_ = [
                ("num_threads", ctypes.c_int32),
                ("flags", ctypes.c_uint32),
                ("rest", ctypes.c_uint8 * 256),
            ]

        create = library.TfLiteXNNPackDelegateCreate
        create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        options = Options(num_threads=1, flags=_XNNPACK_QUANTIZED)
        self._pointer = create(ctypes.byref(options))
        if not self._pointer:
            raise RuntimeError("the XNNPACK delegate could not be created")

    def _get_native_delegate_pointer(self) -> int:
        """What the interpreter asks for; the delegate lives as long as the process."""
        return self._pointer


class _QuietOutput:
    """Keeps a runtime's own messages out of the answer: C libraries print to descriptor 1."""

    def __enter__(self) -> IO[bytes]:
        self._answer = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        return self._answer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._answer.close()


if __name__ == "__main__":
    with _QuietOutput() as answer:
        serve(sys.stdin.buffer, answer)
