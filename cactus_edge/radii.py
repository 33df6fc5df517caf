"""Perturbation sets from files: a radius for each input element, or a mask of what may change.

A certificate states the radii themselves, so nothing here is part of what a checker trusts.
"""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt

from cactus_edge import files
from cactus_edge.errors import DataError, UsageError, shortened
from cactus_edge.graph import Graph
from cactus_edge.inputs import Perturbation, rational

_LARGEST_TEXT = 1 << 24


def read_radii(
    graph: Graph, path: Path, kind: str, radius: str | Fraction | int | None = None
) -> Perturbation:
    """Radii, or a mask of what may change, from a file.

    Args:
        graph: gives the input's shape; an array of [height, width] holds for all channels.
        path: ``.npy``; ``.npz`` with one array; ``.json``, a list; or ``.csv``. Text holds numbers
            such as ``0.1`` or ``8/255``, taken exactly.
        kind: ``epsilon`` or ``levels``.
        radius: what the true elements of a mask (an array of bool) stand for.

    Raises:
        DataError: the file cannot be understood, or does not fit the input.
        UsageError: no such file, no radius for a mask, or one beside a list of radii.
    """
    content = files.read(path, "file of radii")
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        values = _array(path, content)
    elif suffix in (".json", ".csv"):
        values = _texts(path, content, suffix)
    else:
        raise DataError(f"{path}: radii are read from .npy, .npz, .json or .csv")
    shape = graph.tensors[graph.core_input].shape[1:]
    if len(shape) == 3 and values.shape == shape[:2]:
        values = np.repeat(values[:, :, None], shape[2], axis=2)
    size = graph.tensors[graph.core_input].size
    if values.size != size or (values.ndim > 1 and values.shape != shape):
        raise DataError(f"{path}: shape {list(values.shape)}, the model's input is {list(shape)}")
    is_mask = values.dtype == np.bool_
    if is_mask != (radius is not None):
        problem = "a mask needs a radius" if is_mask else "radii, so that no other radius applies"
        raise UsageError(f"{path}: holds {problem}")
    if radius is not None:
        inside = rational(radius)
        return Perturbation.each(kind, [inside if v else Fraction(0) for v in values.flat])
    table = {value: _exact(path, value) for value in set(values.reshape(-1).tolist())}
    return Perturbation.each(kind, [table[value] for value in values.reshape(-1).tolist()])


def _exact(path: Path, value: str | int | float) -> Fraction:
    try:
        return rational(value.strip()) if isinstance(value, str) else Fraction(value)
    except (UsageError, ValueError, OverflowError):
        raise DataError(
            f"{path}: '{shortened(value)}' is not a radius such as 0.1 or 8/255"
        ) from None


def _array(path: Path, content: bytes) -> npt.NDArray[np.generic]:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(found, np.ndarray):
            if len(found.files) != 1:
                raise DataError(f"{path}: holds {len(found.files)} arrays, one is needed")
            found = found[found.files[0]]
    except DataError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in NumPy's reader
        raise DataError(f"{path}: not an array: {shortened(error)}") from None
    if found.dtype.kind not in "biuf":
        raise DataError(f"{path}: an array of {found.dtype}; numbers or bool are needed")
    return found


def _texts(path: Path, content: bytes, suffix: str) -> npt.NDArray[np.generic]:
    """A list of numbers, as text, so that decimals stay exact."""
    if len(content) > _LARGEST_TEXT:
        raise DataError(f"{path}: larger than {_LARGEST_TEXT} bytes")

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a radius")

    try:
        text = content.decode("utf-8")
        if suffix == ".csv":
            lines = text.splitlines()
            values: object = [c for line in lines for c in line.split(",") if c.strip()]
        else:
            values = json.loads(text, parse_float=str, parse_int=str, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a list of numbers: {shortened(error)}") from None
    cells = cast(list[object], values) if isinstance(values, list) else []
    if not cells or not all(isinstance(cell, str) for cell in cells):
        raise DataError(f'{path}: not a list of numbers; write [0.1, 0, "8/255", ...]')
    return np.array(cells, object)
