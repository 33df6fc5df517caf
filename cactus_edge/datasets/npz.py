"""A user's own images, tables and windows: one ``.npz`` file of plain arrays.

    x_train, x_test   [N, H, W], [N, H, W, C] or [N, F]
    y_train, y_test   [N], integers from 0: class numbers
    lower, upper      the range of each feature; optional, both or none

Without ranges, ``x`` holds uint8 pixels or floats in [0, 1]. With them it may hold any numbers
within its ranges, and becomes (x - lower) / (upper - lower) in float32. The two have any shape that
spreads over a sample: one number, one for each feature [F], one for each channel [C] or one for
each element. A radius is then a fraction of each feature's range.

Large arrays of an archive that is not packed stay in the file, see ``mapped``: ``certify`` takes
any number of uint8 pixels or of float32 in [0, 1] in bounded memory.
"""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cactus_edge.datasets.common import Arrays, Images, Part, Source, checked
from cactus_edge.datasets.mapped import mapped
from cactus_edge.errors import DataError, shortened

_LARGEST_FACTOR = 100  # packed images of one colour reach it, and little else
_SPARE = 1 << 25  # bytes
_SHOWN = 20
_ROWS = 4096

Array = npt.NDArray[np.generic]
Ranges = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

# What damaged archives and headers raise; the MemoryError is that of a header with a huge shape.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RuntimeError,  # encrypted, or compressed in an unknown way
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
)


def read(path: Path, part: Part) -> Source:
    """The wanted part of a user's file; the number of classes is that of both parts.

    Raises:
        DataError: no such file, damaged, or wrong keys, shapes, types or values.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file")
    ranges = _ranges(path)
    both = {p: _part(path, p, ranges) for p in ("train", "test")}
    train, test = both["train"], both["test"]
    if train[0].shape[1:] != test[0].shape[1:] or train[0].dtype != test[0].dtype:
        raise DataError(
            f"{path}: x_train {train[0].shape} {train[0].dtype} and x_test {test[0].shape} "
            f"{test[0].dtype} must agree in everything but the number of samples"
        )
    classes = 1 + max(int(train[1].max()), int(test[1].max()))
    if classes < 2:
        raise DataError(f"{path}: all labels are 0; a classifier needs two classes or more")
    return Source(*both[part], classes)


def samples(path: Path) -> Images:
    """Samples without labels: ``x_train`` of an ``.npz`` file, or else ``x``, as ``read`` has them.

    Raises:
        DataError: no such file, damaged, neither of them, or wrong shapes, types or values.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file")
    ranges = _ranges(path)
    found = _members(path, ("x_train",), optional=True) or _members(path, ("x",))
    x = found[0] if ranges is None else _scaled(f"{path}: x", found[0], ranges)
    return checked(str(path), "train", x, np.zeros(len(x), np.int64))[0]


def arrays(path: Path, part: Part) -> tuple[Array, ...]:
    """``x_<part>`` and ``y_<part>`` of an ``.npz`` file, unchecked."""
    return _members(path, (f"x_{part}", f"y_{part}"))


def _members(path: Path, keys: tuple[str, ...], *, optional: bool = False) -> tuple[Array, ...]:
    """The named arrays; none where they are optional and all missing."""
    try:
        with path.open("rb") as stream:  # ours, so that it is closed whatever goes wrong
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path}: holds one array without a name; use numpy.savez")
            names = list(file.files)
            missing = [key for key in keys if key not in names]
            if optional and len(missing) == len(keys):
                return ()
            if missing:
                raise DataError(
                    f"{path}: missing {' and '.join(missing)}; the file holds "
                    f"{shortened(', '.join(sorted(names[:_SHOWN]))) or 'nothing'}"
                )
            _check_unpacked(path, file.zip, keys)
            found = ((key, mapped(path, file.zip, f"{key}.npy")) for key in keys)
            return tuple(np.asarray(file[key]) if x is None else x for key, x in found)
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{path}: not a readable .npz file of plain arrays: {shortened(error)}; "
            "write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        ) from error


def _check_unpacked(path: Path, archive: zipfile.ZipFile, keys: tuple[str, ...]) -> None:
    """Refuse what a small file unpacks to without end; whatever is read is at most that large."""
    total = sum(archive.getinfo(f"{key}.npy").file_size for key in keys)
    most = _LARGEST_FACTOR * path.stat().st_size + _SPARE
    if total > most:
        raise DataError(
            f"{path}: unpacks to {total} bytes, over {most}; write it with numpy.savez, unpacked"
        )


def _ranges(path: Path) -> Ranges | None:
    """``lower`` and ``upper``, float64, where the file has them."""
    found = _members(path, ("lower", "upper"), optional=True)
    if not found:
        return None
    for name, values in zip(("lower", "upper"), found, strict=True):
        if not _numeric(values) or not bool(np.isfinite(values.astype(np.float64)).all()):
            raise DataError(f"{path}: {name} must hold finite numbers")
    lower, upper = (values.astype(np.float64) for values in found)
    if lower.shape != upper.shape:
        raise DataError(f"{path}: lower {lower.shape} and upper {upper.shape} differ in shape")
    if not bool((lower < upper).all()):
        raise DataError(
            f"{path}: upper must be above lower in every feature; leave constant features out"
        )
    return lower, upper


def _part(path: Path, part: Part, ranges: Ranges | None) -> Arrays:
    x, y = arrays(path, part)
    if ranges is not None:
        x = _scaled(f"{path}: x_{part}", x, ranges)
    return checked(str(path), part, x, y)


def _scaled(where: str, x: Array, ranges: Ranges) -> npt.NDArray[np.float32]:
    """``x`` as fractions of its ranges."""
    if not _numeric(x):
        raise DataError(f"{where} has type {x.dtype}; expected numbers")
    lower, upper = ranges
    try:
        fits = np.broadcast_shapes(x.shape[1:], lower.shape) == x.shape[1:]
    except ValueError:
        fits = False
    if not fits:
        raise DataError(
            f"{where} has shape {x.shape}, over whose samples lower and upper {lower.shape} do not "
            "spread; give one number, or one for each feature"
        )
    scaled = np.empty(x.shape, np.float32)
    for start in range(0, len(x), _ROWS):  # float64 takes eight times the room of pixels
        values = x[start : start + _ROWS].astype(np.float64)
        outside = ~((values >= lower) & (values <= upper))  # True for NaN too
        if bool(outside.any()):
            first = tuple(int(i) for i in np.argwhere(outside)[0])
            raise DataError(
                f"{where} holds {values[first]:g} at {[start + first[0], *first[1:]]}, outside "
                "lower..upper; widen the range, or clip the data"
            )
        scaled[start : start + _ROWS] = (values - lower) / (upper - lower)
    return scaled


def _numeric(values: Array) -> bool:
    return np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)
