"""From real inputs to stored integers, and from a radius to a box of them, exactly.

A real input lies in [0, 1]. The deployed quantizer rounds ``real / scale`` to nearest; how it
breaks ties, and in what order it divides, differs from device to device. So a box holds every
integer that *some* such quantizer makes of *some* real input in the ball: ties count outwards, and
where the device divides floats, the quotient is widened by the error of three float32 roundings.
Everything is computed in rationals; the ball is clipped to [0, 1].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cactus_edge import scales
from cactus_edge.errors import DataError, MalformedModelError, UsageError
from cactus_edge.graph import Graph, Int64Array

METADATA = "cactus_edge.input"
_HALF = Fraction(1, 2)
_LARGEST_EXPONENT = 40  # a rational with a billion digits is no radius
_FLOAT_ERROR = Fraction(1, 1 << 22)


@dataclass(frozen=True)
class InputMap:
    """``stored = nearest(real / scale) + zero_point``, clipped to ``limits``.

    ``exact``: the input is a pixel, stored without any float (``stored = pixel + offset``).
    """

    scale: Fraction
    zero_point: int
    limits: tuple[int, int]
    exact: bool

    def describe(self) -> dict[str, str | int]:
        """For the certificate."""
        kind = "pixel" if self.exact else "affine"
        return {"kind": kind, "scale": str(self.scale), "zero_point": self.zero_point}


@dataclass(frozen=True)
class Perturbation:
    """Every input within ``radius`` of a sample: real units (``epsilon``) or integer levels."""

    kind: str
    radius: Fraction

    def __post_init__(self) -> None:
        """Check kind and range.

        Raises:
            UsageError: not a radius of this kind.
        """
        if self.kind == "epsilon":
            if not 0 <= self.radius <= 1:
                raise UsageError(f"epsilon {self.radius} is outside [0, 1]")
        elif self.kind != "levels" or self.radius.denominator != 1 or not 0 <= self.radius <= 255:
            raise UsageError(f"{self.kind} {self.radius}: levels are integers from 0 to 255")

    @staticmethod
    def epsilon(text: str | Fraction) -> Perturbation:
        """Radius on real inputs in [0, 1], from decimal text such as ``0.1`` or ``8/255``.

        Raises:
            UsageError: not a number in [0, 1].
        """
        return Perturbation("epsilon", _rational(text))

    @staticmethod
    def levels(count: int) -> Perturbation:
        """Radius in stored integer levels.

        Raises:
            UsageError: outside 0..255.
        """
        return Perturbation("levels", Fraction(count))


def _rational(text: str | Fraction) -> Fraction:
    if isinstance(text, Fraction):
        return text
    try:
        numerator, _, denominator = text.partition("/")
        parts = [Decimal(numerator), Decimal(denominator or 1)]
        if any(abs(part.adjusted()) > _LARGEST_EXPONENT for part in parts if part.is_finite()):
            raise ValueError(text)
        return Fraction(parts[0]) / Fraction(parts[1])
    except (InvalidOperation, ValueError, OverflowError, ZeroDivisionError):
        raise UsageError(f"'{text}' is not a number such as 0.1 or 8/255") from None


def input_map(graph: Graph) -> InputMap:
    """The map that the file declares in its metadata, or the one of its input's quantization.

    Raises:
        MalformedModelError: the metadata cannot be read or contradict the quantization.
    """
    tensor = graph.tensors[graph.core_input]
    if tensor.quantization is None:
        raise MalformedModelError(f"input '{tensor.name}' has no scale; give a box of integers")
    stored = scales.decode_float32(tensor.quantization.scale_bits)
    affine = InputMap(stored.fraction(), tensor.zero_point, tensor.dtype.range, exact=False)
    text = dict(graph.metadata).get(METADATA)
    if text is None:
        return affine
    try:
        declared = json.loads(text)
        kind = declared["kind"]
        if kind == "affine":
            return affine
        levels, offset = declared["levels_per_unit"], declared["offset"]
        pixel = kind == "pixel" and type(levels) is int and type(offset) is int and levels > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MalformedModelError(f"metadata '{METADATA}' is not an input map") from None
    nearest = scales.nearest(1, levels, 32) if pixel else None
    if nearest != stored or offset != tensor.zero_point or graph.core_input != graph.input:
        raise MalformedModelError(f"metadata '{METADATA}' contradicts the input's quantization")
    return InputMap(Fraction(1, levels), offset, tensor.dtype.range, exact=True)


def _apply(values: npt.NDArray[np.generic], function: object) -> Int64Array:
    """``function`` (Fraction -> int) on every value of an array, once for each distinct value."""
    distinct, inverse = np.unique(values, return_inverse=True)
    if values.dtype == np.uint8:
        reals = [Fraction(int(v), 255) for v in distinct]
    else:
        reals = [Fraction(float(v)) for v in distinct]  # float: exact, binary to rational
    table = np.array([function(real) for real in reals], np.int64)  # type: ignore[operator]
    return table[inverse.reshape(-1)].reshape(values.shape)


def _checked(graph: Graph, images: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    shape = graph.tensors[graph.core_input].shape[1:]
    if images.shape[1:] != shape:
        flat = int(np.prod(images.shape[1:]))
        if len(shape) == 1 and flat == shape[0]:
            return images.reshape(len(images), flat)
        raise DataError(
            f"samples have shape {list(images.shape[1:])}, the model takes {list(shape)}"
        )
    if images.dtype != np.uint8 and images.size:
        if images.dtype.kind != "f":
            raise DataError(f"samples must be uint8 or float in [0, 1], got {images.dtype}")
        if not (images.min() >= 0 and images.max() <= 1):
            raise DataError("float samples must lie in [0, 1]")
    return images


def stored(graph: Graph, images: npt.NDArray[np.generic]) -> Int64Array:
    """Stored integers of samples: uint8 (real = pixel / 255) or float in [0, 1].

    Raises:
        DataError: another shape or type, or values outside [0, 1].
    """
    mapping = input_map(graph)
    lower, upper = mapping.limits

    def function(real: Fraction) -> int:
        level = (real / mapping.scale + _HALF).__floor__() + mapping.zero_point
        return min(max(level, lower), upper)

    return _apply(_checked(graph, images), function)


def box(
    graph: Graph, images: npt.NDArray[np.generic], perturbation: Perturbation
) -> tuple[Int64Array, Int64Array]:
    """Least and greatest stored integer of each input element over the perturbation set.

    Args:
        graph: gives the input map.
        images: samples as for ``stored``.
        perturbation: the radius.

    Returns:
        (lower, upper), int64, in the model's input shape.

    Raises:
        DataError: as ``stored``.
    """
    mapping = input_map(graph)
    least, greatest = mapping.limits
    if perturbation.kind == "levels":
        centre, radius = stored(graph, images), int(perturbation.radius)
        return np.maximum(centre - radius, least), np.minimum(centre + radius, greatest)
    images = _checked(graph, images)
    slack = Fraction(0) if mapping.exact else _FLOAT_ERROR
    radius = perturbation.radius

    def lowest(real: Fraction) -> int:
        quotient = max(real - radius, Fraction(0)) / mapping.scale * (1 - slack)
        return min(max((quotient - _HALF).__ceil__() + mapping.zero_point, least), greatest)

    def highest(real: Fraction) -> int:
        quotient = min(real + radius, Fraction(1)) / mapping.scale * (1 + slack)
        return min(max((quotient + _HALF).__floor__() + mapping.zero_point, least), greatest)

    return _apply(images, lowest), _apply(images, highest)
