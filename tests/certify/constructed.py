"""Small models built by hand on which arithmetic in real numbers and the device disagree.

In each the label leads in real arithmetic at every point of the box (``test_constructed`` proves it
in fractions), and a stored input of the box is misclassified by a device. All scales are powers of
two, but for the weights' of ``rounding``, so that the arithmetic below is exact; ``a`` is a stored
input less its zero point, 0 to 255.

``CASES`` is also for other tests: whatever claims ``certified`` about one of these boxes under a
profile that ``expected`` calls ``refuted`` or ``unknown`` is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge.graph import (
    Activation,
    Add,
    FullyConnected,
    Graph,
    Int64Array,
    Operator,
    Quantization,
    Softmax,
    Tensor,
    Weights,
)
from cactus_edge.profiles import PROFILES

ZERO = -128
STEP = 2.0**-8
HALF_EVEN = ("tflite-xnnpack-x86", "litert-xnnpack-x86", "litert-xnnpack-arm")
"""Profiles that round a per-tensor FULLY_CONNECTED's halves to even."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model, a box and what is true of them.

    ``lower`` and ``upper`` are int64 in the model's input shape without the batch, ``radius``
    stored levels around ``centre``; ``counterexample`` lies between them. ``expected`` gives for
    each profile ``certified`` (every point is classified as ``label``), ``refuted`` (some point is
    not), or ``unknown``: no point is surely wrong, yet a device may decide otherwise.
    """

    graph: Graph
    centre: Int64Array
    radius: int
    label: int
    counterexample: Int64Array
    expected: Mapping[str, str]

    @property
    def lower(self) -> Int64Array:
        """Least stored inputs."""
        return self.centre - self.radius

    @property
    def upper(self) -> Int64Array:
        """Greatest stored inputs."""
        return self.centre + self.radius


def everywhere(verdict: str) -> dict[str, str]:
    """The same verdict under each profile."""
    return dict.fromkeys(PROFILES, verdict)


class _Builder:
    """Appends operators; ``tensors`` start with the input."""

    def __init__(self, inputs: int) -> None:
        self.tensors = [Tensor("input", (1, inputs), quantization=Quantization.of(STEP, ZERO))]
        self.operators: list[Operator] = []

    def dense(
        self,
        source: int,
        weights: Sequence[Sequence[int]],
        bias: Sequence[int],
        multiplier: float,
        activation: Activation = Activation.RELU,
    ) -> int:
        """FULLY_CONNECTED of this effective multiplier; the input's scale is the output's."""
        name = f"dense{len(self.operators)}"
        scale = np.array([multiplier], np.float32).view(np.uint32)
        op = FullyConnected(
            name=name,
            inputs=(source,),
            output=len(self.tensors),
            weights=Weights(np.array(weights, np.int8), 8, scale),
            bias=np.array(bias, np.int32),
            activation=activation,
        )
        quantization = self.tensors[source].quantization
        self.tensors.append(Tensor(name, (1, len(bias)), quantization=quantization))
        self.operators.append(op)
        return op.output

    def logits(
        self,
        source: int,
        weights: Sequence[Sequence[int]],
        bias: Sequence[int],
        multiplier: float,
    ) -> int:
        """The same without an activation."""
        return self.dense(source, weights, bias, multiplier, Activation.NONE)

    def add(self, a: int, b: int, step: float) -> int:
        """ADD with an output scale of ``step``."""
        op = Add(name="add", inputs=(a, b), output=len(self.tensors))
        shape = self.tensors[a].shape
        self.tensors.append(Tensor("add", shape, quantization=Quantization.of(step, ZERO)))
        self.operators.append(op)
        return op.output

    def softmax(self, source: int) -> int:
        """SOFTMAX as the decision's last step."""
        op = Softmax(name="softmax", inputs=(source,), output=len(self.tensors))
        shape = self.tensors[source].shape
        self.tensors.append(Tensor("softmax", shape, quantization=Quantization.of(2.0**-8, ZERO)))
        self.operators.append(op)
        return op.output

    def graph(self) -> Graph:
        """All of it; the last tensor is the output."""
        return Graph(tuple(self.tensors), tuple(self.operators), 0, len(self.tensors) - 1)


def _case(
    build: _Builder,
    centre: Sequence[int],
    radius: int,
    label: int,
    counterexample: Sequence[int],
    expected: Mapping[str, str],
) -> Case:
    """``centre`` and ``counterexample`` are given as values of ``a``."""
    return Case(
        build.graph(),
        np.array(centre, np.int64) + ZERO,
        radius,
        label,
        np.array(counterexample, np.int64) + ZERO,
        expected,
    )


def rounding() -> Case:
    """Two units that round up beat the one unit that equals their sum.

    h0 = a/10 and h1 = h2 = a/20, so 100 h0 + 60 leads 100 (h1 + h2) by 60 wherever a is. At a = 12
    the integers are h0 = 1 and h1 = h2 = 1: 160 against 200, stored 80 against 100.
    """
    build = _Builder(1)
    hidden = build.dense(0, [[2], [1], [1]], [0, 0, 0], 1 / 20)
    build.logits(hidden, [[100, 0, 0], [0, 100, 100]], [60, 0], 1 / 2)
    return _case(build, [20], 8, 0, [12], everywhere("refuted"))


def saturation() -> Case:
    """Both logits clip at 127 and the lower index wins, 400 accumulator units of margin or not.

    Accumulators 3 a and 3 a + 400 with multiplier 1/2 reach 255 steps at 510: at a = 170 both do.
    """
    build = _Builder(1)
    build.logits(0, [[3], [3]], [0, 400], 1 / 2)
    return _case(build, [120], 60, 1, [170], everywhere("refuted"))


def profile() -> Case:
    """A half that most runtimes round up and XNNPACK rounds to even, in the corner of a box.

    Logit 0 is 40/2 = 20. Logit 1 is a/2 with a from 41: 20.5 becomes 21, or the even 20, a tie.
    """
    build = _Builder(1)
    build.logits(0, [[0], [1]], [40, 0], 1 / 2)
    expected = {**everywhere("certified"), **dict.fromkeys(HALF_EVEN, "refuted")}
    return _case(build, [51], 10, 1, [41], expected)


def residual() -> Case:
    """ADD rounds its sum to a step that is 16 times as large as its operands'.

    With t = a0 + a1 the sums are t/16 and (t + 2)/16: 100 times the first plus 30 leads 100 times
    the second by 17.5. At t = 23 they round to 1 and 2. The branch itself rounds nothing (2 a / 2).
    """
    build = _Builder(2)
    branch = build.dense(0, [[0, 2], [2, 0]], [0, 4], 1 / 2)
    total = build.add(0, branch, 16 * STEP)
    build.logits(total, [[100, 0], [0, 100]], [30, 0], 1 / 2)
    return _case(build, [16, 16], 5, 0, [11, 12], everywhere("refuted"))


def softmax() -> Case:
    """Logits a whole step apart that SOFTMAX stores as one probability: the lower index wins.

    Logit 1 is one step of 2^-8 above logit 0 everywhere, so the probabilities are 1/2 -+ 2^-10 and
    both stored as 1/2. How a device rounds them is its own affair: nothing may be claimed.
    """
    build = _Builder(1)
    build.logits(0, [[0], [0]], [100, 102], 1 / 2)
    build.softmax(1)
    return _case(build, [100], 4, 1, [100], everywhere("unknown"))


def clamp_above() -> Case:
    """An activation that has no step above 127, where the real one goes on.

    h0 = 2 a and h1 = a - 5: h0 leads 2 h1 by 10. From a = 128 on h0 stays at 255; at a = 140 it is
    255 against 270.
    """
    build = _Builder(1)
    hidden = build.dense(0, [[4], [2]], [0, -10], 1 / 2)
    build.logits(hidden, [[1, 0], [0, 2]], [0, 0], 1 / 2)
    return _case(build, [120], 24, 0, [140], everywhere("refuted"))


def clamp_at_zero_point() -> Case:
    """A layer without activation whose zero point is the least integer: it is a ReLU all the same.

    h0 = 60 - a and h1 = a - 10: 60 - h0 leads h1 by 10. From a = 60 on h0 stays at 0; at a = 76 it
    is 60 against 66.
    """
    build = _Builder(1)
    hidden = build.logits(0, [[-2], [2]], [120, -20], 1 / 2)
    build.logits(hidden, [[-2, 0], [0, 2]], [120, 0], 1 / 2)
    return _case(build, [60], 16, 0, [76], everywhere("refuted"))


def last_label() -> Case:
    """Equal stored logits, and the label is the last index.

    a/8 against (a + 2)/8: at a = 8 the stored logits are 1 and 1, and the real ones 1 and 1.25.
    """
    build = _Builder(1)
    build.logits(0, [[1], [0], [1]], [0, 0, 2], 1 / 8)
    return _case(build, [10], 4, 2, [8], everywhere("refuted"))


_BUILDERS: tuple[Callable[[], Case], ...] = (
    rounding,
    saturation,
    profile,
    residual,
    softmax,
    clamp_above,
    clamp_at_zero_point,
    last_label,
)
CASES: dict[str, Case] = {build.__name__: build() for build in _BUILDERS}
