"""Small recipes and networks that the tests of training share."""

from __future__ import annotations

import pytest
import torch

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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
