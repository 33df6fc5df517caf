"""What is exported: integers that ONNX Runtime repeats, floats that the integers came from."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import flatbuffer, flow, inputs, vnnlib
from cactus_edge.cli import run as cli
from cactus_edge.errors import DataError, ToolError, UnsupportedModelError
from cactus_edge.execute import execute
from cactus_edge.graph import Conv2D, DepthwiseConv2D, Graph
from cactus_edge.inputs import Perturbation
from cactus_edge.lowering.calibration import Calibration
from cactus_edge.lowering.stages import run
from cactus_edge.onnx_io import export, real_form
from cactus_edge.onnx_io.convert import Settings, import_onnx
from cactus_edge.onnx_io.reading import read
from cactus_edge.onnx_io.samples import Samples, real
from cactus_edge.onnx_io.translate import translate
from cactus_edge.universalize import universalize
from cactus_edge.validate.onnx_runtime import OnnxWorker
from cactus_edge.vnnlib.writing import robustness
from tests.graphs import random_graph
from tests.onnx_io.models import Maker, RandomModel

EXACT = ("CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "PAD", "RESHAPE", "FULLY_CONNECTED")


def exportable(seed: int, operators: tuple[str, ...]) -> Graph:
    """A universal graph that has a form in ONNX; the seed counts up until there is one."""
    while True:
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, operators=operators, depth=3, universal=True)
        try:
            flow.flow(graph, channels_first=True)
        except ToolError:
            seed += 1000
            continue
        return graph


@pytest.mark.parametrize("seed", range(6))
def test_signed_models_are_equal_as_onnx_runtime_is_set_up(seed: int) -> None:
    graph = exportable(seed, EXACT)
    rng = np.random.default_rng(seed)
    stored = rng.integers(-128, 128, (30, *graph.tensors[graph.core_input].shape[1:]))
    report = export.compare(graph, export.to_qdq(graph), stored)
    assert report.universal
    assert report.samples == 30 + 64
    assert report.elements == report.samples * graph.tensors[graph.logits].size
    assert set(report.differences.values()) == {0}
    assert (report.largest, report.decisions_differ) == (0, 0)


def nothing(graph: Graph) -> np.ndarray:
    return np.zeros((0, *graph.tensors[graph.core_input].shape[1:]), np.int64)


def test_ties_of_averages_are_counted() -> None:
    """ONNX Runtime rounds them to even, where we go away from zero: by one level."""
    found: list[export.ExportReport] = []
    for seed in range(6):
        graph = exportable(seed, ("AVERAGE_POOL_2D", "FULLY_CONNECTED"))
        found.append(export.compare(graph, export.to_qdq(graph), nothing(graph)))
    assert any(min(report.differences.values()) for report in found)
    assert max(report.largest for report in found) <= 8


def averaging(seed: int) -> Graph:
    """A sum behind a linear layer, then an average over 2x2, in universal form."""
    rng = np.random.default_rng(seed)
    maker = Maker(("n", 2, 6, 6))
    maker.add("Conv", maker.constant(rng.normal(0, 0.3, (4, 2, 3, 3))), pads=[1, 1, 1, 1])
    before = maker.add("Relu")
    maker.add("Conv", maker.constant(rng.normal(0, 0.3, (4, 4, 3, 3))), pads=[1, 1, 1, 1])
    maker.add("Add", before)
    maker.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    maker.add("Flatten")
    maker.add("Gemm", maker.constant(rng.normal(0, 0.3, (36, 5))))
    samples = Samples("random", rng.integers(0, 256, (32, 6, 6, 2), np.uint8), "")
    return import_onnx(maker.content(), samples, Settings())[0]


def test_averages_that_have_become_layers_are_equal() -> None:
    """With signed kernels, ties of averages over even windows are all that differs."""
    parts: list[tuple[Graph, np.ndarray]] = []
    for seed in range(3):
        graph = averaging(seed)
        moved, layers = universalize(graph, even_pools=True)
        assert [(layer.kind, layer.remaining) for layer in layers] == [("AVERAGE_POOL_2D", 0)]
        stored = np.random.default_rng(seed).integers(-128, 128, (100, 6, 6, 2))
        parts += [(graph, stored), (moved, stored)]
    wanted = [execute(graph, stored) for graph, stored in parts]
    pairs = zip(wanted, OnnxWorker().run(parts), strict=True)
    wrong = [int((a.ravel() != b.ravel()).sum()) for a, b in pairs]
    assert all(wrong[::2]) and not any(wrong[1::2]), wrong


def test_another_weight_is_counted() -> None:
    graph = exportable(1, EXACT)
    wrong = bytearray(export.to_qdq(graph))
    convolution = next(op for op in graph.core if isinstance(op, Conv2D))
    at = bytes(wrong).find(_channels_first(convolution).tobytes())
    assert at >= 0
    wrong[at] ^= 0x40
    report = export.compare(graph, bytes(wrong), nothing(graph))
    assert min(report.differences.values()) > 0
    assert report.largest > 0


def _channels_first(op: Conv2D) -> np.ndarray:
    """The weights as ONNX has them."""
    axes = (3, 0, 1, 2) if isinstance(op, DepthwiseConv2D) else (0, 3, 1, 2)
    return np.ascontiguousarray(op.weights.values.transpose(axes))


def test_the_float_form_is_the_network_that_was_imported() -> None:
    tried = 0
    for seed in range(100, 130):
        model = RandomModel(seed)
        samples = Samples("random", model.samples(48), "")
        file = read(model.content())
        translation = translate(file)
        chosen = Settings(calibration=Calibration("minmax"), universal=bool(seed % 2))
        graph, _ = import_onnx(model.content(), samples, chosen)
        try:
            content = export.to_real(graph)
        except UnsupportedModelError as error:
            assert "cannot be exported" in str(error)
            continue
        tried += 1
        values = real(samples, translation.shape)
        *_, (_, _, expected) = run(translation.stages, values)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        shape = session.get_inputs()[0].shape
        found = np.concatenate(
            [
                session.run(None, {real_form.INPUT: x.reshape(shape).astype(np.float32)})[0]
                for x in values
            ]
        ).reshape(expected.shape)
        pair = [x - x.mean(axis=1, keepdims=True) for x in (expected, found)]
        assert np.abs(pair[0] - pair[1]).max() < 0.1 * np.ptp(pair[0])
        if tried == 4:
            return
    raise AssertionError("nothing could be exported")


@given(st.integers(0, 255), st.integers(0, 100), st.integers(2, 12), st.data())
def test_queries_are_the_boxes_of_certificates(
    seed: int, thousandths: int, classes: int, data: st.DataObject
) -> None:
    """X of an image with one channel is in the order that the model stores."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, operators=("CONV_2D",), depth=1, shape=(1, 4, 4, 1))
    image = rng.integers(0, 256, (4, 4, 1)).astype(np.uint8)
    count = graph.tensors[graph.logits].size
    label = data.draw(st.integers(0, count - 1))
    perturbation = Perturbation.epsilon(Fraction(thousandths, 1000))
    text = export.query(graph, image, label, perturbation, "a test")
    query = vnnlib.parse(text.encode(), "test.vnnlib")
    lower, upper = inputs.box(graph, image[None], perturbation)
    (case,) = vnnlib.bind(query, graph)
    assert (case.lower <= lower).all() and (case.upper >= upper).all()
    assert np.abs(case.lower - lower).max() <= 1 and np.abs(case.upper - upper).max() <= 1
    assert len(case.specification.unsafe) == count - 1


def test_ends_are_rounded_outwards() -> None:
    third = Fraction(1, 3)
    text = robustness([-third, third], [third, Fraction(1)], 1, 2, "x")
    assert "(assert (>= X_0 -0.333333333334))" in text
    assert "(assert (<= X_0 0.333333333334))" in text
    assert "(assert (>= X_1 0.333333333333))" in text
    assert "(assert (<= X_1 1.000000000000))" in text
    assert "(assert (or (and (>= Y_0 Y_1))))" in text


def test_samples_and_labels_that_do_not_fit() -> None:
    graph = random_graph(np.random.default_rng(0), depth=1, shape=(1, 4, 4, 1))
    image, radius = np.zeros((4, 4, 1), np.uint8), Perturbation.epsilon("0.1")
    with pytest.raises(DataError, match="a sample of"):
        export.query(graph, image[:3], 0, radius, "")
    with pytest.raises(DataError, match="label 99"):
        export.query(graph, image, 99, radius, "")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    graph = random_graph(rng, operators=("CONV_2D",), depth=1, shape=(1, 8, 8, 1), universal=True)
    model, output = tmp_path / "model.tflite", tmp_path / "out" / "model.onnx"
    model.write_bytes(flatbuffer.write_tflite(graph))
    call = ["export-onnx", str(model), "-o", str(output)]
    for wrong in (["--eps", "0.1"], ["--float", "--eps", "0.1"], ["--float", "--data", "digits"]):
        assert cli([*call, *wrong]) == 2
    far = ["--float", "--data", "digits", "--eps", "0.1", "--index", "100000"]
    assert cli([*call, *far]) == 2
    refused = random_graph(rng, operators=("DEPTHWISE_CONV_2D",), depth=1, shape=(1, 1, 1, 3))
    (tmp_path / "bad.tflite").write_bytes(flatbuffer.write_tflite(refused))
    code = cli(["export-onnx", str(tmp_path / "bad.tflite"), "-o", str(output)])
    assert code == 3 and "cannot be exported" in capsys.readouterr().err
    assert not output.parent.exists()
    assert cli([*call, "--data", "digits", "-n", "5"]) == 0
    assert cli([*call]) == 2
    assert cli([*call, *far[:-1], "3", "--force"]) == 0
    assert output.with_suffix(".vnnlib").read_text().startswith("; digits, test sample 3")
