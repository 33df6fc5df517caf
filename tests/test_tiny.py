"""The whole flow on a two-layer network, in seconds: run it on every save."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cactus_edge import certificate_stream, check, flatbuffer, inputs, universal
from cactus_edge.analyze import analyze
from cactus_edge.certify import Request, Settings, certify
from cactus_edge.datasets import Dataset
from cactus_edge.execute import execute
from cactus_edge.graph import (
    Activation,
    FullyConnected,
    Graph,
    Quantization,
    Tensor,
    Weights,
)
from cactus_edge.inputs import Perturbation
from cactus_edge.profiles import PROFILES
from cactus_edge.runtime import Session
from firmware_sim import run_host

COUNT = 40


def network() -> Graph:
    """4 inputs, 6 hidden units with ReLU, 3 logits; scales that are not universal."""
    rng = np.random.default_rng(0)
    tensors = (
        Tensor("input", (1, 4), quantization=Quantization.of(1 / 255, -128)),
        Tensor("hidden", (1, 6), quantization=Quantization.of(0.021, -128)),
        Tensor("logits", (1, 3), quantization=Quantization.of(0.05, 0)),
    )
    first = FullyConnected(
        name="first",
        inputs=(0,),
        output=1,
        weights=Weights(
            rng.integers(-127, 128, (6, 4)), 8, np.full(6, 0.013, np.float32).view(np.uint32)
        ),
        bias=rng.integers(-4000, 4000, 6),
        activation=Activation.RELU,
    )
    second = FullyConnected(
        name="second",
        inputs=(1,),
        output=2,
        weights=Weights(
            rng.integers(-7, 8, (3, 6)), 4, np.array([0.11], np.float32).view(np.uint32)
        ),
        bias=rng.integers(-20, 20, 3),
    )
    return Graph(tensors, (first, second), 0, 2)


def test_the_whole_flow(tmp_path: Path) -> None:
    graph = network()
    path = tmp_path / "tiny.tflite"
    content = flatbuffer.save(graph, path)
    read, data = flatbuffer.load(path)
    assert data == content
    assert read.fingerprint() == graph.fingerprint()
    assert analyze(read, data).macs == 24 + 18

    rng = np.random.default_rng(1)
    images = rng.random((COUNT, 4), dtype=np.float32)
    stored = inputs.stored(read, images)
    distinct = set[bytes]()
    for profile in PROFILES:
        expected = execute(read, stored, profile)
        assert np.array_equal(Session(read, profile).run(stored), expected), profile
        distinct.add(expected.tobytes())
    assert len(distinct) > 1, "every profile computes the same: the comparison shows nothing"
    assert not universal.is_universal(read)
    expected = execute(read, stored)
    assert np.array_equal(run_host(read, stored).outputs, expected)

    labels = expected.argmax(axis=1)
    labels[0] = (labels[0] + 1) % 3
    dataset = Dataset("tiny", images, labels, 3, "test", "00" * 32)
    request = Request(
        dataset, Perturbation.levels(4), attack=Settings(steps=5), models=((path.name, data),)
    )
    written = tmp_path / "certificate.jsonl"
    head, summary = certify(request, written)
    assert head.arithmetic[0].rounding == "conjunction"
    assert summary.verdicts["certified"] > 0
    assert certificate_stream.load(written).samples[0].verdict == "refuted"
    with certificate_stream.reading(written) as claim:
        assert check.check(claim, [data], dataset).problems == ()
