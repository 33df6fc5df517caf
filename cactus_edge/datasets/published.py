"""Digits, MNIST, Fashion-MNIST and CIFAR-10, from the files that their publishers give.

Files are looked up in ``data_directory``; without ``$CACTUS_EDGE_DATA`` they are downloaded there
once and checked by MD5.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import math
import os
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cactus_edge import files
from cactus_edge.datasets.common import (
    DATA_VARIABLE,
    SPLIT_SEED,
    Arrays,
    Part,
    Source,
    checked,
    data_directory,
)
from cactus_edge.datasets.npz import arrays
from cactus_edge.datasets.packed import members, unpacked
from cactus_edge.errors import DataError, MissingExtraError, OutputError

logger = logging.getLogger(__name__)

CLASSES = 10  # of each of them
DIGITS_TEST_FRACTION = 0.25
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte

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


def _digits(part: Part) -> Arrays:
    """Scikit-learn's 1,797 handwritten digits, 8x8, with our own stratified test split.

    Pixels 0..16 become round(v * 255 / 16).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "digits", "the data set 'digits'") from error
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
        content = unpacked(_file(name, file))
    except ValueError as error:
        raise DataError(f"data set '{name}': {where} is not a gzip file: {error}") from error
    header = 4 * (dimensions + 1)
    sizes = (
        [int(v) for v in np.frombuffer(content[:header], ">u4")] if len(content) >= header else []
    )
    whole = header + math.prod(sizes[1:])
    empty = 0 in sizes  # whatever the other sizes are, which NumPy may find too large
    if not sizes or empty or sizes[0] != 0x0800 + dimensions or len(content) != whole:
        raise DataError(f"data set '{name}': {where} is not an IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes[1:])


def _idx_reader(name: str) -> Callable[[Part], Arrays]:
    """Reader of a data set in MNIST's four files."""

    def read(part: Part) -> Arrays:
        prefix = "t10k" if part == "test" else "train"
        images = _read_idx(name, f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(name, f"{prefix}-labels-idx1-ubyte.gz", 1).astype(np.int64)
        return checked(str(data_directory(name)), part, images[..., None], labels)

    return read


def _cifar10(part: Part) -> Arrays:
    """CIFAR-10 from one ``.npz`` per original batch, or from the original binary archive."""
    batches = ["test_batch"] if part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    folder = data_directory("cifar10")
    if all((folder / f"{batch}.npz").exists() for batch in batches):
        parts = [arrays(folder / f"{batch}.npz", part) for batch in batches]
        images = np.concatenate([p[0] for p in parts])
        labels = np.concatenate([p[1] for p in parts])
    else:
        images, labels = _cifar10_archive(batches)
    return checked(str(folder), part, images.transpose(0, 2, 3, 1), labels)


def _cifar10_archive(batches: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Records of 1 label byte and 3072 pixel bytes (channels R, G, B) from the binary archive."""
    path = data_directory("cifar10") / _CIFAR_ARCHIVE
    names = [f"cifar-10-batches-bin/{batch}.bin" for batch in batches]
    try:
        found = members(unpacked(_file("cifar10", _CIFAR_ARCHIVE)), names)
        table = np.frombuffer(b"".join(found[name] for name in names), np.uint8).reshape(-1, 3073)
    except ValueError as error:
        raise DataError(
            f"data set 'cifar10': {path} is damaged: {error}; delete it and run again"
        ) from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]


def _reader(read: Callable[[Part], Arrays]) -> Callable[[Part], Source]:
    """The same with the number of classes."""
    return lambda part: Source(*read(part), CLASSES)


digits = _reader(_digits)
mnist = _reader(_idx_reader("mnist"))
fashion_mnist = _reader(_idx_reader("fashion-mnist"))
cifar10 = _reader(_cifar10)
