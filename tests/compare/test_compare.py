"""Layers beside their float network, and what sparing one of them brings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.cli import run
from cactus_edge.compare import LayerSignal, Signals, advice, signals
from cactus_edge.compare.costs import Costs, Variant, settings_of
from cactus_edge.errors import DataError
from cactus_edge.execute import execute_all
from cactus_edge.lowering.stages import Layer
from cactus_edge.lowering.stages import run as floats
from cactus_edge.train import Model, load_model
from cactus_edge.train.folding import stages
from cactus_edge.train.lower import Settings, lower

RUN = Path(__file__).resolve().parents[2] / "models" / "digits-0.05"
SAMPLES = 24


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(RUN)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bits, and so few weights that it costs much."""
    path = tmp_path_factory.mktemp("compare") / "sparse.tflite"
    arguments = ["convert", RUN, "--bits", 4, "--sparsity", 0.95, "-o", path]
    assert run([str(argument) for argument in arguments]) == 0
    return path


def images() -> np.ndarray:
    return datasets.load("digits", "validation").images[:SAMPLES]


def measured(model: Model, path: Path) -> Signals:
    graph, _ = flatbuffer.load(path)
    labels = datasets.load("digits", "validation").labels[:SAMPLES].astype(np.int64)
    real = (images() / 255).transpose(0, 3, 1, 2)
    network = stages(model.network.eval(), {})
    return signals(network, graph, inputs.stored(graph, images()), real, labels)


def test_signals_are_those_of_the_reference_executor(model: Model, sparse: Path) -> None:
    """Ratios of the layers with ReLU and of all weights, computed again without this code."""
    graph, _ = flatbuffer.load(sparse)
    found = {layer.name: layer for layer in measured(model, sparse).layers}
    values = execute_all(graph, inputs.stored(graph, images()))
    operators = {op.name: op for op in graph.core}
    real = (images() / 255).transpose(0, 3, 1, 2)
    checked = 0
    for stage, _, after in floats(stages(model.network.eval(), {}), real):
        if not isinstance(stage, Layer) or not stage.relu:
            continue
        op = operators[stage.name]
        tensor = graph.tensors[op.output]
        assert tensor.quantization is not None
        deployed = (values[op.output] - tensor.zero_point) * float(tensor.quantization.scale)
        if after.ndim == 4:
            deployed = deployed.transpose(0, 3, 1, 2)
        noise = np.square(after - deployed.reshape(after.shape)).sum()
        expected = 10 * np.log10(np.square(after).sum() / noise)
        assert found[stage.name].whole == pytest.approx(expected, abs=1e-9)
        checked += 1
    assert checked == 3
    for layer in found.values():
        assert layer.bits == 4 and layer.sparsity > 0.89
        # Pruning takes the smallest weights, so that most of their squares stay.
        assert layer.weights is not None and 3 < layer.weights < 20
        assert layer.own is not None and layer.whole is not None


def test_wider_models_keep_more(model: Model, sparse: Path) -> None:
    whole = measured(model, RUN / "model.tflite")
    less = measured(model, sparse)
    for more, fewer in zip(whole.layers, less.layers, strict=True):
        assert more.own is not None and fewer.own is not None and more.own >= fewer.own
        assert more.weights is not None and fewer.weights is not None
        assert more.weights > fewer.weights + 1
        # What was pruned in conv1 feeds channels that are never active, so its signal stays.
        assert more.own > fewer.own + 1 or more.name == "conv1"
    assert (whole.samples, less.samples) == (SAMPLES, SAMPLES)
    assert less.correct <= whole.correct and less.float_correct == whole.float_correct


def test_a_spared_layer_keeps_its_bits_and_weights(model: Model) -> None:
    training = datasets.load("digits", "train")
    settings = Settings(4, 0.9, wide=frozenset({"conv2"}), whole=frozenset({"fc2"}))
    made = lower(model, training, settings).graph
    found = {op.name: op for op in made.core if hasattr(op, "weights")}
    assert {name: op.weights.bits for name, op in found.items()} == {
        "conv1": 4,
        "conv2": 8,
        "fc1": 4,
        "fc2": 4,
    }
    zeros = {name: np.mean(op.weights.values == 0) for name, op in found.items()}
    assert zeros["fc2"] < 0.85 < min(zeros["conv1"], zeros["conv2"], zeros["fc1"])
    dense = next(op for op in lower(model, training, Settings(4)).graph.core if op.name == "fc2")
    rounded = np.mean(dense.weights.values == 0)  # pyright: ignore[reportAttributeAccessIssue]
    assert zeros["fc2"] == pytest.approx(rounded, abs=0.02)  # zeros are those of rounding alone
    again = settings_of(model, made)
    assert (again.wide, again.whole) == (settings.wide, settings.whole)
    assert (again.bits, again.sparsity) == (4, 0.9)
    with pytest.raises(DataError, match="does not say how it was converted"):
        settings_of(model, replace(made, metadata=()))


def test_the_verb(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(RUN), str(sparse), "-n", str(SAMPLES), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    costs, signal = shown["costs"], shown["signals"]
    assert costs["deployed"]["correct"] == signal["correct"]
    assert costs["deployed"]["bytes"] == sparse.stat().st_size
    assert [(v["layer"], v["change"]) for v in costs["variants"]] == [
        (layer, change)
        for layer in ("conv1", "conv2", "fc1", "fc2")
        for change in ("8 bits", "unpruned")
    ]
    # What a variant is said to be is what convert makes with the options of the advice.
    variant = costs["variants"][-1]
    spared = sparse.with_name("spared.tflite")
    arguments = ["convert", RUN, "--bits", 4, "--sparsity", 0.9, "--whole-layer", "fc2"]
    assert run([str(argument) for argument in [*arguments, "-o", spared]]) == 0
    assert spared.stat().st_size == variant["bytes"]
    assert variant["certified"] > costs["deployed"]["certified"]
    assert any("fc2 unpruned" in line and "--whole-layer fc2" in line for line in shown["advice"])
    capsys.readouterr()
    arguments = ["compare", str(RUN), str(spared), "-n", "5", "--no-costs"]
    assert run(arguments) == 0
    assert "signal, dB" in capsys.readouterr().out


def test_wrong_calls(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RUN.parent / "mnist-0.1"
    onnx = sparse.with_name("missing.onnx")
    convert = ["convert", RUN, "--bits", 4, "-o", sparse.with_name("x.tflite")]
    cases = [
        (["compare", RUN, sparse, "-n", 0], "at least one"),
        (["compare", RUN, sparse, "--split", "half"], "no split 'half'"),
        (["compare", onnx, sparse], "give --data"),
        (["compare", onnx, sparse, "--data", "digits", "--eps", "0.1"], "--eps is for runs"),
        (["compare", RUN, other / "model.tflite", "-n", 3], "the model takes"),
        ([*convert, "--wide-layer", "conv9"], "no layer 'conv9' to spare"),
    ]
    for arguments, message in cases:
        assert run([str(argument) for argument in arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not sparse.with_name("x.tflite").exists()


def test_advice_names_what_was_measured() -> None:
    layers = (
        LayerSignal("a", 4, 30.0, 31.0, 8, 0.1, 20.0, True, 29.0),
        LayerSignal("b", 4, 9.0, 12.0, 4, 0.5, 15.0),
    )
    found = Signals(100, 90, 80, 85, layers)
    deployed = Variant("", "", 80, 60, 1000, 500)
    variants = (
        Variant("a", "8 bits", 80, 60, 1100, 500),
        Variant("b", "8 bits", 84, 70, 1200, 500),
        Variant("b", "unpruned", 85, 75, 1000, 700),
        Variant("b", "other", problem="cannot be"),
    )
    costs = Costs("0.1", 100, deployed, deployed, variants)
    lines = advice(found, costs)
    assert lines[0].startswith(
        "b unpruned: +15 of 100 certified, +5 right, +0 bytes, +200 non-zero"
    )
    assert lines[1].startswith("b 8 bits: +10") and lines[1].endswith("convert --wide-layer b")
    assert lines[2].startswith("a: neither width nor pruning costs anything")
    assert "by 9.0 dB" in lines[3] and "--per-tensor" in lines[3]
    assert lines[4].startswith("b loses most of its own signal: 12.0 dB")
    assert advice(Signals(1, 1, 1, 1, ()), None) == []
