"""Small recipes and networks that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cactus_edge import datasets
from cactus_edge.train.recipe import Recipe, parse_recipe

TINY = """
seed = 3
threads = 1

[data]
name = "digits"

[network]
name = "cnn-tiny"
width = 0.25

[objective]
epsilon = 0.05
epsilon_ramp = 1
lambda_ramp = 1
l1 = 1e-6

[compression]
members = [
    { kind = "dense" },
    { kind = "pruned", sparsity = 0.5 },
    { kind = "pruned-quantized", sparsity = 0.7, bits = 4 },
    { kind = "perturbed", bits = 4 },
]
activations = "int8"
mask_refresh = "epoch"

[optimizer]
epochs = 2
batch_size = 128
learning_rate = 2e-3
"""


@pytest.fixture
def tiny_text() -> str:
    return TINY


@pytest.fixture
def tiny() -> Recipe:
    return parse_recipe(TINY)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 digits to train on, 16 of them for validation, and 60 for the test."""
    found = datasets.load("digits", "train")
    made = {}
    for part, start, end in (("train", 0, 160), ("test", 160, 220)):
        made[f"x_{part}"] = found.images[start:end]
        made[f"y_{part}"] = found.labels[start:end]
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, **made)
    return path


@pytest.fixture(scope="session")
def few_text(few_digits: Path) -> str:
    """``TINY`` on few digits: an epoch has nine steps here too, with batches of 16."""
    text = TINY.replace('name = "digits"', f'name = "{few_digits}"')
    return text.replace("batch_size = 128", "batch_size = 16")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
