"""NASA's turbofan engines (C-MAPSS, FD001) as a health classification task.

Saxena et al. (2008): 100 simulated engines run to failure for training and 100 that are stopped
before it for testing, 21 sensors read once a flight. A sample is a window of the last ``CYCLES``
flights, [CYCLES, 1, 14]: rows are time, channels the sensors that change. Its label follows from
the flights that are left after the window: 0 healthy (more than ``HEALTHY``), 1 degrading, 2
critical (``CRITICAL`` or less). Every window of an engine is a sample, and an engine is in one
split only.

Each sensor is scaled by its smallest and largest reading in the engines that no validation
fraction up to one half holds out, clipped to [0, 1] and stored as a pixel. So a radius of k/255 is
k levels, and means that fraction of each sensor's range.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cactus_edge.datasets.common import DATA_VARIABLE, Part, Source, data_directory, order
from cactus_edge.datasets.packed import unpacked
from cactus_edge.errors import DataError

CYCLES = 30
CRITICAL = 30
HEALTHY = 125
SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
"""Of 1 to 21; the others keep one or two values in all flights of FD001."""

_COLUMNS = 26  # engine, cycle, 3 settings, 21 sensors
_FIRST_SENSOR = 5
_FOLDERS = ("turbofan", "cmapss")
_LARGEST_FILE = 1 << 25  # bytes of text; FD001's have 3.5 million

Table = npt.NDArray[np.float64]


def read(part: Part) -> Source:
    """One part of FD001: uint8 [N, CYCLES, 1, 14]; groups are engines.

    Raises:
        DataError: a file is missing, damaged, or not what the data set's description says.
    """
    training = [e for e in _engines("train_FD001.txt") if len(e) >= CYCLES]
    if not training:
        raise DataError(f"data set 'turbofan': no engine has {CYCLES} flights in the train file")
    lower, upper = _sensor_ranges(training)
    engines = training if part == "train" else _engines("test_FD001.txt")
    left = np.zeros(len(engines), np.int64) if part == "train" else _remaining(len(engines))
    images: list[npt.NDArray[np.uint8]] = []
    flights: list[npt.NDArray[np.int64]] = []
    for engine, after in zip(engines, left.tolist(), strict=True):
        scaled = np.clip((engine[:, _columns()] - lower) / (upper - lower), 0.0, 1.0)
        pixels = np.rint(scaled * 255.0).astype(np.uint8)
        count = max(0, len(pixels) - CYCLES + 1)  # an engine with fewer flights has no window
        index = np.arange(count)[:, None] + np.arange(CYCLES)
        images.append(pixels[index][:, :, None, :])
        flights.append(after + np.arange(count)[::-1])
    remaining = np.concatenate(flights)
    if not len(remaining):
        raise DataError(f"data set 'turbofan': no engine has {CYCLES} flights in the test file")
    groups = np.repeat(np.arange(len(engines)), [len(f) for f in flights])
    labels = np.where(remaining > HEALTHY, 0, np.where(remaining > CRITICAL, 1, 2))
    return Source(np.concatenate(images), labels.astype(np.int64), 3, groups)


def _columns() -> list[int]:
    return [_FIRST_SENSOR + sensor - 1 for sensor in SENSORS]


def _sensor_ranges(engines: list[Table]) -> tuple[Table, Table]:
    """Smallest and largest reading of each sensor, float64 [14], in half of the engines."""
    chosen = order(len(engines))[: max(1, len(engines) // 2)]
    readings = np.concatenate([engines[i][:, _columns()] for i in chosen])
    lower, upper = readings.min(axis=0), readings.max(axis=0)
    if not bool((lower < upper).all()):
        sensor = SENSORS[int(np.argmin(upper > lower))]
        raise DataError(f"data set 'turbofan': sensor {sensor} never changes; this is not FD001")
    return lower, upper


def _engines(file: str) -> list[Table]:
    """The rows of each engine, float64 [flights, 26], checked."""
    path, table = _table(file)
    if table.shape[1] != _COLUMNS:
        raise DataError(f"{path}: {table.shape[1]} columns; C-MAPSS files have {_COLUMNS}")
    new = np.flatnonzero(np.diff(table[:, 0], prepend=0.0))
    engines = np.split(table, new[1:])
    for number, engine in enumerate(engines, start=1):
        expected = np.arange(1, len(engine) + 1)
        if engine[0, 0] != number or not np.array_equal(engine[:, 1], expected):
            raise DataError(
                f"{path}: engine {number} is missing, or its flights are not 1, 2, 3, ...; "
                "use the original file"
            )
    return engines


def _remaining(engines: int) -> npt.NDArray[np.int64]:
    """Flights that each test engine has left behind its last row, int64 [engines]."""
    path, table = _table("RUL_FD001.txt")
    left = table.astype(np.int64)
    if table.shape != (engines, 1) or not np.array_equal(left, table) or left.min() < 0:
        raise DataError(f"{path}: expected one whole number for each of the {engines} test engines")
    return left[:, 0]


def _table(file: str) -> tuple[Path, Table]:
    """Path and numbers of one file, [rows, columns], plain or gzipped."""
    folders = [data_directory(name) for name in _FOLDERS]
    candidates = [f / name for f in folders for name in (file, f"{file}.gz")]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise DataError(
            f"data set 'turbofan': neither {folders[0]} nor {folders[1]} holds {file}; get "
            "FD001 of the Turbofan Engine Degradation Simulation Data Set from NASA's prognostics "
            f"data repository, and set {DATA_VARIABLE} to the folder that holds turbofan/"
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        if path.suffix == ".gz":
            content = unpacked(content)
        decoded = content.decode("ascii")
        if not decoded.strip() or len(content) > _LARGEST_FILE:
            raise ValueError("empty, or far too long")
        text = io.StringIO(decoded)
        table = np.loadtxt(text, dtype=np.float64, comments=None, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a table of numbers: {error}; use the original file"
        ) from error
    if not bool(np.isfinite(table).all()) or float(np.abs(table).max()) > 1e9:
        raise DataError(f"{path}: holds values that are no sensor readings; use the original file")
    return path, table
