"""Equalization changes no function, corrected biases leave no mean error, ranges hold values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.errors import UsageError
from cactus_edge.lowering.calibration import Calibration, calibrate
from cactus_edge.lowering.refine import clipped, corrected, equalized
from cactus_edge.lowering.stages import Flatten, Layer, Pool, Stage, Sum, linear, run, run_bounds

SEEDS = st.integers(0, 1 << 30)


def network(seed: int) -> tuple[list[Stage], np.ndarray]:
    """A convolution, a depthwise one, a pool, a sum, two linear layers; and samples."""
    rng = np.random.default_rng(seed)

    def layer(name: str, *shape: int, **options: object) -> Layer:
        rows = np.exp(rng.normal(0, 1.5, (shape[0], *[1] * (len(shape) - 1))))
        bias = rng.normal(0, 0.3, shape[0])
        return Layer(name, name, rows * rng.normal(0, 1, shape), bias, **options)  # type: ignore[arg-type]

    stages: list[Stage] = [
        layer("conv", 4, 2, 3, 3, relu=True, padding=((1, 1), (0, 1))),
        layer("depthwise", 8, 1, 2, 2, relu=True, groups=4, stride=(1, 2)),
        layer("point", 8, 8, 1, 1, relu=bool(rng.integers(2))),
        layer("clipped", 8, 8, 1, 1, relu=True, ceiling=2.0),
        Sum("sum", "sum", "point", relu=True),
        Pool("pool", "max", (2, 1), (1, 1)),
        Flatten("flatten"),
        layer("hidden", 6, 8 * 4 * 3, relu=True),
        layer("last", 3, 6),
    ]
    return stages, rng.random((5, 2, 6, 7))


def output(stages: list[Stage], x: np.ndarray) -> np.ndarray:
    *_, (_, _, after) = run(stages, x)
    return after


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_equalized_networks_are_the_same_function(seed: int) -> None:
    stages, x = network(seed)
    equal = equalized(stages)
    np.testing.assert_allclose(output(equal, x), output(stages, x), rtol=1e-9, atol=1e-9)
    hidden, last = equal[-2:]
    assert isinstance(hidden, Layer)
    assert isinstance(last, Layer)
    own, read = np.abs(hidden.weight).max(1), np.abs(last.weight).max(0)
    np.testing.assert_allclose(own, read, rtol=1e-6)
    assert equal[3] is stages[3], "what is clipped, or read twice, keeps its channels"


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_corrected_biases_leave_no_mean_error_in_the_first_layer(seed: int) -> None:
    stages, x = network(seed)
    rng = np.random.default_rng(seed + 1)
    shipped = {
        s.name: s.weight + rng.normal(0, 0.1, s.weight.shape)
        for s in stages
        if isinstance(s, Layer)
    }
    first, plain = corrected(stages, shipped, x)[0], stages[0]
    assert isinstance(first, Layer)
    assert isinstance(plain, Layer)
    error = linear(first, x, shipped["conv"]) - linear(plain, x, plain.weight)
    mean = error.mean(axis=(0, 2, 3)) + first.bias - plain.bias
    np.testing.assert_allclose(mean, 0, atol=1e-12)


@given(SEEDS, st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_clipped_weights_have_the_lesser_error(seed: int, bits: int) -> None:
    stages, _ = network(seed)
    for before, after in zip(stages, clipped(stages, bits), strict=True):
        if not isinstance(before, Layer):
            assert after is before
            continue
        assert isinstance(after, Layer)
        errors: list[np.ndarray] = []
        for weight in (before.weight, after.weight):
            rows = weight.reshape(1 if after.name == "last" else len(weight), -1)
            limit = 2 ** (bits - 1) - 1
            step = np.abs(rows).max(1, keepdims=True) / limit
            rounded = np.rint(rows / step).clip(-limit, limit) * step
            errors.append(np.square(rounded - before.weight.reshape(rows.shape)).sum(1))
        assert (errors[1] <= errors[0] + 1e-9).all()


@given(SEEDS, st.floats(0, 0.2))
@settings(max_examples=10, deadline=None)
def test_bounds_hold_what_samples_yield(seed: int, radius: float) -> None:
    stages, x = network(seed)
    rng = np.random.default_rng(seed)
    ends = run_bounds(stages, x - radius, x + radius)
    inside = x + rng.uniform(-radius, radius, x.shape)
    for (_, low, high), (_, _, found) in zip(ends, run(stages, inside), strict=True):
        assert (low <= found + 1e-9).all()
        assert (found <= high + 1e-9).all()


def test_ranges_by_method() -> None:
    stages, x = network(1)
    whole = calibrate(stages, x, Calibration("minmax"))
    values = {s.name: after for s, _, after in run(stages, x) if isinstance(s, Layer | Sum)}
    for name, span in whole.items():
        assert span.upper == pytest.approx(values[name].max())
        relu = next(s for s in stages if isinstance(s, Layer | Sum) and s.name == name).relu
        assert span.lower == pytest.approx(0.0 if relu else values[name].min())
    assert whole["clipped"].upper <= 2.0
    for method in (Calibration("percentile", 0.99), Calibration("mse")):
        narrow = calibrate(stages, x, method)
        assert all(narrow[n].upper <= whole[n].upper for n in whole)
        assert method.method == "mse" or any(narrow[n].upper < whole[n].upper for n in whole)
    wide = calibrate(stages, x, Calibration("minmax", epsilon=0.1))
    assert all(wide[n].upper >= whole[n].upper and wide[n].lower <= whole[n].lower for n in whole)
    constant = [replace(s, weight=s.weight * 0, bias=s.bias * 0) if isinstance(s, Layer) else s
                for s in stages]  # fmt: skip
    assert all(r.upper > r.lower for r in calibrate(constant, x, Calibration()).values())


def test_the_least_squared_error_gives_up_an_outlier() -> None:
    copy = Layer("copy", "copy", np.ones((1, 1, 1, 1)), np.zeros(1), groups=1)
    x = np.random.default_rng(0).random((1, 1, 500, 500)) / 4
    x[0, 0, 3, 4] = 1
    ranges = [calibrate([copy], x, Calibration(method)) for method in ("minmax", "mse")]
    steps = [r["copy"].upper / 255 for r in ranges]
    errors = [np.square(np.rint(x / s).clip(0, 255) * s - x).mean() for s in steps]
    assert ranges[0]["copy"].upper == 1 > ranges[1]["copy"].upper
    assert errors[1] < errors[0]


@pytest.mark.parametrize("wrong", [{"percentile": 0.4}, {"percentile": 1.5}, {"epsilon": -0.1}])
def test_calibration_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Calibration(**wrong)  # type: ignore[arg-type]
