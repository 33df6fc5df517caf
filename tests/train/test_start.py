"""Runs that go on from a trained network, and masks that are kept."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from cactus_edge import flatbuffer
from cactus_edge.errors import DataError, UsageError
from cactus_edge.graph import Linear
from cactus_edge.train import checkpoint, load_model, loop, train
from cactus_edge.train.lower import convert
from cactus_edge.train.recipe import Recipe, format_recipe, parse_recipe
from tests.train.interrupting import InterruptAfter

BEFORE = """
seed = 3
threads = 1
[data]
name = "digits"
[network]
name = "cnn-tiny"
width = 0.25
[objective]
epsilon = 0.05
[compression]
members = [{ kind = "quantized", bits = 8 }]
activations = "int8"
[optimizer]
epochs = 1
batch_size = 128
learning_rate = 2e-3
"""
FILES = (checkpoint.MODEL_FILE, checkpoint.STATE_FILE, checkpoint.HISTORY_FILE)


def after(source: Path, *changes: tuple[str, str]) -> Recipe:
    """A second phase: 90 % of the weights pruned once, then trained for two epochs."""
    text = BEFORE.replace('kind = "quantized", bits = 8', 'kind = "pruned", sparsity = 0.9')
    text = text.replace("[optimizer]", 'mask_refresh = "once"\n[optimizer]')
    text = text.replace("epochs = 1", "epochs = 2") + f'[start]\nfrom = "{source}"\n'
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_recipe(text, "r")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of one epoch."""
    train(parse_recipe(BEFORE), tmp_path / "before", device="cpu")
    return tmp_path / "before"


def test_a_start_brings_parameters_and_ranges(trained: Path, tmp_path: Path) -> None:
    first = load_model(trained)
    still = after(trained, ("learning_rate = 2e-3", "learning_rate = 1e-30"))
    assert parse_recipe(format_recipe(still)) == still
    summary = train(still, tmp_path / "after", device="cpu")
    second = load_model(tmp_path / "after")
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name
    assert second.ranges == first.ranges
    assert len(summary.start_sha256) == 64


def test_masks_of_a_start_are_kept_and_shipped(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with kept masks resumes to the bit; its masks are the first ones, to the end."""
    monkeypatch.setattr(loop, "REPORT_INTERVAL", -1.0)
    network = load_model(trained).network
    recipe = after(trained, ("learning_rate = 2e-3", "learning_rate = 2e-2"))
    member = recipe.compression.members[0]
    masks = member.pattern().masks(network, recipe.compression.pruning)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, parts, progress=InterruptAfter(5), device="cpu")
    train(recipe, parts, resume=True, device="cpu")
    for name in FILES:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name

    (kept,) = load_model(whole).masks.values()
    assert sorted(kept) == sorted(masks)
    assert all(torch.equal(kept[name], mask) for name, mask in masks.items())
    convert(whole, tmp_path / "a.tflite", member="1", universal=False)
    graph = flatbuffer.read_tflite((tmp_path / "a.tflite").read_bytes())
    for op in graph.core:
        if isinstance(op, Linear) and op.name == "conv1":
            shipped = torch.from_numpy(np.moveaxis(op.weights.values, -1, 1) != 0)
            assert not shipped[~kept["conv1"]].any() and shipped.any()
            break
    else:
        pytest.fail("no layer conv1")

    # A third phase takes the masks over, though its weights are others by now.
    third = train(after(whole, ("epochs = 2", "epochs = 1")), tmp_path / "third", device="cpu")
    again = load_model(tmp_path / "third").masks
    assert all(torch.equal(again["0.9"][name], mask) for name, mask in masks.items())
    assert third.start_sha256
    other = after(whole, ('mask_refresh = "once"', 'mask_refresh = "once"\nprune_last = false'))
    with pytest.raises(DataError, match="made with scope = 'layer' and prune_last = true"):
        train(other, tmp_path / "other", device="cpu")


def test_a_start_that_changes_is_noticed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "REPORT_INTERVAL", -1.0)
    recipe = after(trained / checkpoint.MODEL_FILE)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "after", progress=InterruptAfter(2), device="cpu")
    train(parse_recipe(BEFORE.replace("seed = 3", "seed = 4")), trained, force=True, device="cpu")
    with pytest.raises(DataError, match=r"made with another \[start\]; use the original one"):
        train(recipe, tmp_path / "after", resume=True, device="cpu")


def test_mistakes_are_named(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for recipe, error, expected in (
        (after(tmp_path / "no"), DataError, r"\[start\] from: .*no: no such file; give the output"),
        (
            after(trained, ("width = 0.25", "width = 0.5")),
            DataError,
            r"holds 'cnn-tiny' of width 0.25 for samples of shape \[1, 8, 8\] and 10 classes, this "
            r"recipe trains 'cnn-tiny' of width 0.5 .*; start from a run of the same network",
        ),
    ):
        with pytest.raises(error, match=expected):
            train(recipe, tmp_path / "after", device="cpu")
    with pytest.raises(UsageError, match=r"\[start\] from: .* is the output directory"):
        train(after(trained), trained, force=True, device="cpu")
    assert load_model(trained)  # which was not removed
    with pytest.raises(
        DataError, match=r"\[start\]: unknown key 'form'; did you mean 'from'\? known keys: from$"
    ):
        after(trained, ("from =", "form ="))
    other = after(trained, ('name = "digits"', 'name = "digits"\nvalidation = 0.2'))
    with caplog.at_level(logging.WARNING):
        train(other, tmp_path / "after", device="cpu")
    assert "trained on other data or another split" in caplog.text
