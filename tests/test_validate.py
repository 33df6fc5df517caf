"""Validation finds what differs, says where, and survives runtimes that crash."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph, Linear
from cactus_edge.validate import Peer, Validation, peers, prefix, runtimes, validate_model
from tests.graphs import random_graph, random_inputs

ON_X86 = platform.machine() == "x86_64"


def own(*names: str) -> list[Peer]:
    return [peer for peer in peers() if peer.name in names]


def case(is_universal: bool, seed: int = 0) -> tuple[Graph, np.ndarray]:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, depth=4, shape=(1, 5, 5, 3), classes=4, universal=is_universal)
    return graph, random_inputs(rng, graph, 40)


@pytest.mark.parametrize("is_universal", [True, False])
def test_every_runtime_equals_its_profile(is_universal: bool) -> None:
    graph, inputs = case(is_universal, seed=3)
    result = validate_model(graph, inputs, layer_samples=8)
    installed = [peer for peer in result.peers if peer.status != "absent"]
    assert [p.name for p in installed if p.status != "equal"] == []
    assert all(p.mismatches == p.layer_mismatches == 0 for p in installed)
    assert all(p.elements == 160 for p in installed)
    assert result.universal is is_universal
    assert result.agrees
    if ON_X86 and len(installed) > 6:
        assert (result.outputs == 1) is is_universal
        assert (result.runtimes_differ == 0) is is_universal
    assert msgspec.json.decode(msgspec.json.encode(result), type=Validation) == result
    assert json.loads(msgspec.json.encode(result))["samples"] == 40


def test_absent_runtimes_are_named() -> None:
    graph, inputs = case(True)
    ghost = Peer("ghost", "no-such-package", "no_such_module", "runtimes", "AUTO", "tflite-x86")
    result = validate_model(graph, inputs, candidates=[*own("numba"), ghost])
    absent = result.peers[1]
    assert absent.status == "absent"
    assert "pip install 'cactus-edge[runtimes]'" in absent.message
    assert result.agrees
    assert not validate_model(graph, inputs, candidates=[ghost]).agrees


@pytest.mark.skipif(not ON_X86, reason="the profile of tflite-runtime's default on x86_64")
def test_a_wrong_profile_is_located() -> None:
    """The comparison can fail, and then names the first layer and element."""
    pytest.importorskip("tflite_runtime", reason="tflite-runtime is not installed")
    graph, inputs = case(False, seed=3)
    right = own("tflite default")
    wrong = [replace(right[0], profile="single-rounding")]
    assert validate_model(graph, inputs, candidates=right).agrees
    result = validate_model(graph, inputs, candidates=wrong)
    assert result.peers[0].status == "different"
    first = result.peers[0].first
    assert first is not None
    op = graph.core[first.layer]
    assert (op.name, op.kind) == (first.name, first.kind)
    expected = execute_all(graph, inputs, "single-rounding")[op.output]
    assert int(expected[(first.sample, *first.position)]) == first.expected != first.found


@pytest.mark.parametrize("marked", [2, 39], ids=["among the layer samples", "behind them"])
def test_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch, marked: int) -> None:
    graph, inputs = case(True, seed=5)
    index, op = next((i, o) for i, o in enumerate(graph.core) if isinstance(o, Linear))

    def broken(part: Graph, batch: np.ndarray, profile: str) -> np.ndarray:
        """One sample's output is off by one from ``op`` on."""
        output = execute(part, batch, profile).copy()
        if any(o is op for o in part.core):
            same = (batch == inputs[marked]).reshape(len(batch), -1).all(axis=1)
            output.reshape(len(output), -1)[same, 0] ^= 1
        return output

    monkeypatch.setitem(runtimes._OWN, "session", broken)
    result = validate_model(graph, inputs, candidates=own("numba", "reference"), layer_samples=3)
    assert not result.agrees
    bad = next(peer for peer in result.peers if peer.name == "numba")
    assert (bad.status, bad.mismatches) == ("different", 1)
    assert bad.first is not None
    assert (bad.first.layer, bad.first.name, bad.first.sample) == (index, op.name, marked)
    assert abs(bad.first.expected - bad.first.found) == 1


def test_a_crash_is_a_message() -> None:
    graph, inputs = case(True)
    crash = Peer("crash", "numpy", "tests.crashing", "runtimes", "AUTO", "tflite-x86")
    failing = replace(crash, name="failing", mode="FAIL")
    result = validate_model(graph, inputs, candidates=[crash, failing])
    assert [peer.status for peer in result.peers] == ["error", "error"]
    assert "signal 6" in result.peers[0].message
    assert "has no attribute 'FAIL'" in result.peers[1].message
    assert not result.agrees


def test_prefixes_end_behind_each_layer() -> None:
    graph, inputs = case(False, seed=2)
    values = execute_all(graph, inputs)
    for index, op in enumerate(graph.core):
        part = prefix(graph, index)
        assert np.array_equal(execute(part, inputs), values[op.output])
