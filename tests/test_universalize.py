"""Models in universal form: all profiles and runtimes agree, and hardly any output moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import cli, flatbuffer, universal
from cactus_edge.constraints import validate
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.operators import Mean
from cactus_edge.profiles import PROFILES, uncovered
from cactus_edge.universalize import MovedLayer, universalize
from cactus_edge.validate import peers
from cactus_edge.validate.runtimes import runner
from tests import stock
from tests.graphs import random_graph, random_inputs

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "RESHAPE", "PAD")
STOCK = ("bottlenecks", "lenet", "resnet_8")


def plain(seed: int, **options: object) -> Graph:
    rng = np.random.default_rng(seed)
    return random_graph(rng, operators=LAYERS, classes=6, **options)  # type: ignore[arg-type]


def shift(graph: Graph, result: Graph) -> int:
    """By how much stored logits of ``result`` are larger, but for rounding: not at all."""
    return result.tensors[result.logits].zero_point - graph.tensors[graph.logits].zero_point


def agree(result: Graph, inputs: Int64Array) -> np.ndarray:
    """The outputs, which are the same under every profile."""
    names = [name for name in PROFILES if name not in uncovered(result)]
    outputs = [execute(result, inputs, name) for name in names]
    assert len(names) > 1
    assert all(np.array_equal(outputs[0], other) for other in outputs)
    return outputs[0].astype(int)


def test_profiles_agree_afterwards_where_the_report_says_so() -> None:
    solved = moved = unsolved = 0
    for seed in range(9):
        graph = plain(seed, bits=(8,))
        result, layers = universalize(graph)
        validate(read_tflite(write_tflite(result)))
        assert universal.is_universal(result) is not any(layer.remaining for layer in layers)
        named = {layer.name for layer in layers}
        new = {op.name: op for op in result.operators}
        for old in graph.operators:
            if isinstance(old, Linear) and old.name not in named:
                assert isinstance(new[old.name], Linear)
                kept = new[old.name].weights.values  # type: ignore[attr-defined]
                np.testing.assert_array_equal(kept, old.weights.values)
        moved += sum(layer.moved for layer in layers)
        unsolved += sum(layer.remaining for layer in layers)
        if not universal.is_universal(result):
            continue
        solved += 1
        inputs = random_inputs(np.random.default_rng(seed), graph, 30)
        found, before = agree(result, inputs), execute(graph, inputs)
        assert np.abs(found - before).mean() < 3
    # What is left are factors near 1.
    assert solved > 4 and moved > 50 and unsolved < moved / 4, (solved, moved, unsolved)


def test_a_universal_model_stays_as_it_is() -> None:
    graph = plain(1, universal=True)
    result, layers = universalize(graph)
    assert layers == () and result.fingerprint() == graph.fingerprint()


def test_files_of_others_give_one_output_in_every_runtime() -> None:
    """Layers without ReLU, sums of two scales, MEAN; only tables of two scales are left."""
    parts: list[tuple[Graph, Int64Array]] = []
    for name in STOCK:
        model = stock.model(name)
        result, layers = universalize(model.graph)
        assert universal.is_universal(result), [layer for layer in layers if layer.remaining]
        inputs = model.drawn(8)
        expected, before = execute(result, inputs), execute(model.graph, inputs)
        assert np.abs(expected.astype(int) - before).mean() < 1
        parts.append((result, inputs))
    wanted = [execute(graph, inputs[:2]) for graph, inputs in parts]
    for peer in peers():
        if peer.extra != "runtimes" or peer.absence:
            continue
        found = runner(peer)([(graph, inputs[:2]) for graph, inputs in parts])
        for name, expected, output in zip(STOCK, wanted, found, strict=True):
            message = f"{name} in {peer.name}"
            np.testing.assert_array_equal(output.reshape(expected.shape), expected, message)


def test_what_has_no_form_is_named() -> None:
    _, layers = universalize(stock.model("gated").graph)
    assert {layer.kind for layer in layers if layer.remaining} == {"MUL", "LEAKY_RELU"}


class Built:
    """A graph that a test puts together; weights are drawn, outputs have zero point 3."""

    def __init__(self, *shape: int) -> None:
        self.rng = np.random.default_rng(0)
        self.tensors = [Tensor("input", shape, quantization=Quantization.of(0.0207, -7))]
        self.operators: list[Operator] = []

    def _head(self, name: str, *inputs: int) -> dict[str, object]:
        return {"name": name, "inputs": inputs, "output": len(self.tensors)}

    def _append(self, op: Operator, shape: tuple[int, ...], quantization: Quantization) -> int:
        self.tensors.append(Tensor(op.name, shape, quantization=quantization))
        self.operators.append(op)
        return op.output

    def layer(self, source: int, channels: int, scale: float = 0.03, bits: int = 8) -> int:
        """3x3 SAME without ReLU, or a matrix."""
        shape = self.tensors[source].shape
        spatial = len(shape) == 4
        rows = (channels, 3, 3, shape[3]) if spatial else (channels, shape[1])
        most = 2 ** (bits - 1) - 1
        values = self.rng.integers(-most, most + 1, rows)
        per_channel = spatial or bits > 4
        # Outputs spread over most of the range.
        levels = 1.2 / (most * np.sqrt(values[0].size)) * self.scale(source, scale)
        real = self.rng.uniform(1, 2, channels if per_channel else 1) * levels
        weights = Weights(values, bits, real.astype(np.float32).view(np.uint32))
        bias = self.rng.integers(-500, 500, channels).astype(np.int32)
        head = {**self._head(f"layer{len(self.tensors)}", source), "weights": weights, "bias": bias}
        op: Linear = FullyConnected(**head)  # type: ignore[arg-type]
        if spatial:
            op = Conv2D(**head, padding=Padding.SAME)  # type: ignore[arg-type]
        return self._append(op, (*shape[:-1], channels), Quantization.of(scale, 3))

    def scale(self, source: int, scale: float) -> float:
        quantization = self.tensors[source].quantization
        assert quantization is not None
        return scale / float(quantization.scale)

    def sum(self, a: int, b: int, scale: float, activation: Activation = Activation.NONE) -> int:
        head = self._head(f"sum{len(self.tensors)}", a, b)
        zero = -128 if activation is Activation.RELU else 11
        op = Add(**head, activation=activation)  # type: ignore[arg-type]
        return self._append(op, self.tensors[a].shape, Quantization.of(scale, zero))

    def reshape(self, source: int, *shape: int) -> int:
        quantization = self.tensors[source].quantization
        assert quantization is not None
        op = Reshape(**self._head(f"reshape{len(self.tensors)}", source))  # type: ignore[arg-type]
        return self._append(op, shape, quantization)

    def pool(self, source: int) -> int:
        _, height, width, channels = self.tensors[source].shape
        head = self._head(f"pool{len(self.tensors)}", source)
        op = AveragePool2D(**head, window=(2, 2), stride=(2, 2))  # type: ignore[arg-type]
        quantization = self.tensors[source].quantization
        assert quantization is not None
        return self._append(op, (1, height // 2, width // 2, channels), quantization)

    def graph(self) -> Graph:
        built = Graph(tuple(self.tensors), tuple(self.operators), 0, len(self.tensors) - 1)
        validate(built)
        return built


def rewritten(built: Built, most: float, **options: bool) -> tuple[Graph, tuple[MovedLayer, ...]]:
    """Universal, and on average less than ``most`` levels away."""
    graph = built.graph()
    assert not universal.is_universal(graph) or options
    result, layers = universalize(graph, **options)
    assert universal.is_universal(result), layers
    inputs = random_inputs(np.random.default_rng(1), graph, 200)
    found, before = agree(result, inputs), execute(graph, inputs).astype(int)
    assert len(np.unique(before)) > 50
    assert np.abs(found - before).mean() < most
    return read_tflite(write_tflite(result)), layers


def test_a_hidden_layer_without_relu_before_padding_is_copied_to_its_zero_point() -> None:
    built = Built(1, 5, 5, 3)
    built.layer(built.layer(0, 4), 3)
    result, layers = rewritten(built, 1)
    assert [op.kind for op in result.operators] == ["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D"]
    assert [layer.remaining for layer in layers] == [0, 0]


def test_without_padding_the_next_bias_takes_the_offset_away() -> None:
    built = Built(1, 12)
    built.layer(built.layer(0, 14), 9)
    result, _ = rewritten(built, 1)
    assert [op.kind for op in result.operators] == ["FULLY_CONNECTED", "FULLY_CONNECTED"]
    assert result.tensors[result.operators[0].output].zero_point == -128


def test_logits_are_read_through_a_reshape() -> None:
    built = Built(1, 3, 3, 2)
    built.reshape(built.layer(0, 3), 1, 27)
    result, _ = rewritten(built, 1)
    assert [op.kind for op in result.operators] == ["CONV_2D", "RESHAPE"]
    assert result.tensors[result.output].zero_point == -128


@pytest.mark.parametrize("activation", [Activation.NONE, Activation.RELU])
@pytest.mark.parametrize("shape", [(1, 4, 4, 5), (1, 10)])
def test_sums_of_two_scales(shape: tuple[int, ...], activation: Activation) -> None:
    built = Built(*shape)
    a, b = (built.layer(0, shape[-1], scale) for scale in (0.0207, 0.0525))
    built.layer(built.sum(a, b, 0.0908, activation), 6)
    result, layers = rewritten(built, 2)
    op = next(op for op in result.operators if isinstance(op, Add))
    one, two, total = (result.tensors[i].quantization for i in (*op.inputs, op.output))
    assert one and two and total and one.scale_bits == two.scale_bits
    assert sum(layer.added for layer in layers) == 2  # copies give both operands a zero point


def test_an_operand_whose_scale_is_settled_is_rescaled() -> None:
    built = Built(1, 4, 4, 3)
    built.layer(built.sum(0, built.layer(0, 3, 0.0525), 0.0908), 4)
    result, layers = rewritten(built, 2)
    entry = next(layer for layer in layers if layer.kind == "ADD")
    assert entry.added == 3 and not entry.remaining
    assert result.tensors[0] == built.tensors[0]


def test_sums_of_sums() -> None:
    built = Built(1, 4, 4, 3)
    first = built.sum(built.layer(0, 3, 0.0207), built.layer(0, 3, 0.0525), 0.0908, Activation.RELU)
    second = built.sum(first, built.layer(first, 3, 0.1117), 0.1331)
    built.layer(second, 5)
    rewritten(built, 3)


def test_a_sum_stays_whose_coarser_scale_a_reader_does_not_bear() -> None:
    """The factor of a layer that reads an operand would become 2.3."""
    built = Built(1, 12)
    a, b = (built.layer(0, 9, scale) for scale in (0.0207, 0.0525))
    built.layer(a, 9, 0.0207)
    reader = built.operators.pop()
    assert isinstance(reader, FullyConnected)
    nearly_one = np.full(9, 0.9, np.float32).view(np.uint32)
    built.operators.append(replace(reader, weights=Weights(np.eye(9, dtype=int), 8, nearly_one)))
    built.layer(built.sum(built.sum(a, b, 0.0908), reader.output, 0.1331), 6)
    result, layers = universalize(built.graph())
    first = next(op.name for op in built.operators if isinstance(op, Add))
    assert [layer.remaining for layer in layers if layer.name == first] == [1]
    again = next(op for op in result.operators if op.name == first)
    for index, scale in zip(again.inputs, (0.0207, 0.0525), strict=True):
        kept = result.tensors[index].quantization
        assert kept and kept.scale == np.float32(scale)


@pytest.mark.parametrize("scale", [0.03, 0.0605])
def test_a_mean_of_a_sum_whose_scale_becomes_coarser(scale: float) -> None:
    """Its factor is a sixty-fourth of the ratio of scales, which is above 1 here."""
    built = Built(1, 8, 8, 3)
    total = built.sum(*(built.layer(0, 8, operand) for operand in (0.02, 0.05)), 0.06)
    ones = Weights(np.ones((1, 8, 8, 8), int), 8, np.ones(1, np.float32).view(np.uint32))
    head = {**built._head("mean", total), "weights": ones, "bias": np.zeros(8, np.int32)}
    mean = Mean(**head, padding=Padding.VALID)  # type: ignore[arg-type]
    built.layer(
        built.reshape(built._append(mean, (1, 1, 1, 8), Quantization.of(scale, 3)), 1, 8), 6
    )
    result, layers = universalize(built.graph())
    assert universal.is_universal(result), layers


@pytest.mark.parametrize("bits", [3, 4])
def test_narrow_weights(bits: int) -> None:
    built = Built(1, 3, 3, 3)
    flat = built.reshape(built.layer(0, 3, bits=bits), 1, 27)
    built.layer(flat, 20, 0.3, bits=bits)
    result, _ = rewritten(built, 12)
    assert {op.weights.bits for op in result.core if isinstance(op, Linear)} == {bits}


def test_averages_over_even_windows_become_layers_on_request() -> None:
    built = Built(1, 6, 6, 3)
    built.layer(built.pool(built.layer(0, 4)), 4)
    kept, _ = rewritten(built, 1)
    assert "AVERAGE_POOL_2D" in [op.kind for op in kept.operators]
    moved, layers = rewritten(built, 1, even_pools=True)
    assert "AVERAGE_POOL_2D" not in [op.kind for op in moved.operators]
    assert {layer.kind for layer in layers} == {"CONV_2D", "AVERAGE_POOL_2D"}


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = plain(3, bits=(8,), shape=(1, 5, 5, 3), depth=0)
    assert not universal.is_universal(graph)
    flatbuffer.save(graph, tmp_path / "plain.tflite")
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (60, 5, 5, 3), np.uint8), np.arange(60) % 6
    np.savez(tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    call = ["universalize", str(tmp_path / "plain.tflite"), "-o", str(tmp_path / "u.tflite")]
    assert cli.run([*call, "--data", str(tmp_path / "d.npz"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["universal"] and report["samples"] == 60 and report["layers"]
    # The model is one layer: alone it costs what the model costs.
    (layer,) = report["layers"]
    assert layer["samples_alone"] == 60
    assert layer["lost_alone"] == report["correct_before"] - report["correct_after"]
    assert layer["decisions_changed_alone"] == report["decisions_changed"]
    result, content = flatbuffer.load(tmp_path / "u.tflite")
    assert universal.is_universal(result) and len(content) == report["bytes"]
    assert cli.run(call) == 2
    assert "--force" in capsys.readouterr().err
    assert (
        cli.run(["universalize", str(tmp_path / "u.tflite"), "-o", str(tmp_path / "v.tflite")]) == 0
    )
    assert "nothing moved" in capsys.readouterr().out
    again, _ = flatbuffer.load(tmp_path / "v.tflite")
    assert again.fingerprint() == result.fingerprint()


def test_a_file_is_written_when_it_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same command starts again after Ctrl-C or with other data."""
    flatbuffer.save(plain(3, bits=(8,), shape=(1, 5, 5, 3), depth=0), tmp_path / "plain.tflite")
    output = tmp_path / "u.tflite"
    call = ["universalize", str(tmp_path / "plain.tflite"), "-o", str(output)]
    call += ["--data", "digits"]
    assert cli.run(call) == 2
    assert "Traceback" not in capsys.readouterr().err and not output.exists()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cactus_edge.universalize._decisions", stopped)
    assert cli.run(call) == 130
    assert "the same command starts again" in capsys.readouterr().err and not output.exists()
