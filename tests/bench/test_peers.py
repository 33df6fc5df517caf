"""Other runtimes compute the same integers from their own form of a graph."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from graphs import random_graph, random_inputs

from cactus_edge import flow, profiles
from cactus_edge.bench import peers
from cactus_edge.bench.peers import (
    PIECE,
    Model,
    ONNXPeer,
    Ours,
    Peer,
    TFLitePeer,
    TorchPeer,
    peer_named,
    usual_profile,
)
from cactus_edge.errors import MissingExtraError, ToolError, UsageError
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import (
    Activation,
    DType,
    FullyConnected,
    Graph,
    Pad,
    Quantization,
    Tensor,
    Weights,
)
from cactus_edge.kernels.simd.tiers import features
from cactus_edge.onnx_io import qdq

LITERT = TFLitePeer("litert-xnnpack", "ai-edge-litert", "ai_edge_litert.interpreter")
WINDOWS = ("CONV_2D", "MAX_POOL_2D", "PAD", "RESHAPE", "FULLY_CONNECTED")


def available(peer: Peer) -> Peer:
    pytest.importorskip(peer.package.replace("-", "_"), reason=f"{peer.package} is not installed")
    return peer


def outputs(peer: Peer, graph: Graph, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored logits, computed one by one and in pieces."""
    loaded = peer.load(Model(graph, write_tflite(graph)), 1)
    assert loaded.finish is not None
    images = [loaded.prepare(stored[i : i + 1]) for i in range(len(stored))]
    single = np.concatenate([loaded.finish(loaded.call(image)) for image in images])
    return single, loaded.finish(loaded.batch(loaded.prepare(stored)))


@cache
def universal_graph(seed: int, operators: tuple[str, ...], bits: tuple[int, ...] = (8, 4)) -> Graph:
    """A graph that has one result under every rounding."""
    rng = np.random.default_rng(seed)
    return random_graph(rng, operators=operators, depth=3, universal=True, bits=bits)


def has_form(graph: Graph) -> bool:
    try:
        flow.flow(graph, channels_first=True)
    except ToolError:
        return False
    return True


@pytest.mark.parametrize(
    "peer",
    [Ours(), LITERT, ONNXPeer(), TorchPeer("onednn")],
    ids=lambda peer: peer.name,
)
def test_peers_compute_what_a_universal_graph_says(peer: Peer) -> None:
    """Flattening, padding, strides, depth and clamps: a wrong one changes nearly every output."""
    available(peer)
    # oneDNN adds pairs of products of bytes with saturation where the CPU has no VNNI.
    saturates = isinstance(peer, TorchPeer) and not any("vnni" in name for name in features())
    bits = (4,) if saturates else (8, 4)
    tried = seed = 0
    while tried < 6:
        graph = universal_graph(seed, (*WINDOWS, "DEPTHWISE_CONV_2D"), bits)
        seed += 1
        if not has_form(graph):
            continue
        stored = random_inputs(np.random.default_rng(seed), graph, PIECE).astype(np.int8)
        expected = execute(graph, stored)
        try:
            single, batch = outputs(peer, graph, stored)
        except ToolError as error:
            assert isinstance(peer, TorchPeer), error
            assert "torch" in str(error)
            continue
        tried += 1
        np.testing.assert_array_equal(single, expected)
        np.testing.assert_array_equal(batch, expected)
    assert seed < 100


@pytest.mark.parametrize("peer", [ONNXPeer(), TorchPeer("onednn")], ids=lambda peer: peer.name)
@pytest.mark.parametrize("operator", ["ADD", "AVERAGE_POOL_2D"])
def test_operators_without_universal_rounding_differ_by_a_step(peer: Peer, operator: str) -> None:
    available(peer)
    tried = seed = 0
    while tried < 3:
        graph = random_graph(
            np.random.default_rng(seed),
            operators=(operator,),
            depth=1,
            shape=(1, 6, 6, 4),
            classes=None,
        )
        seed += 1
        stored = random_inputs(np.random.default_rng(seed), graph, PIECE).astype(np.int8)
        try:
            single, _ = outputs(peer, graph, stored)
        except ToolError as error:
            assert any(word in str(error) for word in ("pad", "clamp", "no form"))
            continue
        tried += operator in {op.kind for op in graph.core}
        difference = np.abs(single.astype(int) - execute(graph, stored))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.2
    assert seed < 100


def test_own_runtime_and_litert_take_real_images_where_the_model_does() -> None:
    available(LITERT)
    graph = random_graph(
        np.random.default_rng(1), shape=(1, 6, 6, 1), depth=2, bits=(8,), edges=("QUANTIZE",)
    )
    stored = random_inputs(np.random.default_rng(2), graph, PIECE).astype(np.int8)
    profile = usual_profile(graph)
    single, batch = outputs(LITERT, graph, stored)
    np.testing.assert_array_equal(single, execute(graph, stored, profile))
    np.testing.assert_array_equal(batch, single)


def test_a_model_that_ends_in_probabilities_is_timed_and_not_compared() -> None:
    available(LITERT)
    graph = random_graph(
        np.random.default_rng(1), shape=(1, 6, 6, 1), depth=2, bits=(8,), edges=("SOFTMAX",)
    )
    assert LITERT.load(Model(graph, write_tflite(graph)), 1).finish is None


# ---------------------------------------------------------------------- what has no form
def tiny(relu6: bool = False, scale: bool = True) -> Graph:
    quantization = Quantization.of(0.1, -20) if scale else None
    layer = FullyConnected(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(np.array([[3, -5]]), 8, np.array([0.02], np.float32).view(np.uint32)),
        bias=np.array([7]),
        activation=Activation.RELU6 if relu6 else Activation.NONE,
    )
    tensors = (
        Tensor("images", (1, 2), quantization=quantization),
        Tensor("logits", (1, 1), quantization=Quantization.of(0.05, -20)),
    )
    return Graph(tensors, (layer,), 0, 1)


def test_clamps_become_clips_in_onnx_and_are_refused_by_torch() -> None:
    graph = tiny(relu6=True)
    step = flow.flow(graph, channels_first=True).steps[0]
    assert isinstance(step, flow.Layer)
    assert step.limits == (108, 108 + 120)
    stored = np.array([[a, b] for a in (-128, 0, 127, 55) for b in range(-128, 128, 8)], np.int8)
    assert len(stored) == PIECE
    available(ONNXPeer())
    single, _ = outputs(ONNXPeer(), graph, stored)
    np.testing.assert_array_equal(single, execute(graph, stored, usual_profile(graph)))
    available(TorchPeer("onednn"))
    with pytest.raises(ToolError, match="no clamp to 108 to 228"):
        outputs(TorchPeer("onednn"), graph, stored)


def test_what_has_no_form_is_refused_by_name() -> None:
    with pytest.raises(ToolError, match="'images' has no scale"):
        flow.flow(tiny(scale=False), channels_first=True)
    graph = tiny()
    wide = (graph.tensors[0], replace(graph.tensors[1], dtype=DType.INT16))
    with pytest.raises(ToolError, match="int16 have no form"):
        flow.flow(replace(graph, tensors=wide), channels_first=True)
    pad = Pad(name="pad", inputs=(0,), output=2, paddings=((0, 0), (1, 0)))
    tensors = (*graph.tensors, Tensor("padded", (1, 3), quantization=Quantization.of(0.1, -20)))
    padded = replace(graph, tensors=tensors, operators=(pad, *graph.operators))
    with pytest.raises(ToolError, match="PAD 'pad' pads other axes"):
        flow.flow(padded, channels_first=True)


def test_flattened_features_keep_their_weights() -> None:
    """(h, w, c) to (c, h, w): the matrix and the pixels move together."""
    for graph in (universal_graph(seed, ("CONV_2D",)) for seed in range(30)):
        spatial = flow.flow(graph, channels_first=False).steps[-1]
        first = flow.flow(graph, channels_first=True).steps[-1]
        assert isinstance(spatial, flow.Layer)
        assert isinstance(first, flow.Layer)
        if first.flatten and first.source.shape[0] > 1:
            break
    assert not np.array_equal(spatial.weights, first.weights)
    channels, height, width = first.source.shape
    pixels = np.random.default_rng(0).integers(-9, 9, (height, width, channels))
    np.testing.assert_array_equal(
        spatial.weights.astype(int) @ pixels.ravel(),
        first.weights.astype(int) @ pixels.transpose(2, 0, 1).ravel(),
    )


# ---------------------------------------------------------------------- names and absence
def test_peers_have_names_of_their_own() -> None:
    names = [peer.name for peer in peers.all_peers()]
    assert len(set(names)) == len(names)
    assert {"litert-xnnpack", "litert-builtin", "tflite-runtime", "onnxruntime"} < set(names)
    assert peer_named("onnxruntime") == ONNXPeer()
    with pytest.raises(UsageError, match="no peer 'nobody'; known: litert-xnnpack"):
        peer_named("nobody")


def test_missing_peers_name_the_line_that_installs_them() -> None:
    missing = TFLitePeer("nowhere", "nowhere-runtime", "nowhere_runtime.interpreter")
    with pytest.raises(MissingExtraError, match=r"pip install 'cactus-edge\[runtimes\]'"):
        missing.load(Model(tiny(), b""), 1)
    with pytest.raises(MissingExtraError, match=r"cactus-edge\[onnx\]"):
        peers.import_peer("no_such_module", "onnxruntime", "onnxruntime", extra="onnx")


def test_a_file_that_is_no_model_is_refused() -> None:
    available(LITERT)
    with pytest.raises(ToolError, match="litert-xnnpack cannot load the model"):
        LITERT.load(Model(tiny(), b"no model"), 1)


def test_an_engine_that_torch_lacks_is_refused() -> None:
    available(TorchPeer("onednn"))
    with pytest.raises(ToolError, match="no engine 'abacus'"):
        TorchPeer("abacus").load(Model(tiny(), b""), 1)


def test_own_profile_is_litert_where_it_covers_the_graph() -> None:
    assert usual_profile(tiny()).startswith("litert-xnnpack-")
    assert usual_profile(tiny(scale=False)) == profiles.DEFAULT


def test_onnx_file_is_the_same_every_time() -> None:
    available(ONNXPeer())
    graph = tiny()
    assert qdq.convert(graph) == qdq.convert(graph)
