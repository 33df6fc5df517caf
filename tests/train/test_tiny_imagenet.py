"""A folder in TinyImageNet's layout is read; anything else is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets
from cactus_edge.errors import DataError, MissingExtraError

image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
CLASSES = ("n01443537", "n01629819", "n01641577")


def photograph(path: Path, colour: tuple[int, ...], mode: str = "RGB", side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, (side, side), colour if mode == "RGB" else colour[0]).save(path, "JPEG")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    root = tmp_path / "tiny-imagenet-200"
    lines: list[str] = []
    for rank, name in enumerate(CLASSES):
        for index in range(4):
            path = root / "train" / name / "images" / f"{name}_{index}.JPEG"
            mode = "L" if (rank, index) == (2, 3) else "RGB"
            photograph(path, (60 * rank + 40, 10 * index, 200), mode)
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    for index in range(5):
        photograph(root / "val" / "images" / f"val_{index}.JPEG", (10 * index, 0, 0))
        lines.append(f"val_{index}.JPEG\t{CLASSES[2 - index % 3]}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_both_parts_are_read(folder: Path) -> None:
    assert folder.is_dir()
    test = datasets.load("tiny-imagenet", "test")
    assert test.images.shape == (5, 64, 64, 3) and test.images.dtype == np.uint8
    assert test.labels.tolist() == [2, 1, 0, 2, 1] and test.classes == 3
    assert np.abs(test.images[:, 5, 5, 0].astype(int) - [0, 10, 20, 30, 40]).max() <= 3
    whole = datasets.load("tiny-imagenet", "train", 0.0)
    assert whole.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = [[60 * rank + 40, 10 * index, 200] for rank in range(3) for index in range(4)]
    expected[-1] = [160, 160, 160]  # the grey one
    assert np.abs(whole.images[:, 5, 5].astype(int) - expected).max() <= 4
    training, held_out = datasets.load_training("tiny-imagenet", 0.25)
    assert (len(training.labels), len(held_out.labels)) == (9, 3)


def test_without_pillow_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.is_dir()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cactus-edge\[images\]'"):
        datasets.load("tiny-imagenet", "test")


def first(folder: Path) -> Path:
    return folder / "val" / "images" / "val_0.JPEG"


def annotations(folder: Path) -> Path:
    return folder / "val" / "val_annotations.txt"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: first(f).unlink(), "val_0.JPEG: not a photograph"),
        (lambda f: first(f).write_bytes(b""), "val_0.JPEG: not a photograph"),
        (lambda f: first(f).write_bytes(b"GIF89a" + bytes(50)), "val_0.JPEG: not a photograph"),
        (lambda f: first(f).write_bytes(first(f).read_bytes()[:300]), "val_0.JPEG: not a photo"),
        (lambda f: photograph(first(f), (0, 0, 0), side=65), "65 x 65 pixels, not 64"),
        (lambda f: annotations(f).unlink(), "val_annotations.txt: cannot read the annotations"),
        (lambda f: annotations(f).write_text(""), "holds no annotations"),
        (lambda f: annotations(f).write_text("val_0.JPEG\n"), "line 1 names no file"),
        (lambda f: annotations(f).write_text("../x.JPEG\tn01443537\n"), "line 1 names no file"),
        (lambda f: annotations(f).write_text("val_0.JPEG\tn999\n"), "line 1 names no file"),
        (lambda f: annotations(f).write_bytes(b"\xff\xfe"), "cannot read the annotations"),
        (lambda f: (f / "train").rename(f / "training"), r"holds train/; unpack tiny-imagenet-200"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=expected):
        datasets.load("tiny-imagenet", "test")


def test_classes_need_photographs(folder: Path) -> None:
    for path in (folder / "train" / CLASSES[1] / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"{CLASSES[1]}: holds no images/\*.JPEG"):
        datasets.load("tiny-imagenet", "train")


def test_huge_pictures_are_refused_before_decoding(folder: Path) -> None:
    """A header that claims 65,000 x 65,000 pixels in a file of a few hundred bytes."""
    content = first(folder).read_bytes()
    start = content.index(b"\xff\xc0") + 5
    huge = (65_000).to_bytes(2, "big")
    first(folder).write_bytes(content[:start] + huge + huge + content[start + 4 :])
    with pytest.raises(DataError, match="val_0.JPEG: not a photograph"):
        datasets.load("tiny-imagenet", "test")
