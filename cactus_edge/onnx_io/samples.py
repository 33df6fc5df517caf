"""Calibration samples in the network's order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cactus_edge import datasets
from cactus_edge.datasets import Images, npz
from cactus_edge.errors import DataError
from cactus_edge.lowering.stages import FloatArray


@dataclass(frozen=True, eq=False)
class Samples:
    """``images`` as the deployed model takes them (NHWC or NF), and the hash of all there were."""

    name: str
    images: Images
    sha256: str

    @property
    def pixels(self) -> bool:
        """Whether they are uint8 pixels."""
        return self.images.dtype == np.uint8


def load(name_or_path: str, count: int) -> Samples:
    """The first ``count`` samples of a data set's training split or of an ``.npz`` file.

    Raises:
        DataError: unknown name, or not a file of samples.
    """
    if name_or_path.endswith(".npz"):
        images = npz.samples(Path(name_or_path))
        digest = hashlib.sha256(f"{images.dtype.str}{images.shape}".encode())
        digest.update(np.ascontiguousarray(images).data)
        return Samples(Path(name_or_path).stem, images[:count], digest.hexdigest())
    data = datasets.load(name_or_path, "train")
    return Samples(data.name, data.images[:count], data.sha256)


def real(samples: Samples, shape: tuple[int, ...]) -> FloatArray:
    """Float64 [N, C, H, W] or [N, F] in [0, 1], for a network that takes ``shape``.

    Raises:
        DataError: samples of another shape, or whose order is not known.
    """
    images = samples.images
    values = images.astype(np.float64) / (255 if samples.pixels else 1)
    own, channels = images.shape[1:], shape[0] if len(shape) == 3 else 1
    if len(shape) == 3 and own == (*shape[1:], channels):
        return values.transpose(0, 3, 1, 2)
    # With one channel, or one pixel, all orders are one.
    flat = len(own) == 1 or own[2] == 1 or own[:2] == (1, 1)
    same = int(np.prod(own)) == int(np.prod(shape))
    if same and flat and (channels == 1 or shape[1:] == (1, 1)):
        return values.reshape(-1, *shape)
    wanted = [*shape[1:], channels] if len(shape) == 3 else list(shape)
    raise DataError(
        f"calibration samples '{samples.name}' have shape {list(own)}, the network takes "
        f"{wanted} (height, width, channels, or features in its own order)"
    )
