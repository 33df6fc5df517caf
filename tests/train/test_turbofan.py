"""Engines become labelled windows; splits keep engines apart; other files are refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets
from cactus_edge.datasets import common, turbofan
from cactus_edge.errors import DataError
from cactus_edge.train import parse_recipe, train

RECIPE = """
threads = 1
[data]
name = "turbofan"
validation = 0.25
[network]
name = "ds-cnn"
width = 0.125
[objective]
epsilon = 0.01
[optimizer]
epochs = 1
batch_size = 64
"""


def rows(lengths: list[int], seed: int) -> np.ndarray:
    """Engines whose sensors drift with their age."""
    source = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for engine, length in enumerate(lengths, start=1):
        flights = np.arange(1, length + 1)
        sensors = 500 + flights[:, None] + source.normal(size=(length, 21))
        settings = np.zeros((length, 3))
        parts.append(np.column_stack([np.full(length, engine), flights, settings, sensors]))
    return np.concatenate(parts)


def text(table: np.ndarray) -> bytes:
    return "".join(" ".join(f"{v:.10g}" for v in row) + "  \n" for row in table).encode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    made = tmp_path / "turbofan"
    made.mkdir()
    (made / "train_FD001.txt").write_bytes(text(rows([180, 60, 31, 200, 90, 29, 100, 140], 0)))
    (made / "test_FD001.txt.gz").write_bytes(gzip.compress(text(rows([40, 35, 30], 1)), mtime=0))
    (made / "RUL_FD001.txt").write_bytes(b"150 \n31 \n0 \n")
    return made


def test_windows_and_labels(folder: Path) -> None:
    assert folder.is_dir()
    found = datasets.load("turbofan", "test")
    assert found.images.shape == (11 + 6 + 1, 30, 1, 14) and found.images.dtype == np.uint8
    # Engine 1: 160 to 150 flights left; engine 2: 36 to 31; engine 3 has reached its end.
    assert found.labels.tolist() == [0] * 11 + [1] * 6 + [2]
    assert found.classes == 3
    first = found.images[0, :, 0, :].astype(int)
    assert np.array_equal(first[1:], found.images[1, :-1, 0, :])  # the window moves on by a flight
    assert (first[-1] > first[0]).all()
    whole = datasets.load("turbofan", "train", 0.0)
    assert len(whole.labels) == 151 + 31 + 2 + 171 + 61 + 0 + 71 + 111
    assert np.bincount(whole.labels)[2] == 2 + 6 * 31  # each other engine's last 31 windows
    assert len(set(whole.images[whole.labels == 2][:, -1, 0, 0])) > 1


def test_engines_stay_together_and_scaling_does_not_see_validation(folder: Path) -> None:
    training, held_out = datasets.load_training("turbofan", 0.4)
    kept = common.order(7)  # the engine without a window counts for nothing
    lengths = np.array([151, 31, 2, 171, 61, 71, 111])
    numbers = np.array([1, 2, 3, 4, 5, 7, 8])[kept[4:]]
    assert len(training.labels) == lengths[kept[:4]].sum()
    assert len(held_out.labels) == lengths[kept[4:]].sum()
    assert training.images.min() == 0 and training.images.max() == 255
    # Readings of engines that are held out change nothing in the training split or the test part.
    table = np.loadtxt(folder / "train_FD001.txt")
    test = datasets.load("turbofan", "test")
    for engine in numbers:
        table[table[:, 0] == engine, 5:] *= 1.5
    (folder / "train_FD001.txt").write_bytes(text(table))
    assert datasets.load("turbofan", "train", 0.4).sha256 == training.sha256
    assert datasets.load("turbofan", "test").sha256 == test.sha256
    changed = datasets.load("turbofan", "validation", 0.4)
    assert changed.sha256 != held_out.sha256 and changed.images.max() == 255


def test_a_network_trains_on_windows(folder: Path, tmp_path: Path) -> None:
    assert folder.is_dir()
    summary = train(parse_recipe(RECIPE), tmp_path / "run", device="cpu")
    assert 0 <= summary.members[0].test.certified <= summary.members[0].test.standard <= 1


def replaced(folder: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    (folder / file).write_bytes(change((folder / file).read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("train_FD001.txt", lambda _: b"", "train_FD001.txt: not a table of numbers: empty"),
        ("train_FD001.txt", lambda _: b"<html>\n", "train_FD001.txt: not a table of numbers"),
        ("train_FD001.txt", lambda _: b"\xff\xfe\x00", "train_FD001.txt: not a table of numbers"),
        ("train_FD001.txt", lambda c: c[: len(c) // 2] + b"1 2\n", "not a table of numbers"),
        ("train_FD001.txt", lambda c: c[c.index(b"\n") + 1 :], "engine 1 is missing, or its"),
        ("train_FD001.txt", lambda c: c.replace(b" 0 0 0 ", b" 0 nan 0 "), "no sensor readings"),
        ("train_FD001.txt", lambda c: c.replace(b" 0 0 0 ", b" 0 0 "), "25 columns; .* have 26"),
        ("test_FD001.txt.gz", lambda _: b"no gzip", "test_FD001.txt.gz: not a table of numbers"),
        ("test_FD001.txt.gz", lambda c: c[:-20], "test_FD001.txt.gz: not a table of numbers"),
        ("test_FD001.txt.gz", lambda c: c[:40] + b"\xff" + c[41:], "not a table of numbers"),
        ("RUL_FD001.txt", lambda _: b"1\n2\n", "one whole number for each of the 3 test engines"),
        ("RUL_FD001.txt", lambda _: b"1\n2\n2.5\n", "one whole number for each"),
        ("RUL_FD001.txt", lambda _: b"1\n2\n-1\n", "one whole number for each"),
    ],
)
def test_other_files_are_refused(
    folder: Path, file: str, change: Callable[[bytes], bytes], expected: str
) -> None:
    replaced(folder, file, change)
    with pytest.raises(DataError, match=expected):
        datasets.load("turbofan", "test")


def test_constant_sensors_and_short_engines_are_refused(folder: Path) -> None:
    (folder / "test_FD001.txt.gz").write_bytes(gzip.compress(text(rows([5, 6, 7], 1))))
    with pytest.raises(DataError, match="no engine has 30 flights in the test file"):
        datasets.load("turbofan", "test")
    (folder / "train_FD001.txt").write_bytes(text(rows([5, 6, 7], 1)))
    with pytest.raises(DataError, match="no engine has 30 flights in the train file"):
        datasets.load("turbofan", "test")
    table = rows([60, 60], 0)
    table[:, 5 + 6] = 7.0
    (folder / "train_FD001.txt").write_bytes(text(table))
    with pytest.raises(DataError, match="sensor 7 never changes; this is not FD001"):
        datasets.load("turbofan", "train")


def test_long_texts_are_not_read_to_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbofan, "_LARGEST_FILE", 1 << 20)
    bomb = gzip.compress(b"0 " * (1 << 23), mtime=0)
    (folder / "test_FD001.txt.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="far too long"):
        datasets.load("turbofan", "test")


def test_absent_files_say_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"train_FD001.txt; get FD001 .* set CACTUS_EDGE_DATA"):
        datasets.load("turbofan", "test")


def test_the_published_engines(data_dir: Path) -> None:
    if not any((data_dir / name).is_dir() for name in ("turbofan", "cmapss")):
        pytest.skip("no turbofan data")
    training, held_out = datasets.load_training("turbofan")
    test = datasets.load("turbofan", "test")
    assert len(training.labels) + len(held_out.labels) == 20_631 - 100 * 29
    assert len(test.labels) == 13_096 - 100 * 29
    assert (np.bincount(held_out.labels, minlength=3) > 0).all()
    assert np.bincount(training.labels)[2] == 90 * 31  # windows with 0 to 30 flights left
