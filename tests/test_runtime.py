"""``Session``: what it accepts, what it returns, and how it behaves under threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from graphs import random_graph, random_inputs

from cactus_edge import profiles
from cactus_edge.errors import DataError, InvalidGraphError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import DType, Graph, Linear
from cactus_edge.runtime import Session


@pytest.fixture(scope="module")
def graph() -> Graph:
    """A few operators on images."""
    return random_graph(np.random.default_rng(11), shape=(1, 6, 5, 2), depth=4)


@pytest.fixture(scope="module")
def inputs(graph: Graph) -> np.ndarray:
    return random_inputs(np.random.default_rng(5), graph, 150)


# ---------------------------------------------------------------------- inputs
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("count", [1, 150])
def test_any_integer_type(graph: Graph, inputs: np.ndarray, dtype: type, count: int) -> None:
    x = inputs[:count]
    np.testing.assert_array_equal(Session(graph).run(x.astype(dtype)), execute(graph, x))


def test_lists_views_and_read_only_arrays(graph: Graph, inputs: np.ndarray) -> None:
    session, expected = Session(graph), execute(graph, inputs)
    np.testing.assert_array_equal(session.run(inputs[:3].tolist()), expected[:3])
    np.testing.assert_array_equal(session.run(inputs.astype(np.int8)[::-1]), expected[::-1])
    turned = np.asfortranarray(inputs.astype(np.int8))
    turned.flags.writeable = False
    np.testing.assert_array_equal(session.run(turned), expected)


def test_uint8_input_and_its_range() -> None:
    rng = np.random.default_rng(2)
    graph = random_graph(rng, shape=(1, 5, 5, 1), input_type=DType.UINT8)
    x = random_inputs(rng, graph, 9)
    session = Session(graph)
    np.testing.assert_array_equal(session.run(x.astype(np.uint8)), execute(graph, x))
    with pytest.raises(DataError, match="outside uint8"):
        session.run(x - 300)


@pytest.mark.parametrize("count", [1, 150])
def test_values_outside_the_type(graph: Graph, inputs: np.ndarray, count: int) -> None:
    x = inputs[:count].copy()
    x[-1, 0, 0, 0] = 128
    session = Session(graph)
    with pytest.raises(DataError, match="outside int8"):
        session.run(x)
    with pytest.raises(DataError, match="outside int8"):
        session.run(x.astype(np.uint8) | 0x80)
    np.testing.assert_array_equal(session.run(inputs[:2]), execute(graph, inputs[:2]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((2, 6, 5, 2)), "stored integers, got float64; quantize it first"),
        (np.zeros((0, 6, 5, 2)), "stored integers, got float64"),
        (np.zeros((6, 5, 2), np.int8), r"has shape \[6, 5, 2\], the model takes \[n, 6, 5, 2\]"),
        (np.zeros((1, 6, 5, 3), np.int8), r"has shape \[1, 6, 5, 3\]"),
        (np.int8(0), r"has shape \[\]"),
    ],
)
def test_wrong_batches(graph: Graph, batch: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Session(graph).run(batch)


# ---------------------------------------------------------------------- results
def test_empty_batch(graph: Graph) -> None:
    logits = Session(graph).run(np.zeros((0, 6, 5, 2), np.int8))
    assert logits.shape == (0, 3)
    assert logits.dtype == np.int8


def test_results_belong_to_the_caller(graph: Graph, inputs: np.ndarray) -> None:
    session = Session(graph, tensors=(0, graph.logits))
    for count in (1, 4):
        first = session.run_tensors(inputs[:count])
        kept = {tensor: values.copy() for tensor, values in first.items()}
        session.run_tensors(inputs[count : 2 * count])
        for tensor, values in first.items():
            np.testing.assert_array_equal(values, kept[tensor])
            values[...] = 0  # writable


def test_chosen_tensors_and_logits(graph: Graph, inputs: np.ndarray) -> None:
    hidden = graph.core[0].output
    session = Session(graph, tensors=[hidden])
    expected = execute_all(graph, inputs)
    values = session.run_tensors(inputs)
    assert list(values) == [hidden]
    np.testing.assert_array_equal(values[hidden], expected[hidden])
    np.testing.assert_array_equal(session.run(inputs), expected[graph.logits])
    assert list(Session(graph).run_tensors(inputs[:1])) == [graph.logits]


def test_edges_are_not_part_of_the_core() -> None:
    rng = np.random.default_rng(4)
    edges = ("QUANTIZE", "SOFTMAX", "DEQUANTIZE")
    graph = random_graph(rng, shape=(1, 4, 4, 1), edges=edges)
    x = random_inputs(rng, graph, 3)
    np.testing.assert_array_equal(Session(graph).run(x), execute(graph, x))
    with pytest.raises(UsageError, match=rf"tensor {graph.input} is no integer activation"):
        Session(graph, tensors=[graph.input])


@pytest.mark.parametrize("profile", sorted(profiles.PROFILES))
def test_profiles(graph: Graph, inputs: np.ndarray, profile: str) -> None:
    logits = Session(graph, profile).run(inputs)
    np.testing.assert_array_equal(logits, execute(graph, inputs, profile))


# ---------------------------------------------------------------------- threads
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_pieces(graph: Graph, threads: int) -> None:
    """More images than all threads take at once, and a rest."""
    x = random_inputs(np.random.default_rng(8), graph, 1333)
    logits = Session(graph, threads=threads).run(x)
    np.testing.assert_array_equal(logits, execute(graph, x))


def test_one_session_in_many_threads(graph: Graph, inputs: np.ndarray) -> None:
    session, expected = Session(graph), execute(graph, inputs)
    starts = list(range(0, 140, 7)) * 3
    with ThreadPoolExecutor(6) as executor:
        singles = executor.map(lambda i: session.run(inputs[i : i + 1]), starts)
        batches = executor.map(lambda i: session.run(inputs[i : i + 9]), starts)
        for start, single, batch in zip(starts, singles, batches, strict=True):
            np.testing.assert_array_equal(single, expected[start : start + 1])
            np.testing.assert_array_equal(batch, expected[start : start + 9])


# ---------------------------------------------------------------------- wrong calls
def test_wrong_options(graph: Graph) -> None:
    with pytest.raises(UsageError, match="no layout 'csr'; known: auto, dense, sparse"):
        Session(graph, layout="csr")
    with pytest.raises(UsageError, match="no rounding profile 'x'"):
        Session(graph, "x")
    with pytest.raises(UsageError, match="0 threads"):
        Session(graph, threads=0)
    with pytest.raises(UsageError, match="tensor 99 is no integer activation"):
        Session(graph, tensors=[99])


def test_invalid_graphs_are_refused(graph: Graph) -> None:
    """A resolved graph whose multiplier is 1, and one whose accumulators may reach 2**27."""
    resolved = profiles.resolve(graph)
    index = next(i for i, op in enumerate(resolved.operators) if isinstance(op, Linear))
    op = resolved.operators[index]
    assert isinstance(op, Linear) and op.requantization is not None
    broken = replace(op.requantization, multiplier=op.requantization.multiplier * 0 - 1)
    large = replace(op, bias=np.full(op.channels, (1 << 27) - 1, np.int32))
    for bad, message in ((replace(op, requantization=broken), "multiplier"), (large, "2\\^27")):
        operators = (*resolved.operators[:index], bad, *resolved.operators[index + 1 :])
        with pytest.raises(InvalidGraphError, match=message):
            Session(replace(resolved, operators=operators))
