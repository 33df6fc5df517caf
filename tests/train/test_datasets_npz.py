"""Files of one's own: ranges of features, the example of the documentation, damaged files."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cactus_edge import datasets
from cactus_edge.datasets import mapped
from cactus_edge.errors import DataError
from cactus_edge.train import load_recipe, train

Array = npt.NDArray[np.generic]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "training.md"


def table(count: int = 20, features: int = 5) -> dict[str, Array]:
    source = np.random.default_rng(0)
    lower = np.linspace(-3.0, 1e4, features)
    upper = lower + np.linspace(1e-3, 5e3, features)
    made: dict[str, Array] = {"lower": lower, "upper": upper}
    for part in ("train", "test"):
        made[f"x_{part}"] = lower + source.random((count, features)) * (upper - lower)
        made[f"y_{part}"] = np.arange(count) % 3
    return made


def saved(path: Path, made: dict[str, Array]) -> Path:
    np.savez(path, **made)  # type: ignore[arg-type]
    return path


def test_features_become_fractions_of_their_ranges(tmp_path: Path) -> None:
    made = table()
    found = datasets.load(saved(tmp_path / "own.npz", made), "test")
    assert found.images.dtype == np.float32 and found.images.shape == (20, 5)
    back = made["lower"] + found.images.astype(np.float64) * (made["upper"] - made["lower"])
    np.testing.assert_allclose(back, made["x_test"].astype(np.float64), rtol=1e-6)
    made["x_test"][:2] = [made["lower"], made["upper"]]  # the ends belong to the range
    found = datasets.load(saved(tmp_path / "own.npz", made), "test")
    assert found.images[0].tolist() == [0.0] * 5 and found.images[1].tolist() == [1.0] * 5


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (4, 5, 1), (4, 5, 3)])
def test_ranges_spread_over_a_sample(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(-1000, 1000, (12, 4, 5, 3))
    made: dict[str, Array] = {"lower": np.full(shape, -1000), "upper": np.full(shape, 1000)}
    for part in ("train", "test"):
        made |= {f"x_{part}": pixels, f"y_{part}": np.arange(12) % 2}
    found = datasets.load(saved(tmp_path / "own.npz", made), "test")
    np.testing.assert_allclose(found.images, (pixels + 1000) / 2000, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"upper": None}, "own.npz: missing upper; the file holds lower"),
        ({"upper": np.full(5, 1e9)[:4]}, r"lower \(5,\) and upper \(4,\) differ in shape"),
        ({"lower": np.zeros(4), "upper": np.ones(4)}, r"x_train has shape \(20, 5\), over whose"),
        ({"lower": np.zeros((2, 20, 5)), "upper": np.ones((2, 20, 5))}, "do not spread"),
        ({"lower": np.full(5, np.nan)}, "lower must hold finite numbers"),
        ({"upper": np.array(["a"] * 5)}, "upper must hold finite numbers"),
        ({"lower": np.zeros(5), "upper": np.zeros(5)}, "upper must be above lower in every"),
        ({"x_test": np.full((20, 5), 1e7)}, r"x_test holds 1e\+07 at \[0, 0\], outside"),
        ({"x_test": np.full((20, 5), np.nan)}, r"x_test holds nan at \[0, 0\], outside"),
        ({"x_train": np.array([["a"] * 5] * 20)}, "x_train has type <U1; expected numbers"),
        ({"lower": None, "upper": None}, r"must lie in \[0, 1\]; .* as lower and upper"),
    ],
)
def test_wrong_ranges_are_named(
    tmp_path: Path, changes: dict[str, Array | None], expected: str
) -> None:
    made = table()
    for key, value in changes.items():
        if value is None:
            del made[key]
        else:
            made[key] = value
    with pytest.raises(DataError, match=expected):
        datasets.load(saved(tmp_path / "own.npz", made), "test")


def test_a_single_array_is_named(tmp_path: Path) -> None:
    with (tmp_path / "own.npz").open("wb") as stream:
        np.save(stream, np.zeros((3, 3)))
    with pytest.raises(DataError, match="holds one array without a name; use numpy.savez"):
        datasets.load(tmp_path / "own.npz", "test")


@pytest.mark.parametrize("header", ["(1 << 62,)", "(9, 1 << 60)", "(-5,)", "'x'", "((", "()"])
def test_headers_that_lie_are_refused(tmp_path: Path, header: str) -> None:
    """A few bytes of data under a header that claims anything."""
    claimed = header.replace("1 << 62", str(1 << 62)).replace("1 << 60", str(1 << 60))
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {claimed}, }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(10)
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", content)
    with pytest.raises(DataError, match="own.npz"):
        datasets.load(tmp_path / "own.npz", "test")


def pixels(dtype: str = "uint8", order: Literal["C", "F"] = "C") -> dict[str, Array]:
    source = np.random.default_rng(0)
    made: dict[str, Array] = {"y_train": np.arange(9) % 3, "y_test": np.arange(9) % 3}
    for part in ("train", "test"):
        drawn = source.random((9, 4, 5)) * (1 if "f" in dtype else 255)
        made[f"x_{part}"] = np.asarray(drawn, dtype, order=order)
    return made


@pytest.mark.parametrize(
    ("dtype", "order", "packed", "stays"),
    [
        ("uint8", "C", False, True),
        ("<f4", "C", False, True),
        (">f4", "C", False, False),  # becomes another array
        ("uint8", "F", False, False),
        ("uint8", "C", True, False),
    ],
)
def test_large_arrays_stay_in_their_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    order: Literal["C", "F"],
    packed: bool,
    stays: bool,
) -> None:
    path = tmp_path / "own.npz"
    save = np.savez_compressed if packed else np.savez
    save(path, **pixels(dtype, order))  # type: ignore[arg-type]
    before = datasets.load(path, "test")
    assert mapped.mapping(before.images) is None
    monkeypatch.setattr(mapped, "LEAST", 0)
    found = datasets.load(path, "test")
    assert (mapped.mapping(found.images) is not None) == stays
    assert found.sha256 == before.sha256 and np.array_equal(found.images, before.images)
    assert not found.images.flags.writeable
    datasets.check_unchanged(found)
    if stays:
        with path.open("r+b") as file:
            file.seek(path.read_bytes().index(found.images.tobytes()))
            file.write(b"\0\0\0\1")
        with pytest.raises(DataError, match="'own': its file was changed while"):
            datasets.check_unchanged(found)
        with pytest.raises(DataError, match="Bad CRC-32 for file 'x_test.npy'"):
            datasets.load(path, "test")


def test_labels_that_are_changed_are_noticed_where_they_alone_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "LEAST", 0)
    path = tmp_path / "own.npz"
    np.savez(path, **pixels("f8"))  # type: ignore[arg-type]
    found = datasets.load(path, "test")
    assert [mapped.mapping(x) is None for x in (found.images, found.labels)] == [True, False]
    with path.open("r+b") as file:
        file.seek(path.read_bytes().rindex(found.labels.tobytes()))
        file.write(found.labels[::-1].tobytes())
    with pytest.raises(DataError, match="its file was changed while"):
        datasets.check_unchanged(found)


@pytest.mark.parametrize("least", [0, mapped.LEAST])
@given(st.data())
@settings(max_examples=80, suppress_health_check=list(HealthCheck))
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    least: int,
    data: st.DataObject,
) -> None:
    monkeypatch.setattr(mapped, "LEAST", least)
    path = tmp_path_factory.mktemp("npz") / "own.npz"
    if data.draw(st.booleans()):
        np.savez_compressed(path, **table(6))  # type: ignore[arg-type]
    else:
        saved(path, data.draw(st.sampled_from((table(6), pixels()))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        found = datasets.load(path, "test")
    except DataError as error:
        assert "own.npz" in str(error)
    else:
        most = 255 if found.images.dtype == np.uint8 else 1
        assert float(found.images.min()) >= 0 and float(found.images.max()) <= most


def test_the_documented_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    section = text[text.index("### Your own data") :]
    program, recipe = (
        re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "toml")
    )
    assert program is not None and recipe is not None
    monkeypatch.chdir(tmp_path)
    exec(program[1], {})
    Path("own.toml").write_text(recipe[1], encoding="utf-8")
    assert len(recipe[1].strip().splitlines()) <= 10
    summary = train(load_recipe(Path("own.toml")), Path("run"), device="cpu")
    (member,) = summary.members
    assert member.test.standard > 0.9 and member.test.certified > 0.5
