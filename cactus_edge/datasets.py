"""Data sets as arrays: numpy and the standard library only, so that devices can certify too.

Contract: ``load(name_or_path, split)`` returns a ``Dataset`` whose arrays are read-only and whose
``sha256`` names their contents. Images are ``uint8`` pixels in NHWC (or NF for feature vectors),
or ``float32`` in [0, 1] where a user's file holds floats. The validation split is the last
``validation`` fraction of one fixed permutation of the training data, on every machine.

The public data sets are looked up in ``$CACTUS_EDGE_DATA/<name>/``; without that variable they are
kept in ``~/.cache/cactus_edge/<name>/`` and fetched from their publishers, checked by MD5. Nothing
here reads pickles.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import logging
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from cactus_edge import files
from cactus_edge.errors import DataError, MissingExtraError, OutputError

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
Part = Literal["train", "test"]  # as published
Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Arrays = tuple[Images, Labels]

DATA_VARIABLE = "CACTUS_EDGE_DATA"
NAMES: tuple[str, ...] = ("digits", "mnist", "fashion-mnist", "cifar10")
VALIDATION_FRACTION = 0.1
SPLIT_SEED = 20_240_601  # of the held-out permutation and of the digits' test split
DIGITS_TEST_FRACTION = 0.25
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


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


_URLS: Mapping[str, str] = MappingProxyType(
    {
        "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/",
    }
)
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"  # the binary version: the Python version is pickles
_MD5: Mapping[tuple[str, str], str] = MappingProxyType(  # as stated by the publishers
    {
        ("mnist", "train-images-idx3-ubyte.gz"): "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        ("mnist", "train-labels-idx1-ubyte.gz"): "d53e105ee54ea40749a09fcbcd1e9432",
        ("mnist", "t10k-images-idx3-ubyte.gz"): "9fb629c4189551a2d022fa330f9573f3",
        ("mnist", "t10k-labels-idx1-ubyte.gz"): "ec29112dd5afa0611ce80d1b7f02629c",
        ("fashion-mnist", "train-images-idx3-ubyte.gz"): "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        ("fashion-mnist", "train-labels-idx1-ubyte.gz"): "25c81989df183df01b3e8a0aad5dffbe",
        ("fashion-mnist", "t10k-images-idx3-ubyte.gz"): "bef4ecab320f06d8554ea6380940ec79",
        ("fashion-mnist", "t10k-labels-idx1-ubyte.gz"): "bb300cfdad3c16e7a12a480ee83cd310",
        ("cifar10", _CIFAR_ARCHIVE): "c32a1d4ab5d03f1284b67883e8d87530",
    }
)


def load(
    name_or_path: str | Path, split: Split, validation: float = VALIDATION_FRACTION
) -> Dataset:
    """Load one split of a named data set or of a user's ``.npz`` file.

    Args:
        name_or_path: one of ``NAMES``, or the path of an ``.npz`` with ``x_train``, ``y_train``,
            ``x_test`` and ``y_test``.
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
    name, arrays, classes = _read(name_or_path, "test" if split == "test" else "train")
    return _dataset(name, arrays, classes, split, validation)


def load_training(
    name_or_path: str | Path, validation: float = VALIDATION_FRACTION
) -> tuple[Dataset, Dataset]:
    """The training and the validation split, reading the files once; see ``load``."""
    if not 0.0 < validation < 1.0:
        raise DataError(f"the validation fraction must be in (0, 1), got {validation}")
    name, arrays, classes = _read(name_or_path, "train")
    return (
        _dataset(name, arrays, classes, "train", validation),
        _dataset(name, arrays, classes, "validation", validation),
    )


def data_directory(name: str) -> Path:
    """Where the files of the public data set ``name`` are looked up."""
    root = os.environ.get(DATA_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "cactus_edge") / name


def _read(name_or_path: str | Path, part: Part) -> tuple[str, Arrays, int]:
    """Name, arrays and number of classes of one published part."""
    name = str(name_or_path)
    if name in NAMES:
        return name, _READERS[name](part), 10
    if name.endswith(".npz"):
        arrays, classes = _read_npz(Path(name_or_path), part)
        return Path(name_or_path).stem, arrays, classes
    raise DataError(
        f"unknown data set '{name}'; use one of {', '.join(NAMES)} or the path of an .npz file"
    )


def _dataset(name: str, arrays: Arrays, classes: int, split: Split, validation: float) -> Dataset:
    """Select the split, freeze the arrays and hash them."""
    images, labels = arrays
    if split != "test":
        keep = _held_out(len(labels), validation, held_out=split == "validation")
        images, labels = images[keep], labels[keep]
    if len(labels) == 0:
        raise DataError(f"data set '{name}': the {split} split is empty; change validation")
    images.setflags(write=False)
    labels.setflags(write=False)
    return Dataset(name, images, labels, classes, split, _sha256(images, labels))


def _held_out(count: int, fraction: float, *, held_out: bool) -> npt.NDArray[np.int64]:
    """Sorted indices of the held-out (or the remaining) part of ``count`` samples."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    keep = count - round(count * fraction)
    return np.sort(order[keep:] if held_out else order[:keep])


def _sha256(images: Images, labels: Labels) -> str:
    """Hash dtype, shape and bytes of both arrays."""
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --- files: found, or downloaded and checked -----------------------------------------------------


def _file(name: str, file: str) -> bytes:
    """Read one original file of a public data set, fetching it where that is allowed."""
    path = data_directory(name) / file
    if not path.exists():
        if os.environ.get(DATA_VARIABLE):
            raise DataError(f"data set '{name}': {path} does not exist; {DATA_VARIABLE} is wrong")
        _download(name, file, path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data set '{name}': cannot read {path}: {error}") from error


def _download(name: str, file: str, path: Path) -> None:
    """Fetch one original file to ``path``: temporary file, MD5 check, rename."""
    url, expected = _URLS[name] + file, _MD5[name, file]
    logger.info("data set '%s': downloading %s", name, url)
    remedy = f"download it by hand and set {DATA_VARIABLE} to the folder that holds {name}/"
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            content: bytes = response.read()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != expected:
            raise DataError(f"data set '{name}': {url} has MD5 {md5}, not {expected}; {remedy}")
        files.write(path, content, force=True)
    except (OSError, http.client.HTTPException, OutputError) as error:  # URLError is an OSError
        raise DataError(
            f"data set '{name}': cannot download {url} to {path}: {error}; {remedy}"
        ) from error


# --- readers of the public data sets -------------------------------------------------------------


def _read_digits(part: Part) -> Arrays:
    """Scikit-learn's 1,797 handwritten digits, 8x8, with our own stratified test split.

    Pixels 0..16 become round(v * 255 / 16).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", "the data set 'digits'") from error
    values, targets = load_digits(return_X_y=True)
    images = np.rint(np.asarray(values, np.float64) * 255.0 / 16.0).astype(np.uint8)
    images = images.reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int64)
    generator = np.random.default_rng(SPLIT_SEED)
    test = np.zeros(len(labels), np.bool_)
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: round(len(members) * DIGITS_TEST_FRACTION)]] = True
    keep = test if part == "test" else ~test
    return images[keep], labels[keep]


def _read_idx(name: str, file: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one gzipped IDX file of unsigned bytes: magic 0x0800 + dimensions, sizes, bytes."""
    where = data_directory(name) / file
    try:
        content = gzip.decompress(_file(name, file))
    except (OSError, EOFError) as error:  # BadGzipFile is an OSError
        raise DataError(f"data set '{name}': {where} is not a gzip file: {error}") from error
    header = 4 * (dimensions + 1)
    sizes = (
        [int(v) for v in np.frombuffer(content[:header], ">u4")] if len(content) >= header else []
    )
    if not sizes or sizes[0] != 0x0800 + dimensions or len(content) != header + np.prod(sizes[1:]):
        raise DataError(f"data set '{name}': {where} is not an IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes[1:])


def _idx_reader(name: str) -> Callable[[Part], Arrays]:
    """Reader of a data set in MNIST's four files."""

    def read(part: Part) -> Arrays:
        prefix = "t10k" if part == "test" else "train"
        images = _read_idx(name, f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(name, f"{prefix}-labels-idx1-ubyte.gz", 1).astype(np.int64)
        return _checked(str(data_directory(name)), part, images[..., None], labels)

    return read


def _read_cifar10(part: Part) -> Arrays:
    """CIFAR-10 from one ``.npz`` per original batch, or from the original binary archive."""
    batches = ["test_batch"] if part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    folder = data_directory("cifar10")
    if all((folder / f"{batch}.npz").exists() for batch in batches):
        parts = [_arrays(folder / f"{batch}.npz", part) for batch in batches]
        images = np.concatenate([p[0] for p in parts])
        labels = np.concatenate([p[1] for p in parts])
    else:
        images, labels = _cifar10_archive(batches)
    return _checked(str(folder), part, images.transpose(0, 2, 3, 1), labels)


def _cifar10_archive(batches: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Records of 1 label byte and 3072 pixel bytes (channels R, G, B) from the binary archive."""
    path = data_directory("cifar10") / _CIFAR_ARCHIVE
    records: list[bytes] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(_file("cifar10", _CIFAR_ARCHIVE))) as archive:
            for batch in batches:
                member = archive.extractfile(f"cifar-10-batches-bin/{batch}.bin")
                records.append(member.read() if member else b"")
        table = np.frombuffer(b"".join(records), np.uint8).reshape(-1, 3073)
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise DataError(
            f"data set 'cifar10': {path} is damaged: {error}; delete it and run again"
        ) from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]


_READERS: Mapping[str, Callable[[Part], Arrays]] = MappingProxyType(
    {
        "digits": _read_digits,
        "mnist": _idx_reader("mnist"),
        "fashion-mnist": _idx_reader("fashion-mnist"),
        "cifar10": _read_cifar10,
    }
)


# --- .npz files, checked -------------------------------------------------------------------------


def _arrays(path: Path, part: Part) -> tuple[npt.NDArray[np.generic], ...]:
    """``x_<part>`` and ``y_<part>`` of an ``.npz`` file, unchecked."""
    keys = (f"x_{part}", f"y_{part}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise DataError(
                    f"{path}: missing {' and '.join(missing)}; the file holds "
                    f"{', '.join(sorted(file.files)) or 'nothing'}"
                )
            return tuple(file[key] for key in keys)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable .npz file of plain arrays: {error}; "
            "write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        ) from error


def _read_npz(path: Path, part: Part) -> tuple[Arrays, int]:
    """A user's file: the wanted part, and the number of classes over both parts."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    both = {p: _checked(str(path), p, *_arrays(path, p)) for p in ("train", "test")}
    train, test = both["train"], both["test"]
    if train[0].shape[1:] != test[0].shape[1:] or train[0].dtype != test[0].dtype:
        raise DataError(
            f"{path}: x_train {train[0].shape} {train[0].dtype} and x_test {test[0].shape} "
            f"{test[0].dtype} must agree in everything but the number of samples"
        )
    classes = 1 + max(int(train[1].max()), int(test[1].max()))
    if classes < 2:
        raise DataError(f"{path}: all labels are 0; a classifier needs two classes or more")
    return (train if part == "train" else test), classes


def _checked(
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
        checked: Images = np.ascontiguousarray(images, np.uint8)
    elif np.issubdtype(images.dtype, np.floating):
        checked = np.ascontiguousarray(images, np.float32)
        if not bool(np.all((checked >= 0.0) & (checked <= 1.0))):  # False for NaN too
            raise DataError(f"{x} must lie in [0, 1]; scale it, or store uint8 pixels")
    else:
        raise DataError(f"{x} has type {images.dtype}; expected uint8 pixels or floats in [0, 1]")
    return checked, labels.astype(np.int64)
