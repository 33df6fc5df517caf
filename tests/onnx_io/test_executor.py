"""ONNX Runtime in ``validate``: equal under its profile at every layer, or not covered."""

from __future__ import annotations

import numpy as np
import pytest

from cactus_edge import flow, universal
from cactus_edge.errors import ToolError
from cactus_edge.graph import Graph
from cactus_edge.validate import onnx_peer, validate_model
from tests.graphs import random_graph

LINEAR = ("CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "PAD", "RESHAPE", "FULLY_CONNECTED")


def graphs(count: int, **options: object) -> list[Graph]:
    found: list[Graph] = []
    seed = 0
    while len(found) < count:
        seed += 1
        graph = random_graph(np.random.default_rng(seed), depth=4, **options)  # type: ignore[arg-type]
        try:
            flow.flow(graph, channels_first=True)
        except ToolError:
            continue
        found.append(graph)
    return found


def samples(graph: Graph) -> np.ndarray:
    shape = graph.tensors[graph.core_input].shape[1:]
    return np.random.default_rng(0).integers(-128, 128, (24, *shape))


@pytest.mark.parametrize("index", range(4))
def test_models_that_are_not_universal_are_equal_layer_by_layer(index: int) -> None:
    graph = graphs(index + 1, operators=LINEAR, bits=(8,))[index]
    result = validate_model(graph, samples(graph), candidates=[onnx_peer()])
    (peer,) = result.peers
    assert (peer.status, peer.message) == ("equal", "")
    assert peer.layer_elements > peer.elements > 0
    assert not universal.is_universal(graph)


def test_what_no_profile_describes_is_not_covered() -> None:
    for operator in ("ADD", "AVERAGE_POOL_2D"):
        graph = next(g for g in graphs(12, operators=(operator,)) if operator in kinds(g))
        (peer,) = validate_model(graph, samples(graph), candidates=[onnx_peer()]).peers
        assert peer.status == "uncovered" and operator in peer.message
    graph = graphs(1, operators=("CONV_2D",), bits=(4,))[0]
    (peer,) = validate_model(graph, samples(graph), candidates=[onnx_peer()]).peers
    assert peer.status == "uncovered" and "int4" in peer.message


def kinds(graph: Graph) -> set[str]:
    return {op.kind for op in graph.core}
