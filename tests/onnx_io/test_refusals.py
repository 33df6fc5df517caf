"""What has no integer form is refused by name, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cactus_edge.cli import run
from cactus_edge.errors import DataError, MalformedModelError, UnsupportedModelError
from cactus_edge.onnx_io.reading import read
from cactus_edge.onnx_io.reference import difference
from cactus_edge.onnx_io.samples import Samples, load, real
from cactus_edge.onnx_io.translate import translate
from tests.onnx_io.models import Maker, RandomModel

RNG = np.random.default_rng(0)


def conv(maker: Maker, out: int = 3, channels: int = 2, **options: object) -> None:
    maker.add("Conv", maker.constant(RNG.normal(0, 1, (out, channels, 1, 1))), **options)


def ending(maker: Maker, features: int = 48) -> None:
    maker.add("Flatten")
    maker.add("Gemm", maker.constant(RNG.normal(0, 1, (features, 4))))


def single(*steps: Callable[[Maker], object], shape: tuple[object, ...] = ("n", 2, 4, 4)) -> Maker:
    """A convolution, some nodes, and a linear layer."""
    maker = Maker(shape)
    conv(maker)
    for step in steps:
        step(maker)
    return maker


REFUSED: dict[str, tuple[Callable[[Maker], object], str]] = {
    "sigmoid": (lambda m: m.add("Sigmoid"), r"'sigmoid1' \(Sigmoid\): the operator has no"),
    "clip": (
        lambda m: m.add("Clip", m.constant(-1.0), m.constant(1.0)),
        r"'clip1' \(Clip\): it clips to \[-1.0, 1.0\]",
    ),
    "product": (lambda m: m.add("Mul", m.at), r"'mul1' \(Mul\): input 'conv0_out' is computed"),
    "batch": (lambda m: m.add("Transpose", perm=(1, 0, 2, 3)), r"'transpose1'.*moves the batch"),
    "mixes": (lambda m: m.add("Reshape", m.constant([-1, 3], np.int64)), r"'reshape1'.*mixes"),
    "size": (lambda m: m.add("Reshape", m.constant([1, 7], np.int64)), r"'reshape1'.*become"),
    "pad": (
        lambda m: m.add("Pad", m.constant([0] * 8, np.int64), m.constant(1.0)),
        r"'pad1' \(Pad\).*only zeros",
    ),
    "channels": (
        lambda m: m.add("Pad", m.constant([0, 1, 0, 0] * 2, np.int64)),
        r"'pad1'.*only height and width",
    ),
    "ceil": (
        lambda m: m.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        r"'maxpool1'.*ceil_mode",
    ),
    "pixelwise": (
        lambda m: m.add("Add", m.constant(RNG.normal(0, 1, (3, 4, 4)))),
        r"'add1' \(Add\): its constant differs within a channel",
    ),
    "zero": (lambda m: m.add("Div", m.constant(0.0)), r"'div1' \(Div\): it divides by zero"),
    "transposed": (
        lambda m: (m.add("Transpose", perm=(0, 3, 2, 1)), m.add("MaxPool", kernel_shape=[2, 2])),
        r"'maxpool2'.*images are \[batch, channels, height, width\]",
    ),
    "softmax": (
        lambda m: (m.add("Flatten"), m.add("Softmax"), m.add("Relu")),
        r"'relu3' \(Relu\): it reads a Softmax",
    ),
    "axis": (lambda m: m.add("Softmax", axis=1), r"'softmax1'.*does not hold all classes"),
    "mean": (
        lambda m: m.add("ReduceMean", m.constant([1], np.int64)),
        r"'reducemean1' .*only the mean over height and width",
    ),
    "concat": (lambda m: m.add("Concat", m.at, axis=2), r"'concat1' \(Concat\): axis 2"),
    "output": (lambda m: m.add("Relu"), r"'relu1'.*logits are one vector"),
    "quantized": (
        lambda m: m.add("QuantizeLinear", m.constant(0.1), m.constant(0, np.uint8)),
        r"'quantizelinear1'.*quantized already",
    ),
    "random": (lambda m: m.add("RandomNormalLike"), r"'randomnormallike1'.*drawn anew"),
    "nan": (
        lambda m: m.add("Mul", m.constant(np.nan)),
        r"'mul1' \(Mul\): input 'c1' does not hold finite numbers",
    ),
    "stride": (
        lambda m: m.add("MaxPool", kernel_shape=[1, 1], strides=[0, 0]),
        r"'maxpool1'.*strides \(0, 0\)",
    ),
    "groups": (lambda m: conv(m, 3, 2, group=2), r"'conv1'.*in 2 groups on 3 channels"),
    "variance": (
        lambda m: m.add("BatchNormalization", *(m.constant([v] * 3) for v in (1, 0, 0, -1))),
        r"'batchnormalization1'.*positive variance",
    ),
    "bias": (
        lambda m: m.add("Conv", m.constant(np.ones((2, 3, 1, 1))), m.constant([1, 2, 3])),
        r"'conv1'.*a bias \[3\] for 2 outputs",
    ),
    "huge": (
        lambda m: m.add("MaxPool", kernel_shape=[1, 1], pads=[0, 0, 1 << 20, 1 << 20]),
        "'maxpool1_out' has .* elements",
    ),
    "matrix": (lambda m: m.add("MatMul", m.constant(np.ones((4, 4)))), r"'matmul1'.*matrix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nodes_without_a_form_are_named(name: str) -> None:
    step, message = REFUSED[name]
    opset = 18 if name == "mean" else 17
    maker = single(step)
    maker.opset = opset
    with pytest.raises(UnsupportedModelError, match=message):
        translate(read(maker.content()))


def test_files_that_are_none() -> None:
    with pytest.raises(MalformedModelError, match="not an ONNX"):
        read(b"not a model")
    content = RandomModel(1).content()
    for cut in range(0, len(content), max(len(content) // 40, 1)):
        with pytest.raises(UnsupportedModelError):
            translate(read(content[:cut]))


def test_inputs_and_outputs() -> None:
    open_shape = single(shape=("n", 2, "h", "w"))
    with pytest.raises(UnsupportedModelError, match="input 'x' has shape"):
        read(open_shape.content())
    with pytest.raises(UnsupportedModelError, match="input 'x' is INT64"):
        read(single().content(elements=onnx.TensorProto.INT64))
    two = single()
    with pytest.raises(UnsupportedModelError, match="1 inputs and 2 outputs"):
        read(two.content((two.at, "x")))
    custom = single()
    custom.nodes[0].domain = "com.example"
    model = onnx.load_model_from_string(custom.content())
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(UnsupportedModelError, match="'conv0' .*domain 'com.example'"):
        read(model.SerializeToString())
    external = onnx.load_model_from_string(single().content())
    external.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(UnsupportedModelError, match="tensor 'c0' lies in another file"):
        read(external.SerializeToString())


@pytest.mark.parametrize(
    "step",
    [
        lambda m: m.add("Identity"),
        lambda m: m.add("Cast", to=1),
        lambda m: m.add("Dropout"),
        lambda m: m.add("Pad", m.constant([0, 0, 0, 0, 0, 0, 0, 0], np.int64)),
        lambda m: m.add("Unsqueeze", m.constant([1], np.int64)),
        lambda m: (
            m.add("Pad", m.constant([0, 0, 1, 0, 0, 0, 0, 1], np.int64)),
            m.add("AveragePool", kernel_shape=[2, 2]),
        ),
        lambda m: (m.add("Relu"), m.add("Add", m.at), m.add("Add", m.at)),
        lambda m: (m.add("MaxPool", kernel_shape=[1, 1]), m.add("Relu")),
        lambda m: m.add("Sub", m.at, at=m.constant(RNG.normal(0, 1, (3, 1, 1)))),
    ],
)
def test_single_nodes(step: Callable[[Maker], object]) -> None:
    maker = single(step)
    ending(maker)
    maker.add("LogSoftmax", axis=1)
    file = read(maker.content())
    translation = translate(file)
    samples = Samples("random", RNG.integers(0, 256, (4, 4, 4, 2)).astype(np.uint8), "")
    assert difference(file, translation, real(samples, translation.shape)) < 1e-5
    assert any("LogSoftmax" in note for note in translation.notes)


def test_a_mean_over_pixels_and_a_fixed_batch() -> None:
    maker = single(shape=(3, 2, 4, 4))
    maker.opset = 18
    maker.add("ReduceMean", maker.constant([2, -1], np.int64), keepdims=0)
    maker.add("Reshape", maker.constant([3, -1], np.int64))
    maker.add("Gemm", maker.constant(RNG.normal(0, 1, (3, 4))))
    file = read(maker.content())
    translation = translate(file)
    samples = RNG.random((2, 2, 4, 4))
    assert difference(file, translation, samples) < 1e-5


def test_nodes_of_one_name_and_a_bias_as_a_row() -> None:
    """Names are not unique in ONNX, and tf2onnx writes biases [1, out]."""
    maker = single()
    for node in maker.nodes:
        node.name = "same"
    conv(maker, 3, 3)
    maker.nodes[-1].name = "same"
    maker.add("Flatten")
    weight, row = (
        maker.constant(RNG.normal(0, 1, (48, 4))),
        maker.constant(RNG.normal(0, 1, (1, 4))),
    )
    maker.add("Gemm", weight, row, beta=0.5)
    file = read(maker.content())
    translation = translate(file)
    assert len({stage.name for stage in translation.stages}) == len(translation.stages)
    assert difference(file, translation, RNG.random((2, 2, 4, 4))) < 1e-5


def test_samples_have_the_networks_shape(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (5, 4, 6, 2)).astype(np.uint8)
    samples = Samples("data", images, "")
    assert np.array_equal(real(samples, (2, 4, 6)), images.transpose(0, 3, 1, 2) / 255)
    flat = Samples("data", images.reshape(5, -1), "")
    assert np.array_equal(real(flat, (48,)), images.reshape(5, -1) / 255)
    assert real(flat, (1, 8, 6)).shape == (5, 1, 8, 6)
    for wrong, shape in ((samples, (48,)), (flat, (2, 4, 6)), (samples, (2, 6, 4))):
        with pytest.raises(DataError, match="calibration samples 'data' have shape"):
            real(wrong, shape)
    np.savez(tmp_path / "x.npz", x=images, other=1)
    np.savez(tmp_path / "none.npz", other=1)
    assert np.array_equal(load(str(tmp_path / "x.npz"), 3).images, images[:3])
    with pytest.raises(DataError, match=r"none.npz: missing x"):
        load(str(tmp_path / "none.npz"), 3)
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "absent.npz"), 3)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = RandomModel(4)
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(model.content())
    bad.write_bytes(single(lambda m: m.add("Sigmoid")).content())
    data, output = tmp_path / "data.npz", tmp_path / "out" / "model.tflite"
    np.savez(data, x=model.samples(8))
    call = ["convert", str(good), "-o", str(output)]
    assert run([*call]) == 2
    assert "--calibration" in capsys.readouterr().err
    for extra in (["--ranges", "best"], ["--sparsity", "0.5"], ["--bits", "5"], ["-n", "0"]):
        assert run([*call, "--calibration", str(data), *extra]) == 2, extra
        assert extra[0] in capsys.readouterr().err or extra[0] == "-n"
    assert run(["convert", str(bad), "-o", str(output), "--calibration", str(data)]) == 3
    message = capsys.readouterr().err
    assert message.startswith(f"error: {bad}: ")
    assert "'sigmoid1' (Sigmoid)" in message
    bad.write_bytes(b"no model")
    assert run(["convert", str(bad), "-o", str(output)]) == 3
    assert f"{bad}: not an ONNX file" in capsys.readouterr().err
    assert run(["convert", str(tmp_path), "-o", str(output), "--calibration", "digits"]) == 2
    assert not output.parent.exists()
    assert run([*call, "--calibration", str(data), "--ranges", "minmax", "--bits", "4"]) == 0
    assert output.stat().st_size > 0
    assert run([*call, "--calibration", str(data)]) == 2  # it exists
