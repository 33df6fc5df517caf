"""Files of TensorFlow's converter: read, run as each runtime runs them, certified, generated."""

from __future__ import annotations

import numpy as np
import pytest

from cactus_edge import profiles
from cactus_edge.certify import Request
from cactus_edge.datasets import Dataset
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute, execute_all
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Softmax
from cactus_edge.inputs import Perturbation
from cactus_edge.operators import ToUnsigned
from cactus_edge.runtime import Session
from cactus_edge.validate import Peer, peers
from firmware_sim import run_host
from tests import stock
from tests.certificates import certified, checked, encoded

RUNTIMES = tuple(peer for peer in peers() if peer.extra == "runtimes")
REFUSED = {
    "dilated_free_batch": "operator SPACE_TO_BATCH_ND is not supported; a fixed batch of 1",
    "upsampled": "dynamic shape .-1, -1, 8, 4.; only the batch",
}
READ = tuple(name for name in stock.READ if name not in REFUSED)
MULTIPLIES = "gated"
"""Which generated C does not do with two activations."""
FAILS_ON_SHAPES = ("tflite XNNPACK",)
CERTIFIED = ("bottlenecks", "ds_cnn_uint8_edges", "gated", "gestures", "lenet", "sine")
SAMPLES = 4


@pytest.mark.parametrize("peer", RUNTIMES, ids=lambda peer: peer.name)
def test_every_layer_of_every_file_in_every_runtime(peer: Peer) -> None:
    if peer.absence:
        pytest.skip(peer.absence)
    parts: list[tuple[stock.Model, str, np.ndarray]] = []
    wanted: list[np.ndarray] = []
    for name in READ:
        model = stock.model(name)
        if peer.profile in profiles.uncovered(model.graph):
            continue
        if model.computes_shapes and peer.name in FAILS_ON_SHAPES:
            continue
        inputs = model.drawn(SAMPLES)
        values = execute_all(model.graph, inputs, peer.profile)
        for layer in model.layers:
            parts.append((model, layer, inputs))
            wanted.append(values[model.tensor(layer)])
    assert len({model.name for model, *_ in parts}) >= 4
    found = stock.Layers(peer).run(parts)
    for (model, layer, _), expected, output in zip(parts, wanted, found, strict=True):
        message = f"{model.name}, {layer}"
        np.testing.assert_array_equal(output.reshape(expected.shape), expected, message)


@pytest.mark.parametrize("name", READ)
def test_a_session_equals_the_executor(name: str) -> None:
    model = stock.model(name)
    inputs = model.drawn(9)
    wanted = execute(model.graph, inputs, "tflite-reference")
    found = Session(model.graph, "tflite-reference").run(inputs)
    assert len(np.unique(wanted)) > 5
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", READ)
def test_what_is_read_can_be_written(name: str) -> None:
    model = stock.model(name)
    again = read_tflite(write_tflite(model.graph))
    inputs = model.drawn(2)
    np.testing.assert_array_equal(execute(again, inputs), execute(model.graph, inputs))
    assert [op.kind for op in again.operators] == [op.kind for op in model.graph.operators]


@pytest.mark.parametrize("name", [name for name in READ if name != MULTIPLIES])
def test_generated_c_is_the_same(name: str) -> None:
    model = stock.model(name)
    inputs = model.drawn(3)
    found = run_host(model.graph, inputs, "tflite-reference").outputs
    wanted = execute(model.graph, inputs, "tflite-reference")
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_are_made_and_checked(name: str) -> None:
    model = stock.model(name)
    graph = model.graph
    shape, classes = graph.tensors[graph.core_input].shape, graph.tensors[graph.logits].size
    images = np.random.default_rng(0).random((4, *shape[1:]), dtype=np.float32)
    data = Dataset("made-up", images, np.zeros(4, np.int64), classes, "test", "5e" * 32)
    request = Request(data, Perturbation.levels(1))
    claim = certified(model.content, request)
    assert {sample.verdict for sample in claim.samples} <= {"certified", "refuted", "unknown"}
    assert checked(encoded(claim.head, claim.samples), model.content, data).problems == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_named(name: str) -> None:
    content = (stock.FOLDER / f"{name}.tflite").read_bytes()
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as caught:
        read_tflite(content, "file.tflite")
    assert str(caught.value).startswith("file.tflite: ")
    assert caught.value.exit_code == 3


def test_unsigned_edges_surround_the_same_core() -> None:
    """A file with uint8 input and output: SOFTMAX's result moved to uint8 decides alike."""
    graph = stock.model("ds_cnn_uint8_edges").graph
    softmax, last = graph.operators[-2:]
    assert isinstance(softmax, Softmax)
    assert isinstance(last, ToUnsigned)
    assert graph.logits == softmax.inputs[0]
    assert graph.has_softmax
