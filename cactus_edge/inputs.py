"""From real inputs to stored integers, and from a perturbation set to boxes of them, exactly.

A real input lies in [0, 1]. The deployed quantizer rounds ``real / scale`` to nearest; how it
breaks ties, and in what order it divides, differs from device to device. So a box holds every
integer that *some* such quantizer makes of *some* real input in the ball: ties count outwards, and
where the device divides floats, the quotient is widened by the error of three float32 roundings.
Everything is computed in rationals; the ball is clipped to [0, 1].

A perturbation set is one radius for all input elements or one for each (0: the element keeps its
value, so that masks are radii), in real units or in stored levels. With a *patch* the set is a
union: for each placement of a window the elements inside it may change, by their radii, and no
others. Each placement is a box of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cactus_edge import scales
from cactus_edge.errors import DataError, MalformedModelError, UsageError
from cactus_edge.graph import BoolArray, Graph, Int64Array

__all__ = ["InputMap", "Perturbation", "box", "boxes", "input_map", "stored"]

METADATA = "cactus_edge.input"
_HALF = Fraction(1, 2)
_LARGEST_EXPONENT = 40  # a rational with a billion digits is no radius
_LONGEST_TEXT = 100
_FLOAT_ERROR = Fraction(1, 1 << 22)
_MOST_BOX_ELEMENTS = 1 << 27  # of all placements of a patch together, a gigabyte as int64


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
    """Every input within ``radius`` of a sample: real units (``epsilon``) or integer levels.

    ``radii``, where given, has one entry for each element of the model's input, in its order, and
    ``radius`` is 0. ``patch`` is (height, width, stride): the corners of the window's placements
    are the multiples of ``stride`` at which it lies inside the input.
    """

    kind: str
    radius: Fraction
    radii: tuple[Fraction, ...] = ()
    patch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check kind and range.

        Raises:
            UsageError: not a radius of this kind, or not a patch.
        """
        for radius in (self.radius, *dict.fromkeys(self.radii)):
            if self.kind == "epsilon":
                if not 0 <= radius <= 1:
                    raise UsageError(f"epsilon {radius} is outside [0, 1]")
            elif self.kind != "levels" or radius.denominator != 1 or not 0 <= radius <= 255:
                raise UsageError(f"{self.kind} {radius}: levels are integers from 0 to 255")
        if self.radii and self.radius:
            raise UsageError("give either one radius or one for each element, not both")
        if self.patch and (len(self.patch) != 3 or min(self.patch) < 1):
            raise UsageError(
                f"patch {list(self.patch)}: give height, width and stride, each at least 1"
            )

    @staticmethod
    def epsilon(text: str | Fraction) -> Perturbation:
        """Radius on real inputs in [0, 1], from decimal text such as ``0.1`` or ``8/255``.

        Raises:
            UsageError: not a number in [0, 1].
        """
        return Perturbation("epsilon", rational(text))

    @staticmethod
    def levels(count: int) -> Perturbation:
        """Radius in stored integer levels.

        Raises:
            UsageError: outside 0..255.
        """
        return Perturbation("levels", Fraction(count))

    @staticmethod
    def each(kind: str, radii: Sequence[str | Fraction | int]) -> Perturbation:
        """A radius for each input element; ``kind`` is ``epsilon`` or ``levels``.

        Raises:
            UsageError: none at all, or one that is no radius of this kind.
        """
        if not radii:
            raise UsageError("no radius for any element")
        return Perturbation(kind, Fraction(0), tuple(rational(radius) for radius in radii))

    def patched(self, height: int, width: int, stride: int = 1) -> Perturbation:
        """The same radii, but only inside one window at a time.

        Raises:
            UsageError: an extent or the stride is below 1.
        """
        return replace(self, patch=(height, width, stride))


def rational(text: str | Fraction | int) -> Fraction:
    """The exact value of decimal text such as ``0.1``, or of a quotient such as ``8/255``.

    Raises:
        UsageError: not such a text.
    """
    if isinstance(text, (Fraction, int)):
        return Fraction(text)
    try:
        if len(text) > _LONGEST_TEXT:
            raise ValueError(text)
        numerator, _, denominator = text.partition("/")
        parts = [Decimal(numerator), Decimal(denominator or 1)]
        if any(abs(part.adjusted()) > _LARGEST_EXPONENT for part in parts if part.is_finite()):
            raise ValueError(text)
        return Fraction(parts[0]) / Fraction(parts[1])
    except (InvalidOperation, ValueError, OverflowError, ZeroDivisionError):
        raise UsageError(f"'{text[:_LONGEST_TEXT]}' is not a number such as 0.1 or 8/255") from None


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


def _apply(values: npt.NDArray[np.generic], function: Callable[[Fraction], int]) -> Int64Array:
    """``function`` (Fraction -> int) on every value of an array, once for each distinct value."""
    distinct, inverse = np.unique(values, return_inverse=True)
    if values.dtype == np.uint8:
        reals = [Fraction(int(v), 255) for v in distinct]
    else:
        reals = [Fraction(float(v)) for v in distinct]  # float: exact, binary to rational
    table = np.array([function(real) for real in reals], np.int64)
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


def real_level(mapping: InputMap, real: Fraction, *, up: bool, strict: bool = False) -> int:
    """The greatest (``up``) or least integer that some quantizer makes of a real input.

    Args:
        mapping: the model's input map.
        real: the end of an interval of real inputs, not clipped to [0, 1].
        up: whether it is the upper end.
        strict: whether the end itself is outside of the interval.

    Returns:
        The level, within the limits of the stored type.
    """
    quotient = real / mapping.scale
    slack = Fraction(0) if mapping.exact else abs(quotient) * _FLOAT_ERROR
    if up:
        reach = quotient + slack + _HALF
        level = reach.__ceil__() - 1 if strict else reach.__floor__()
    else:
        reach = quotient - slack - _HALF
        level = reach.__floor__() + 1 if strict else reach.__ceil__()
    least, greatest = mapping.limits
    return min(max(level + mapping.zero_point, least), greatest)


def box(
    graph: Graph, images: npt.NDArray[np.generic], perturbation: Perturbation
) -> tuple[Int64Array, Int64Array]:
    """Least and greatest stored integer of each input element over the perturbation set.

    Args:
        graph: gives the input map.
        images: samples as for ``stored``.
        perturbation: the radius or radii; a set with a patch is no box, see ``boxes``.

    Returns:
        (lower, upper), int64, in the model's input shape.

    Raises:
        DataError: as ``stored``; or radii for another number of elements.
        UsageError: the perturbation has a patch.
    """
    if perturbation.patch:
        raise UsageError("a patch is a union of boxes; this takes one box for each sample")
    mapping = input_map(graph)
    if perturbation.kind == "levels":
        centre = stored(graph, images)
        radii = perturbation.radii or (perturbation.radius,) * centre[0:1].size
        levels = np.array([int(radius) for radius in radii], np.int64)
        _check_radii(perturbation, graph)
        return around(graph, centre, levels.reshape(1, *centre.shape[1:]))
    images = _checked(graph, images)
    _check_radii(perturbation, graph)
    flat = images.reshape(len(images), -1)
    lower, upper = np.empty(flat.shape, np.int64), np.empty(flat.shape, np.int64)
    for radius, columns in _columns(perturbation, flat.shape[1]):

        def lowest(real: Fraction, radius: Fraction = radius) -> int:
            return real_level(mapping, max(real - radius, Fraction(0)), up=False)

        def highest(real: Fraction, radius: Fraction = radius) -> int:
            return real_level(mapping, min(real + radius, Fraction(1)), up=True)

        lower[:, columns] = _apply(flat[:, columns], lowest)
        upper[:, columns] = _apply(flat[:, columns], highest)
    return lower.reshape(images.shape), upper.reshape(images.shape)


def around(graph: Graph, centre: Int64Array, levels: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The stored integers within ``levels``, which broadcasts against ``centre``."""
    least, greatest = input_map(graph).limits
    return np.maximum(centre - levels, least), np.minimum(centre + levels, greatest)


def _columns(perturbation: Perturbation, size: int) -> Iterator[tuple[Fraction, BoolArray]]:
    """Each distinct radius with the elements that have it."""
    if not perturbation.radii:
        yield perturbation.radius, np.ones(size, bool)
        return
    distinct = {radius: i for i, radius in enumerate(dict.fromkeys(perturbation.radii))}
    index = np.array([distinct[radius] for radius in perturbation.radii])
    for radius, i in distinct.items():
        yield radius, index == i


def _check_radii(perturbation: Perturbation, graph: Graph) -> None:
    size = graph.tensors[graph.core_input].size
    if perturbation.radii and len(perturbation.radii) != size:
        raise DataError(f"{len(perturbation.radii)} radii, the model's input has {size} elements")


def boxes(
    graph: Graph, images: npt.NDArray[np.generic], perturbation: Perturbation
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """For each sample the boxes whose union is the perturbation set.

    Args:
        graph: gives the input map.
        images: samples as for ``stored``.
        perturbation: with or without a patch.

    Yields:
        (lower, upper), int64 [boxes, *input shape]: a box for each placement of the patch, rows
        first; one box without a patch.

    Raises:
        DataError: as ``box``; or the input is no image, or smaller than the patch.
        UsageError: the patch has too many placements.
    """
    whole = box(graph, images, replace(perturbation, patch=()))
    if not perturbation.patch:
        for lower, upper in zip(*whole, strict=True):
            yield lower[None], upper[None]
        return
    inside = placements(graph, perturbation.patch)
    fixed = box(graph, images, Perturbation(perturbation.kind, Fraction(0)))
    for index in range(len(images)):
        yield (
            np.where(inside, whole[0][index], fixed[0][index]),
            np.where(inside, whole[1][index], fixed[1][index]),
        )


def placements(graph: Graph, patch: Sequence[int]) -> BoolArray:
    """Bool [placements, height, width, 1]: what lies inside each placement of the window.

    Raises:
        DataError: the input is no image, or smaller than the window.
        UsageError: more placements than fit in memory.
    """
    shape = graph.tensors[graph.core_input].shape[1:]
    height, width, stride = patch
    if len(shape) != 3 or height > shape[0] or width > shape[1]:
        raise DataError(f"a patch of {height} x {width} does not fit an input of {list(shape)}")
    rows = range(0, shape[0] - height + 1, stride)
    columns = range(0, shape[1] - width + 1, stride)
    count = len(rows) * len(columns)
    if count * graph.tensors[graph.core_input].size > _MOST_BOX_ELEMENTS:
        raise UsageError(f"the patch has {count} placements, too many to hold; use a larger stride")
    inside = np.zeros((count, *shape[:2], 1), bool)
    for index in range(count):
        top, left = rows[index // len(columns)], columns[index % len(columns)]
        inside[index, top : top + height, left : left + width] = True
    return inside


def integer_box(
    graph: Graph, lower: npt.ArrayLike, upper: npt.ArrayLike
) -> tuple[Int64Array, Int64Array]:
    """A box that is given in stored integers, checked.

    Args:
        graph: gives the input's shape and type.
        lower: integers [*input shape]; ``upper`` likewise.
        upper: see ``lower``.

    Returns:
        (lower, upper), int64 [1, *input shape].

    Raises:
        DataError: no integers, another shape, outside the stored type, or an empty box.
    """
    tensor = graph.tensors[graph.core_input]
    ends = [np.asarray(end) for end in (lower, upper)]
    for name, end in zip(("lower", "upper"), ends, strict=True):
        if end.dtype.kind not in "iu" or end.shape != tensor.shape[1:]:
            raise DataError(
                f"the {name} end is {end.dtype} {list(end.shape)}, the model's input is stored "
                f"integers {list(tensor.shape[1:])}"
            )
    least, greatest = tensor.dtype.range
    low, high = (end.astype(np.int64)[None] for end in ends)
    if low.min() < least or high.max() > greatest:
        raise DataError(f"the box reaches outside {least}..{greatest}, what the input stores")
    if (low > high).any():
        empty = int(np.flatnonzero((low > high).reshape(-1))[0])
        raise DataError(f"the box is empty: lower end above upper end at element {empty}")
    return low, high
