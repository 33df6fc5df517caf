"""Sums that leave int64: exact where they are formed, and never a proof where they would wrap."""

from __future__ import annotations

import base64
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import exact, profiles
from cactus_edge.certify import Request
from cactus_edge.datasets import Dataset
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import Activation, FullyConnected, Graph, Int64Array, Tensor, Weights
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof
from tests.certificates import certified, checked, encoded
from tests.certify.constructed import ZERO, _Builder

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
PROFILE = "tflite-micro"
INPUTS, HIDDEN, RADIUS = 8, 6, 3


@given(st.lists(st.tuples(INT64, INT64), max_size=40))
def test_sums_and_products_are_those_of_python(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    assert exact.total(a) == sum(x for x, _ in pairs)
    assert exact.dot(a, b) == sum(x * y for x, y in pairs)
    assert exact.largest(a) == max((abs(x) for x, _ in pairs), default=0)


def wide_biases(seed: int) -> tuple[Graph, Int64Array]:
    """A model whose rival leads by far in accumulators, with both logits at the upper clamp.

    The label wins the tie at the centre and may fall below the clamp elsewhere. Biases are near
    2**27. One logit's weights are twice the other's with half the scale: the combination that is
    bounded is 0, and a proof would scale it, and the biases with it, by up to 2**26.
    """
    rng = np.random.default_rng(seed)
    builder = _Builder(INPUTS)
    weights = rng.integers(-3, 4, (HIDDEN, INPUTS))
    bias = rng.integers(-200, 600, HIDDEN)
    hidden = builder.dense(0, weights.tolist(), bias.tolist(), 1 / 8)
    last = rng.integers(-1, 2, HIDDEN)
    centre = rng.integers(60, 200, INPUTS)
    values = np.clip(np.rint((weights @ centre + bias) / 8), 0, 255)
    own = 1020 - int((2 * last) @ values) + int(rng.integers(0, 60))
    op = FullyConnected(
        name="last",
        inputs=(hidden,),
        output=2,
        weights=Weights(
            np.stack([2 * last, last]).astype(np.int8),
            8,
            np.array([0.25, 0.5], np.float32).view(np.uint32),
        ),
        bias=np.array([own, 3 << 25], np.int32),
        activation=Activation.NONE,
    )
    builder.tensors.append(Tensor("last", (1, 2), quantization=builder.tensors[0].quantization))
    builder.operators.append(op)
    return builder.graph(), centre + ZERO


@pytest.mark.parametrize("method", ["linear", "complete"])
@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_wide_biases_make_no_false_proof(seed: int, method: str) -> None:
    graph, centre = wide_biases(seed)
    model = write_tflite(graph)
    images = ((centre - ZERO) / 256).astype(np.float32)[None]
    data = Dataset("wide", images, np.array([0]), 2, "test", "c0" * 32)
    request = Request(
        data,
        Perturbation.levels(RADIUS),
        method=method,  # type: ignore[arg-type]
        profiles=(PROFILE,),
        budget=2,
    )
    claim = certified(model, request)
    assert checked(encoded(claim.head, claim.samples), model, data).agrees
    resolved = profiles.resolve(graph, PROFILE)
    moves = np.random.default_rng(seed).integers(-RADIUS, RADIUS + 1, (50_000, INPUTS))
    logits = execute(resolved, centre + moves).reshape(-1, 2)
    (sample,) = claim.samples
    if sample.verdict == "certified":
        assert (logits.argmax(axis=1) == 0).all()


@pytest.mark.parametrize("bits", [0, 10, 24, 25, 26])
def test_a_proof_that_would_wrap_is_rejected(bits: int) -> None:
    """One layer, of which a leaf takes nothing but the biases, scaled by 2**bits."""
    builder = _Builder(1)
    op = FullyConnected(
        name="last",
        inputs=(0,),
        output=1,
        weights=Weights(
            np.array([[2], [1]], np.int8), 8, np.array([0.25, 0.5], np.float32).view(np.uint32)
        ),
        bias=np.array([900, 3 << 25], np.int32),
        activation=Activation.NONE,
    )
    builder.tensors.append(Tensor("last", (1, 2), quantization=builder.tensors[0].quantization))
    builder.operators.append(op)
    graph = builder.graph()
    inputs = np.arange(40, 101)[:, None] + ZERO
    wrong = execute(profiles.resolve(graph, PROFILE), inputs).reshape(-1, 2).argmax(axis=1)
    assert wrong.any()
    model = write_tflite(graph)
    data = Dataset("one", np.array([[70 / 256]], np.float32), np.array([0]), 2, "test", "c0" * 32)
    request = Request(data, Perturbation.levels(30), profiles=(PROFILE,), method="linear")
    claim = certified(model, request)
    packed = base64.b64encode(zlib.compress(b"")).decode()
    forged = msgspec.structs.replace(
        claim.samples[0],
        verdict="certified",
        method="linear",
        counterexample="",
        profile="",
        proofs=(Proof(0, 1, (Leaf("multipliers", packed, bits),)),),
    )
    result = checked(encoded(claim.head, [forged]), model, data)
    assert len(result.problems) == 1
    assert "not closed" in result.problems[0]
