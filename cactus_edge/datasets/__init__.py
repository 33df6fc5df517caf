"""Data sets as arrays: numpy and the standard library only, so that devices can certify too.

Contract: ``load(name_or_path, split)`` returns a ``Dataset`` whose arrays are read-only and whose
``sha256`` names their contents. Images are ``uint8`` pixels in NHWC (or NF for feature vectors),
or ``float32`` in [0, 1] where a user's file holds floats. The validation split is the last
``validation`` fraction of one fixed permutation of the training data, on every machine; where
samples come in groups (windows of one engine), of the groups.

A new data set is a reader in a file of its own and one line in ``READERS``. The public data sets
are looked up in ``$CACTUS_EDGE_DATA/<name>/``; without that variable they are kept in
``~/.cache/cactus_edge/<name>/``. Nothing here reads pickles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cactus_edge.datasets import npz, published, tiny_imagenet, turbofan
from cactus_edge.datasets.common import (
    DATA_VARIABLE,
    Images,
    Labels,
    Part,
    Source,
    Split,
    data_directory,
    order,
)
from cactus_edge.datasets.mapped import blocks, mapping
from cactus_edge.errors import DataError, meant

__all__ = [
    "DATA_VARIABLE",
    "NAMES",
    "READERS",
    "VALIDATION_FRACTION",
    "Dataset",
    "Images",
    "Labels",
    "Split",
    "check_unchanged",
    "data_directory",
    "load",
    "load_training",
]

VALIDATION_FRACTION = 0.1

READERS: Mapping[str, Callable[[Part], Source]] = MappingProxyType(
    {
        "digits": published.digits,
        "mnist": published.mnist,
        "fashion-mnist": published.fashion_mnist,
        "cifar10": published.cifar10,
        "tiny-imagenet": tiny_imagenet.read,
        "turbofan": turbofan.read,
    }
)
NAMES: tuple[str, ...] = tuple(READERS)


@dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
        name: the data set's name, or the file's stem.
        images: [N, H, W, C] or [N, F]; uint8 pixels or float32 in [0, 1]; read-only.
        labels: [N], int64, from 0 to ``classes - 1``; read-only.
        classes: how many classes the data set has.
        split: which split this is.
        sha256: of dtype, shape and bytes of images and labels.
    """

    name: str
    images: Images
    labels: Labels
    classes: int
    split: Split
    sha256: str


def load(
    name_or_path: str | Path, split: Split, validation: float = VALIDATION_FRACTION
) -> Dataset:
    """Load one split of a named data set or of a user's ``.npz`` file.

    Args:
        name_or_path: one of ``NAMES``, or the path of an ``.npz`` with ``x_train``, ``y_train``,
            ``x_test`` and ``y_test``; see ``npz``.
        split: ``train`` (without the held-out part), ``validation`` (the held-out part) or
            ``test``.
        validation: fraction of the training data that is held out, in [0, 1).

    Raises:
        DataError: unknown name, missing or damaged file, wrong keys, shapes, types or values.
    """
    if split not in ("train", "validation", "test"):
        raise DataError(f"unknown split '{split}'; use train, validation or test")
    if not 0.0 <= validation < 1.0:
        raise DataError(f"the validation fraction must be in [0, 1), got {validation}")
    name, source = _read(name_or_path, "test" if split == "test" else "train")
    return _dataset(name, source, split, validation)


def load_training(
    name_or_path: str | Path, validation: float = VALIDATION_FRACTION
) -> tuple[Dataset, Dataset]:
    """The training and the validation split, reading the files once; see ``load``."""
    if not 0.0 < validation < 1.0:
        raise DataError(f"the validation fraction must be in (0, 1), got {validation}")
    name, source = _read(name_or_path, "train")
    return (
        _dataset(name, source, "train", validation),
        _dataset(name, source, "validation", validation),
    )


def _read(name_or_path: str | Path, part: Part) -> tuple[str, Source]:
    """Name and contents of one published part."""
    name = str(name_or_path)
    if name in READERS:
        return name, READERS[name](part)
    if name.endswith(".npz"):
        return Path(name_or_path).stem, npz.read(Path(name_or_path), part)
    raise DataError(
        f"unknown data set '{name}'{meant(name, NAMES)} use one of {', '.join(NAMES)} "
        "or the path of an .npz file"
    )


def _dataset(name: str, source: Source, split: Split, validation: float) -> Dataset:
    """Select the split, freeze the arrays and hash them."""
    images, labels = source.images, source.labels
    if split != "test":
        groups = np.arange(len(labels)) if source.groups is None else source.groups
        keep = _held_out(groups, validation, held_out=split == "validation")
        images, labels = images[keep], labels[keep]
    if len(labels) == 0:
        raise DataError(f"data set '{name}': the {split} split is empty; change validation")
    images.setflags(write=False)
    labels.setflags(write=False)
    return Dataset(name, images, labels, source.classes, split, _sha256(images, labels))


def check_unchanged(data: Dataset) -> None:
    """That a file whose arrays are mapped still holds what ``sha256`` names.

    Raises:
        DataError: it was changed meanwhile.
    """
    mapped = any(mapping(array) is not None for array in (data.images, data.labels))
    if mapped and _sha256(data.images, data.labels) != data.sha256:
        raise DataError(f"data set '{data.name}': its file was changed while it was being used")


def _held_out(groups: Labels, fraction: float, *, held_out: bool) -> npt.NDArray[np.bool_]:
    """Bool [N]: the samples of the groups that are held out (or that remain)."""
    names, member = np.unique(groups, return_inverse=True)
    ranks = order(len(names))
    keep = len(names) - round(len(names) * fraction)
    chosen = np.zeros(len(names), np.bool_)
    chosen[ranks[keep:] if held_out else ranks[:keep]] = True
    return chosen[member]


def _sha256(images: Images, labels: Labels) -> str:
    """Hash dtype, shape and bytes of both arrays."""
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        for block in blocks(array):
            digest.update(block)
    return digest.hexdigest()
