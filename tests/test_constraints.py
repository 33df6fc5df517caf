"""Rules that keep apart what runtimes compute differently, and what a proof relies on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cactus_edge.constraints import validate
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Activation,
    Add,
    AddRequantization,
    FullyConnected,
    Graph,
    Operator,
    Quantization,
    Requantization,
    Reshape,
    Softmax,
    Tensor,
    Weights,
    sixes,
)
from cactus_edge.semantics import AddRounding, Rounding


def layer(name: str, source: int, target: int, **options: object) -> FullyConnected:
    return FullyConnected(
        name=name,
        inputs=(source,),
        output=target,
        weights=Weights(np.eye(3, dtype=np.int8), 8, np.full(1, 0.01, np.float32).view(np.uint32)),
        bias=np.zeros(3, np.int32),
        **options,  # type: ignore[arg-type]
    )


def graph(operators: list[Operator], quantization: Quantization, output: int) -> Graph:
    tensors = tuple(Tensor(f"t{i}", (1, 3), quantization=quantization) for i in range(4))
    return Graph(tensors, tuple(operators), 0, output)


@pytest.mark.parametrize(
    ("levels", "zero_point", "agree"),
    [
        (200.5, -128, False),
        (100.5, 0, False),
        (101.5, -1, False),
        (201.5, -128, True),
        (99.5, -100, True),
        (120.0, -128, True),
        (300.5, -128, True),
    ],
)
def test_relu6_is_refused_where_runtimes_round_six_differently(
    levels: float, zero_point: int, agree: bool
) -> None:
    """Measured: XNNPACK rounds a stored 6 half to even, with the zero point added in float32."""
    quantization = Quantization.of(6 / levels, zero_point)
    made = graph([layer("a", 0, 1, activation=Activation.RELU6)], quantization, 1)
    if agree:
        validate(made)
    else:
        assert len(set(sixes(made.tensors[1]))) == 2
        with pytest.raises(InvalidGraphError, match="RELU6 only"):
            validate(made)


def test_one_softmax_at_most() -> None:
    quantization = Quantization.of(0.05, -128)
    probability = Quantization.of(1 / 256, -128)
    made = graph([layer("logits", 0, 1)], quantization, 3)
    tensors = (*made.tensors[:2], *(replace(t, quantization=probability) for t in made.tensors[2:]))
    pair = [Softmax(name="s1", inputs=(1,), output=2), Softmax(name="s2", inputs=(2,), output=3)]
    one = Graph(tensors, (*made.operators, pair[0]), 0, 2)
    validate(one)
    with pytest.raises(InvalidGraphError, match="only one SOFTMAX"):
        validate(replace(one, operators=(*made.operators, *pair), output=3))


@pytest.mark.parametrize(
    ("rounding", "integers"),
    [
        (AddRounding.SINGLE, (1 << 30, 10, 1 << 30, 31, 1 << 30, 50)),
        (AddRounding.FIXED_POINT, (1 << 20, 0, 1 << 20, 0, 7, 20)),
        (AddRounding.FIXED_POINT, (1 << 20, 1, 1 << 20, 0, 1, 20)),
        (AddRounding.DOUBLE_HALF_AWAY, (1 << 30, 0, -1, 0, 1 << 30, 19)),
    ],
)
def test_add_integers_that_overflow_are_refused(
    rounding: AddRounding, integers: tuple[int, int, int, int, int, int]
) -> None:
    add = Add(
        name="sum", inputs=(0, 0), output=1, requantization=AddRequantization(rounding, integers)
    )
    with pytest.raises(InvalidGraphError, match="'sum'"):
        validate(graph([add], Quantization.of(0.05, 0), 1))


@pytest.mark.parametrize(
    ("rounding", "multiplier", "shift"),
    [
        (Rounding.SINGLE, 1 << 30, 30),
        (Rounding.SINGLE, 5, 63),
        (Rounding.DOUBLE_HALF_AWAY, 1 << 31, 0),
        (Rounding.FLOAT32, 1 << 24, 30),
        (Rounding.FLOAT64, 1 << 52, 52),
    ],
)
def test_multipliers_outside_are_refused(rounding: Rounding, multiplier: int, shift: int) -> None:
    parameters = Requantization.uniform(rounding, multiplier, shift, 3)
    made = graph([layer("a", 0, 1, requantization=parameters)], Quantization.of(0.05, 0), 1)
    with pytest.raises(InvalidGraphError, match="channel 0"):
        validate(made)


def test_cycles_and_double_outputs_are_refused() -> None:
    quantization = Quantization.of(0.05, 0)
    twice = graph([layer("a", 0, 1), layer("b", 0, 1)], quantization, 1)
    with pytest.raises(InvalidGraphError, match="computed twice"):
        validate(twice)
    early = graph([Reshape(name="r", inputs=(2,), output=1)], quantization, 1)
    with pytest.raises(InvalidGraphError, match="not computed before"):
        validate(early)
