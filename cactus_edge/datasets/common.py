"""What the readers share: types, where files are looked up, and checks of arrays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cactus_edge.datasets.mapped import forget
from cactus_edge.errors import DataError

Split = Literal["train", "validation", "test"]
Part = Literal["train", "test"]  # as published
Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Arrays = tuple[Images, Labels]

DATA_VARIABLE = "CACTUS_EDGE_DATA"
_ROWS = 4096
SPLIT_SEED = 20_240_601  # of the held-out permutation and of the digits' test split


@dataclass(frozen=True, eq=False)
class Source:
    """One published part, checked.

    ``images`` and ``labels`` are those of a ``Dataset``; ``groups`` int64 [N], where given, says
    which samples belong together: the validation split never divides a group.
    """

    images: Images
    labels: Labels
    classes: int
    groups: Labels | None = None


def data_directory(name: str) -> Path:
    """Where the files of the public data set ``name`` are looked up."""
    root = os.environ.get(DATA_VARIABLE)
    if root:
        return Path(root) / name
    try:
        return Path.home() / ".cache" / "cactus_edge" / name
    except RuntimeError:
        raise DataError(
            f"data set '{name}': this user has no home folder; set {DATA_VARIABLE} to the folder "
            f"that holds {name}/, or HOME"
        ) from None


def order(count: int) -> npt.NDArray[np.int64]:
    """The fixed permutation whose end is held out for validation, int64 [count]."""
    return np.random.default_rng(SPLIT_SEED).permutation(count)


def checked(
    where: str, part: str, images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]
) -> Arrays:
    """Images as uint8 or float32 in NHWC or NF, labels as int64; anything else is an error."""
    x, y = f"{where}: x_{part}", f"{where}: y_{part}"
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim not in (2, 4) or 0 in images.shape:
        raise DataError(
            f"{x} has shape {images.shape}; expected [N, F], [N, H, W] or [N, H, W, C], not empty"
        )
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{y} has shape {labels.shape}; expected [{len(images)}], as x_{part}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{y} has type {labels.dtype}; expected integers")
    if int(labels.min()) < 0 or int(labels.max()) >= max(len(labels), 1000):
        raise DataError(
            f"{y} holds labels from {labels.min()} to {labels.max()}; expected class numbers from 0"
        )
    if images.dtype == np.uint8:
        pixels: Images = np.ascontiguousarray(images, np.uint8)
    elif np.issubdtype(images.dtype, np.floating):
        pixels = np.ascontiguousarray(images, np.float32)
        for start in range(0, len(pixels), _ROWS):
            block = pixels[start : start + _ROWS]
            if not bool(np.all((block >= 0.0) & (block <= 1.0))):  # False for NaN too
                raise DataError(
                    f"{x} must lie in [0, 1]; scale it, store uint8 pixels, or store the ranges of "
                    "the features as lower and upper"
                )
            forget(pixels)
    else:
        raise DataError(
            f"{x} has type {images.dtype}; expected uint8 pixels, floats in [0, 1], or any numbers "
            "with their ranges as lower and upper"
        )
    return pixels, labels.astype(np.int64, copy=False)
