from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pytest

from cactus_edge import datasets
from cactus_edge.datasets import published
from cactus_edge.errors import DataError, MissingExtraError

Array = npt.NDArray[np.generic]


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def mnist_files(folder: Path, count: int = 20) -> None:
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        pixels = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))


def arrays(count: int = 20) -> dict[str, Array]:
    source = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for part in ("train", "test"):
        made[f"x_{part}"] = source.random((count, 5)).astype(np.float32)
        made[f"y_{part}"] = np.arange(count) % 3
    return made


def saved(path: Path, made: dict[str, Array]) -> Path:
    np.savez(path, **made)  # type: ignore[arg-type]
    return path


def test_digits_split_is_stratified_and_the_same_everywhere() -> None:
    parts = [datasets.load("digits", split) for split in ("train", "validation", "test")]
    assert [len(part.labels) for part in parts] == [1212, 135, 450]
    counts = np.bincount(parts[2].labels)
    assert counts.min() >= 43 and counts.max() <= 46
    assert parts[2].sha256.startswith("939552f6")
    assert parts[2].images.shape == (450, 8, 8, 1) and parts[2].images.dtype == np.uint8
    assert parts[2].images.max() == 255
    pixels = [part.images.reshape(len(part.images), -1) for part in parts]
    assert sum(len(p) for p in pixels) == 1797
    with pytest.raises(ValueError, match="read-only"):
        parts[0].images[0] = 0


def test_digits_without_scikit_learn_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cactus-edge\[digits\]'"):
        datasets.load("digits", "test")


def test_training_and_validation_share_nothing(tmp_path: Path) -> None:
    made = arrays(50)
    path = saved(tmp_path / "own.npz", made)
    training, held_out = datasets.load_training(path, 0.2)
    assert (len(training.labels), len(held_out.labels)) == (40, 10)
    rows = {row.tobytes() for part in (training, held_out) for row in part.images}
    assert rows == {row.tobytes() for row in made["x_train"]}
    again = datasets.load(path, "validation", 0.2)
    assert again.sha256 == held_out.sha256
    assert (training.name, training.classes, held_out.split) == ("own", 3, "validation")


def test_images_without_channels_get_one(tmp_path: Path) -> None:
    made = arrays()
    for part in ("train", "test"):
        made[f"x_{part}"] = np.zeros((20, 6, 7), np.uint8)
    found = datasets.load(saved(tmp_path / "own.npz", made), "test")
    assert found.images.shape == (20, 6, 7, 1) and found.images.dtype == np.uint8


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("x_test", None, "own.npz: missing x_test; the file holds x_train, y_test, y_train"),
        ("x_train", np.zeros((20, 5, 1, 1, 1)), r"x_train has shape \(20, 5, 1, 1, 1\)"),
        ("x_train", np.zeros((0, 5)), "not empty"),
        ("y_train", np.zeros(19, int), r"y_train has shape \(19,\); expected \[20\]"),
        ("y_train", np.zeros(20), "y_train has type float64; expected integers"),
        ("y_train", np.full(20, -1), "labels from -1 to -1; expected class numbers from 0"),
        ("y_train", np.full(20, 10**6), "labels from 1000000"),
        ("x_train", np.full((20, 5), 1.5), r"x_train must lie in \[0, 1\]"),
        ("x_train", np.full((20, 5), np.nan), r"x_train must lie in \[0, 1\]"),
        ("x_train", np.zeros((20, 5), np.int64), "x_train has type int64; expected uint8"),
        ("x_train", np.zeros((20, 4)), "must agree in everything but the number of samples"),
        ("x_train", np.array([[None] * 5] * 20), "not a readable .npz file of plain arrays"),
    ],
)
def test_wrong_npz_is_named(tmp_path: Path, key: str, value: Array | None, expected: str) -> None:
    made = arrays()
    if value is None:
        del made[key]
    else:
        made[key] = value
    with pytest.raises(DataError, match=expected):
        datasets.load(saved(tmp_path / "own.npz", made), "test")


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.npz: no such file"):
        datasets.load(tmp_path / "nothing.npz", "test")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text.npz: not a readable .npz"):
        datasets.load(tmp_path / "text.npz", "test")
    with pytest.raises(
        DataError,
        match=r"'mnits'; did you mean 'mnist'\? use one of digits, mnist",
    ):
        datasets.load("mnits", "test")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        datasets.load("digits", "dev")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="validation fraction"):
        datasets.load("digits", "train", 1.0)


def test_mnist_files_are_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="does not exist; CACTUS_EDGE_DATA is wrong"):
        datasets.load("mnist", "test")
    mnist_files(tmp_path / "mnist")
    found = datasets.load("mnist", "test")
    assert found.images.shape == (20, 2, 2, 1) and found.images[1, 0, 0, 0] == 4
    images = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    broken = whole[:12] + b"\xff" * 4 + whole[16:]  # inside the compressed stream
    for content in (b"no gzip", gzip.compress(b"short"), whole[:-9], broken):
        images.write_bytes(content)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is not an? (IDX|gzip)"):
            datasets.load("mnist", "test")


def test_downloads_are_checked_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.DATA_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    origin = tmp_path / "origin"
    mnist_files(origin)
    urls = MappingProxyType({"mnist": origin.as_uri() + "/"})
    monkeypatch.setattr(published, "_URLS", urls)
    with pytest.raises(DataError, match=r"has MD5 .* set CACTUS_EDGE_DATA"):
        datasets.load("mnist", "test")
    cache = tmp_path / "home" / ".cache" / "cactus_edge" / "mnist"
    assert not cache.exists() or list(cache.iterdir()) == []
    sums = {
        ("mnist", file.name): hashlib.md5(file.read_bytes()).hexdigest()
        for file in origin.iterdir()
    }
    monkeypatch.setattr(published, "_MD5", MappingProxyType(sums))
    assert len(datasets.load("mnist", "test").labels) == 20
    assert sorted(file.name for file in cache.iterdir()) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    for file in origin.iterdir():
        file.unlink()
    assert len(datasets.load("mnist", "test").labels) == 20  # not fetched again
    with pytest.raises(DataError, match=r"cannot download file://.* set CACTUS_EDGE_DATA"):
        datasets.load("mnist", "train")


def test_cifar10_is_read_from_either_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    folder = tmp_path / "cifar10"
    folder.mkdir()
    source = np.random.default_rng(0)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for batch in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
            records = source.integers(0, 10, (3, 3073), np.uint8)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{batch}.bin")
            member.size = records.size
            archive.addfile(member, io.BytesIO(records.tobytes()))
            part = "test" if batch == "test_batch" else "train"
            made = {f"x_{part}": records[:, 1:].reshape(-1, 3, 32, 32), f"y_{part}": records[:, 0]}
            saved(folder / f"{batch}.npz", made)
    from_npz = datasets.load("cifar10", "train", 0.0)
    for file in folder.glob("*.npz"):
        file.unlink()
    from_archive = datasets.load("cifar10", "train", 0.0)
    assert from_archive.images.shape == (15, 32, 32, 3)
    assert from_archive.sha256 == from_npz.sha256
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz is damaged"):
        datasets.load("cifar10", "test")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_files(data_dir: Path, name: str) -> None:
    training, held_out = datasets.load_training(name)
    test = datasets.load(name, "test")
    assert (len(training.labels), len(held_out.labels), len(test.labels)) == (54000, 6000, 10000)
    assert test.images.shape == (10000, 28, 28, 1)
    assert data_dir.is_dir()


def test_loading_needs_no_torch() -> None:
    program = (
        "import sys; from cactus_edge import datasets; datasets.load('digits', 'test'); "
        "assert not {'torch', 'lightning_fabric'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
