"""TinyImageNet in its original layout: 200 classes of 64x64 colour photographs, as JPEG.

    train/<class>/images/*.JPEG     500 of each class
    val/images/*.JPEG               10,000; val/val_annotations.txt names their classes

Labels are the ranks of the classes' names. What is published as the validation part serves as the
test part, because the labels of the original test part are not public. Grey photographs get three
equal channels. Decoding needs Pillow; its last bits depend on the version of its JPEG library, and
so does the hash of the data.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from cactus_edge.datasets.common import DATA_VARIABLE, Part, Source, data_directory
from cactus_edge.errors import DataError, MissingExtraError

SIDE = 64  # pixels
_FOLDERS = ("tiny-imagenet", "tiny-imagenet-200")
_ANNOTATIONS = "val_annotations.txt"


def read(part: Part) -> Source:
    """One part: uint8 [N, 64, 64, 3].

    Raises:
        MissingExtraError: Pillow is not installed.
        DataError: no such folder, another layout, or a photograph that cannot be decoded.
    """
    library = _pillow()
    root = _root()
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: no folders of classes; unpack the original archive")
    ranks = {name: rank for rank, name in enumerate(classes)}
    listed = _training(root, ranks) if part == "train" else _validation(root, ranks)
    images = np.empty((len(listed), SIDE, SIDE, 3), np.uint8)
    for index, (path, _) in enumerate(listed):
        images[index] = _decoded(library, path)
    labels = np.array([label for _, label in listed], np.int64)
    return Source(images, labels, len(classes))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "images", "the data set 'tiny-imagenet'") from error
    return Image


def _root() -> Path:
    folders = [data_directory(name) for name in _FOLDERS]
    for folder in folders:
        if (folder / "train").is_dir():
            return folder
    raise DataError(
        f"data set 'tiny-imagenet': neither {folders[0]} nor {folders[1]} holds train/; unpack "
        f"tiny-imagenet-200.zip and set {DATA_VARIABLE} to the folder that holds it"
    )


def _training(root: Path, ranks: dict[str, int]) -> list[tuple[Path, int]]:
    """Path and label of every training photograph, in order of class and name."""
    listed: list[tuple[Path, int]] = []
    for name, rank in ranks.items():
        found = sorted((root / "train" / name / "images").glob("*.JPEG"))
        if not found:
            raise DataError(f"{root / 'train' / name}: holds no images/*.JPEG")
        listed += [(path, rank) for path in found]
    return listed


def _validation(root: Path, ranks: dict[str, int]) -> list[tuple[Path, int]]:
    """Path and label of every line of the annotations: file, class and four corners."""
    path = root / "val" / _ANNOTATIONS
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the annotations: {error}") from error
    listed: list[tuple[Path, int]] = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in ranks or Path(fields[0]).name != fields[0]:
            raise DataError(
                f"{path}: line {number} names no file of val/images and class of train/"
            )
        listed.append((root / "val" / "images" / fields[0], ranks[fields[1]]))
    if not listed:
        raise DataError(f"{path}: holds no annotations")
    return listed


def _decoded(library: ModuleType, path: Path) -> npt.NDArray[np.uint8]:
    """One photograph, uint8 [64, 64, 3]. Its size is checked before anything is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with library.open(path, formats=("JPEG",)) as image:
                if image.size != (SIDE, SIDE):
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, not {SIDE}")
                return np.asarray(image.convert("RGB"), np.uint8)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Warning,
        library.DecompressionBombError,
    ) as error:
        raise DataError(f"{path}: not a photograph of TinyImageNet: {error}") from error
