"""The models of the repository: what their cards and certificates say is true of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from cactus_edge import datasets
from cactus_edge.certify import Certifier
from cactus_edge.certify.sweep import sweep
from cactus_edge.errors import DataError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.inputs import Perturbation
from cactus_edge.train.checkpoint import load_model
from cactus_edge.train.recipe import load_recipe
from cactus_edge.train.zoo import parameter_count
from tools.zoo import ENTRIES, MODELS, Claim, Metrics, card, overview

FEW = 1_000
"""Test splits of up to so many samples are certified again."""


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir() if path.is_dir()))
def test_a_model_is_what_its_card_says(name: str) -> None:
    entry, folder = ENTRIES[name], MODELS / name
    content = (folder / "model.tflite").read_bytes()
    claim = msgspec.json.decode((folder / "certificate.json").read_bytes(), type=Claim)
    assert [model.sha256 for model in claim.head.models] == [hashlib.sha256(content).hexdigest()]
    model = load_model(folder)
    metrics = Metrics(parameter_count(model.network))
    text = card(name, entry, claim.summary, metrics, len(content))
    assert (folder / "README.md").read_text() == text
    assert model.recipe == load_recipe(folder / "recipe.toml")
    assert model.recipe == load_recipe(Path("recipes") / f"{entry.recipe}.toml")
    try:
        test = datasets.load(entry.data, "test")
    except DataError:
        pytest.skip(f"the data set {entry.data} is not here")
    if len(test.labels) <= FEW:
        radius = [Perturbation.epsilon(entry.epsilon)]
        curve = sweep(Certifier(read_tflite(content)), test.images, test.labels, radius)
        assert curve.samples == sum(claim.summary.verdicts.values())
        assert curve.correct / curve.samples == claim.summary.standard_accuracy
        assert curve.points[0].certified == claim.summary.verdicts["certified"]


def test_the_table_of_models_is_of_these_files() -> None:
    assert (MODELS / "README.md").read_text() == overview()


def test_a_card_has_the_options_of_all_steps() -> None:
    claim = msgspec.json.decode(
        (MODELS / "digits-0.05" / "certificate.json").read_bytes(), type=Claim
    )
    for name, entry in ENTRIES.items():
        text = card(name, entry, claim.summary, Metrics(1), 1)
        assert all(option in text for option in (*entry.train, *entry.convert))
