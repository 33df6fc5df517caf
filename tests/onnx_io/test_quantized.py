"""QDQ files keep their integers, and ONNX Runtime's are those of the profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from cactus_edge.cli import run as cli
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.flatbuffer import load
from cactus_edge.onnx_io import quantized
from cactus_edge.onnx_io.convert_quantized import import_quantized
from cactus_edge.onnx_io.reading import read
from tests.onnx_io.models import Maker

RNG = np.random.default_rng(5)


class Reader(CalibrationDataReader):
    """A few random images."""

    def __init__(self) -> None:
        self._images = iter(RNG.random((8, 1, 2, 6, 5)).astype(np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"x": image}


def stock(path: Path, *, per_channel: bool, average: bool = False) -> bytes:
    """A float network, quantized by ONNX Runtime's own tool."""
    maker = Maker((1, 2, 6, 5))
    normal = RNG.normal
    maker.add("Conv", maker.constant(normal(0, 0.3, (4, 2, 3, 3))), pads=[1, 1, 1, 1])
    maker.add("Relu")
    depthwise = maker.constant(normal(0, 0.4, (4, 1, 2, 3)))
    maker.add("Conv", depthwise, maker.constant(normal(0, 1, 4)), group=4, pads=[1, 0, 0, 2])
    pool = "AveragePool" if average else "MaxPool"
    maker.add(pool, kernel_shape=[2, 2], strides=[2, 1])
    maker.add("Flatten")
    maker.add("Gemm", maker.constant(normal(0, 0.3, (48, 6))), maker.constant(normal(0, 1, 6)))
    maker.add("Relu")
    maker.add("Gemm", maker.constant(normal(0, 0.5, (3, 6))), transB=1)
    (path / "float.onnx").write_bytes(maker.content())
    quantize_static(
        path / "float.onnx",
        path / "quantized.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return (path / "quantized.onnx").read_bytes()


@pytest.mark.parametrize("per_channel", [True, False])
def test_files_of_the_stock_tool_are_equal(per_channel: bool, tmp_path: Path) -> None:
    graph, report = import_quantized(stock(tmp_path, per_channel=per_channel))
    assert report.elements == 128 * 3
    assert not report.universal
    assert {op.kind for op in graph.core} >= {"CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D"}


def test_another_rounding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a weight that differs by one level."""
    content = stock(tmp_path, per_channel=True)
    translated = quantized.translate(read(content))
    model = onnx.load_model_from_string(content)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.int8 and values.ndim == 4:
            changed = (values ^ 32).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    module = "cactus_edge.onnx_io.convert_quantized.translate"
    monkeypatch.setattr(module, lambda file: translated)
    with pytest.raises(UnsupportedModelError, match="computes other integers"):
        import_quantized(model.SerializeToString())


def test_what_is_not_known_exactly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(AveragePool\): no profile describes"):
        import_quantized(stock(tmp_path, per_channel=False, average=True))
    content = stock(tmp_path, per_channel=True)

    def broken(change: str) -> bytes:
        model = onnx.load_model_from_string(content)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor).copy()
            if change == "zero" and values.dtype == np.int8 and values.ndim == 1:
                values += 1
            if change == "scale" and values.dtype == np.float32:
                values = -values
            if change == "bias" and values.dtype == np.float32 and values.max() < 1e-3:
                values *= 2
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        if change == "float":
            last = model.graph.node[-1]
            last.CopyFrom(helper.make_node("Sigmoid", last.input[:1], last.output, "end"))
        return model.SerializeToString()

    for change, message in (
        ("zero", "weights have a zero point"),
        ("scale", "or not positive"),
        ("bias", "its bias is not stored at"),
        ("float", "'end' .Sigmoid.: no profile"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            quantized.translate(read(broken(change)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock(tmp_path, per_channel=True)
    output = tmp_path / "model.tflite"
    assert cli(["convert", str(tmp_path / "float.onnx"), "-o", str(output)]) == 2
    assert "--calibration" in capsys.readouterr().err
    call = ["convert", str(tmp_path / "quantized.onnx"), "-o", str(output)]
    assert cli([*call, "--bits", "4"]) == 2
    assert "--bits is for float networks" in capsys.readouterr().err
    for scales in ("--plain", "--universal"):
        assert cli([*call, scales]) == 2
        assert f"{scales} is for float networks" in capsys.readouterr().err
    assert cli([*call, "--calibration", "digits"]) == 3
    assert "without --calibration" in capsys.readouterr().err
    assert not output.exists()
    assert cli(call) == 0
    graph, _ = load(output)
    assert graph.tensors[graph.logits].size == 3


def operators(path: Path, *, per_channel: bool, activation: QuantType) -> bytes:
    """The same network with QLinear operators, as the tool writes them on request."""
    stock(path, per_channel=per_channel)
    quantize_static(
        path / "float.onnx",
        path / "operators.onnx",
        Reader(),
        quant_format=QuantFormat.QOperator,
        per_channel=per_channel,
        activation_type=activation,
        weight_type=QuantType.QInt8,
    )
    return (path / "operators.onnx").read_bytes()


@pytest.mark.parametrize("per_channel", [True, False])
def test_qlinear_operators_are_equal(per_channel: bool, tmp_path: Path) -> None:
    content = operators(tmp_path, per_channel=per_channel, activation=QuantType.QUInt8)
    kinds = {node.op_type for node in onnx.load_model_from_string(content).graph.node}
    assert kinds >= {"QLinearConv", "QGemm"} and "Conv" not in kinds
    graph, report = import_quantized(content)
    assert report.elements == 128 * 3
    assert {op.kind for op in graph.core} >= {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}


def test_kernels_that_the_runtime_lacks_are_named(tmp_path: Path) -> None:
    content = operators(tmp_path, per_channel=False, activation=QuantType.QInt8)
    with pytest.raises(UnsupportedModelError, match="QGemm.*quantize activations as uint8"):
        import_quantized(content)


def small(factor: float, *, product: bool = False) -> bytes:
    """QuantizeLinear, then QLinearMatMul or QLinearAdd of x and x; ``factor`` of the scales."""
    maker = Maker((1, 6))
    zero = maker.constant(125, np.uint8) if product else maker.constant(-3, np.int8)
    scale, wide = maker.constant(0.03), maker.constant(0.03 * factor)
    at = maker.add("QuantizeLinear", scale, zero)
    if product:
        rows = maker.constant(RNG.integers(-127, 128, (6, 4)), np.int8)
        columns = [maker.constant(RNG.uniform(1e-3, 4e-3, 4)), maker.constant(np.zeros(4), np.int8)]
        maker.add("QLinearMatMul", scale, zero, rows, *columns, wide, zero)
    else:
        maker.add("QLinearAdd", scale, zero, at, scale, zero, wide, zero)
        maker.nodes[-1].domain = "com.microsoft"
    maker.add("DequantizeLinear", wide, zero)
    model = onnx.load_model_from_string(maker.content())
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model.SerializeToString()


def test_matrices_with_a_scale_for_each_column() -> None:
    graph, report = import_quantized(small(1.7, product=True))
    assert report.elements == 128 * 4 and graph.core[0].kind == "FULLY_CONNECTED"


@pytest.mark.parametrize("factor", [1.0, 5 / 3, 7 / 5])
def test_sums_without_halves_are_equal(factor: float) -> None:
    graph, report = import_quantized(small(factor))
    assert report.elements == 128 * 6 and graph.core[0].kind == "ADD"


def test_sums_that_come_near_a_half_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="of 65,536 sums come so close to a half"):
        import_quantized(small(4.0))


@pytest.mark.parametrize("wrong", ["no target", "no zero point", "two scales", "nothing"])
def test_operators_without_what_they_need_are_refused(wrong: str) -> None:
    """ONNX's checker does not know the operators of ONNX Runtime, and some inputs may be absent."""
    maker = Maker((1, 6))
    scale, zero = maker.constant(0.03), maker.constant(125, np.uint8)
    maker.add("QuantizeLinear", scale, zero)
    rows = maker.constant(RNG.integers(-127, 128, (6, 4)), np.int8)
    columns = maker.constant(np.full(4, 2e-3)), maker.constant(np.zeros(4), np.int8)
    bias = maker.constant(np.zeros(4), np.int32)
    source = maker.constant(np.full(3, 0.03)) if wrong == "two scales" else scale
    given = [source, zero, rows, *columns, bias, scale, zero]
    kept = {"no target": 6, "no zero point": 7, "two scales": 8, "nothing": 0}[wrong]
    maker.add("QGemm", *given[:kept])
    maker.nodes[-1].domain = "com.microsoft"
    model = onnx.load_model_from_string(maker.content())
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    message = r"\(QGemm\).*(must be constants|have one scale)"
    with pytest.raises(UnsupportedModelError, match=message):
        quantized.translate(read(model.SerializeToString()))
