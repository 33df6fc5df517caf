"""Imported networks: the floats of ONNX Runtime, integers on which every runtime agrees."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import datasets, flatbuffer, inputs, profiles, universal
from cactus_edge.constraints import validate
from cactus_edge.execute import execute
from cactus_edge.lowering.calibration import Calibration
from cactus_edge.onnx_io.convert import Settings, import_onnx
from cactus_edge.onnx_io.reading import read
from cactus_edge.onnx_io.reference import difference
from cactus_edge.onnx_io.samples import Samples, load, real
from cactus_edge.onnx_io.translate import OPERATORS, translate
from tests.onnx_io.models import RandomModel


@given(st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_the_stages_compute_what_onnx_runtime_computes(seed: int) -> None:
    model = RandomModel(seed)
    file = read(model.content())
    translation = translate(file)
    samples = Samples("random", model.samples(4), "")
    assert difference(file, translation, real(samples, translation.shape)) < 1e-5


def test_random_models_have_every_operator() -> None:
    found = {node.op_type for seed in range(150) for node in RandomModel(seed).nodes}
    own = {"Cast", "Dropout", "Identity", "LogSoftmax", "Pad", "ReduceMean", "Unsqueeze"}
    assert set(OPERATORS) - found == own  # these are in the tests of single nodes


@pytest.mark.parametrize("is_universal", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_integers_of_random_models(is_universal: bool, bits: int) -> None:
    """Conversion compares every layer with its floats; a file that is read back is the graph."""
    agreeing = 0
    for seed in range(40 * bits, 40 * bits + 4):
        model = RandomModel(seed)
        samples = Samples("random", model.samples(64), "")
        chosen = Settings(bits, Calibration("minmax"), universal=is_universal)
        graph, report = import_onnx(model.content(), samples, chosen)
        validate(graph)
        assert flatbuffer.read_tflite(flatbuffer.write_tflite(graph)).fingerprint() == (
            graph.fingerprint()
        )
        assert report.universal == universal.is_universal(graph)
        assert bits < 8 or report.same_decisions > 0.7
        stored = inputs.stored(graph, samples.images)
        covered = set(profiles.PROFILES) - set(profiles.uncovered(graph))
        outputs = {execute(graph, stored, name).tobytes() for name in covered}
        agreeing += len(outputs) == 1
        assert len(outputs) == 1 or not report.universal
    assert agreeing >= 3 if is_universal else agreeing < 4


def digits_network(kind: str) -> bytes:
    """A network of torch, trained for a second, as torch exports it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from tests.onnx_io import networks

    torch.manual_seed(0)
    network = networks.trained(kind)
    stream = io.BytesIO()
    torch.onnx.export(
        network, (torch.zeros(1, 1, 8, 8),), stream, input_names=["image"], dynamo=False,
        dynamic_axes={"image": {0: "n"}}, do_constant_folding=False,
    )  # fmt: skip
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_networks_of_torch_keep_their_accuracy(kind: str) -> None:
    content = digits_network(kind)
    test = datasets.load("digits", "test")
    samples = Samples("test", test.images, "")
    file = read(content)
    translation = translate(file)
    floats = translation_outputs(content, real(samples, translation.shape))
    accuracy = float((floats.argmax(axis=1) == test.labels).mean())
    assert accuracy > 0.9
    calibration = load("digits", 128)
    for chosen, loss in (
        (Settings(), 0.01),  # of 450 samples, on any CPU's training
        (Settings(calibration=Calibration("mse"), correct_bias=False), 0.01),
        (Settings(4, per_tensor=True, equalize=True), 0.05),
        (Settings(4), 0.03),
    )[:: 2 if kind == "plain" else 1]:
        graph, report = import_onnx(content, calibration, chosen)
        logits = execute(graph, inputs.stored(graph, test.images))
        deployed = float((logits.argmax(axis=1) == test.labels).mean())
        assert deployed > accuracy - loss, (chosen, deployed, accuracy)
        assert report.universal
        assert report.float_difference < 1e-5


def translation_outputs(content: bytes, values: np.ndarray) -> np.ndarray:
    from cactus_edge.onnx_io.reference import float_outputs

    return float_outputs(read(content), values)


def test_the_same_file_has_the_same_bytes(tmp_path: Path) -> None:
    from cactus_edge.onnx_io.convert import convert

    model = RandomModel(3)
    np.savez(tmp_path / "samples.npz", x=model.samples(16))
    (tmp_path / "model.onnx").write_bytes(model.content())
    reports = [
        convert(tmp_path / "model.onnx", tmp_path / name, str(tmp_path / "samples.npz"), Settings())
        for name in ("a.tflite", "b.tflite")
    ]
    assert reports[0] == reports[1]
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
