"""Moved scales: all profiles agree afterwards, and hardly any output moves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import cli, flatbuffer, universal
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Linear
from cactus_edge.profiles import PROFILES, uncovered
from cactus_edge.universalize import universalize
from tests.graphs import random_graph, random_inputs

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "RESHAPE", "PAD")


def plain(seed: int, **options: object) -> Graph:
    rng = np.random.default_rng(seed)
    return random_graph(rng, operators=LAYERS, classes=6, **options)  # type: ignore[arg-type]


def test_profiles_agree_afterwards_where_the_report_says_so() -> None:
    solved = moved = unsolved = 0
    for seed in range(24):
        graph = plain(seed, bits=(8,))
        result, layers = universalize(graph)
        assert universal.is_universal(result) is not any(layer.remaining for layer in layers)
        named = {layer.name for layer in layers}
        for old, new in zip(graph.operators, result.operators, strict=True):
            assert (old is new) or old.name in named
            if isinstance(old, Linear) and old.output != graph.logits:
                assert isinstance(new, Linear)
                bad = universal.disagreeing_channels(graph, old)
                kept = [i for i in range(old.channels) if i not in bad and old.weights.per_channel]
                np.testing.assert_array_equal(new.bias[kept], old.bias[kept])
        for layer in layers:
            op = next(op for op in result.core if op.name == layer.name)
            assert isinstance(op, Linear)
            above = graph.output_range(op)[0] >= result.tensors[op.output].zero_point
            moved += above * layer.moved
            unsolved += above * layer.remaining
        if not universal.is_universal(result):
            continue
        solved += 1
        inputs = random_inputs(np.random.default_rng(seed), graph, 30)
        names = [name for name in PROFILES if name not in uncovered(result)]
        outputs = [execute(result, inputs, name) for name in names]
        assert all(np.array_equal(outputs[0], other) for other in outputs)
        before = execute(graph, inputs)
        assert np.abs(outputs[0].astype(int) - before).mean() < 3
    # Where outputs do not go below their zero point, what is left are factors above a half, of
    # which these graphs have many.
    assert solved > 8 and moved > 100 and unsolved < moved / 4


def test_a_universal_model_stays_as_it_is() -> None:
    graph = plain(1, universal=True)
    result, layers = universalize(graph)
    assert layers == () and result.fingerprint() == graph.fingerprint()


def test_what_has_no_weights_is_named() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, operators=("CONV_2D", "ADD"), shape=(1, 4, 4, 3), classes=4)
        entries = {e.name for e in universal.agreement(graph) if e.disagreeing}
        adds = {op.name for op in graph.core if op.kind == "ADD"} & entries
        if adds:
            break
    _, layers = universalize(graph)
    assert {layer.name for layer in layers if layer.kind == "ADD" and layer.remaining} == adds


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
    result, content = flatbuffer.load(tmp_path / "u.tflite")
    assert universal.is_universal(result) and len(content) == report["bytes"]
    assert cli.run(call) == 2
    assert "--force" in capsys.readouterr().err
