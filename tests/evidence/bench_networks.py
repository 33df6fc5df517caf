"""The networks of the latency benchmark: trained and pruned by plain training, then converted.

    mlp        784-512-512-10 on MNIST, ``recipes/bench-mlp.toml``
    cnn-small  the zoo's, on MNIST, ``recipes/bench-cnn-small.toml``
    cnn-7      the literature's CNN7 on CIFAR-10: 17.2 million weights, with batch normalization

The first two are one set of weights each, trained at every sparsity in turn. CNN7 is trained dense
on a small subset and pruned in steps with a short fine-tuning after each, so that its accuracy says
little and its masks are as uneven as those of any pruned network. Everything is kept in
``build/evidence/performance``; delete that folder to make it again:

    nice -n 15 python -m tests.evidence.bench_networks
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge import datasets, files, flatbuffer
from cactus_edge.train import Model, Network, load_model, load_recipe, parse_recipe, train
from cactus_edge.train.checkpoint import ModelMetadata
from cactus_edge.train.compress import magnitude_masks
from cactus_edge.train.lower import Settings, lower
from cactus_edge.train.zoo import build

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "evidence" / "performance"
SPARSITIES = (0.0, 0.5, 0.7, 0.9)
BITS = (8, 4)
DATA = {"mlp": "mnist", "cnn-small": "mnist", "cnn-7": "cifar10"}
BLOCK_ROWS, BLOCK_INPUTS, BLOCK_SPARSITY = 32, 4, 0.9

TRAINING_IMAGES, FINE_TUNING_IMAGES, EPOCHS, BATCH = 5000, 2000, 2, 50
_CALIBRATION_IMAGES = 200
_TEST_IMAGES = 1000
_RECIPE = """
seed = 0
[data]
name = "cifar10"
[network]
name = "cnn-7"
[objective]
epsilon = 0.001
lambda_max = 0.0
[optimizer]
epochs = 2
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One converted model; ``pattern`` is ``unstructured`` or ``32x4 blocks``."""

    network: str
    bits: int
    sparsity: float
    pattern: str
    path: Path

    @property
    def data(self) -> str:
        """The data set's name."""
        return DATA[self.network]


class Trained(msgspec.Struct, frozen=True):
    """What training took and reached in floats, for one network and sparsity."""

    network: str
    pattern: str
    sparsity: float
    seconds: float
    float_accuracy: float


def entries(networks: tuple[str, ...] = ("mlp", "cnn-small", "cnn-7")) -> list[Entry]:
    """Every model of the benchmark, made or not."""
    result: list[Entry] = []
    for network in networks:
        for bits in BITS:
            for sparsity in SPARSITIES:
                path = BUILD / f"{network}-int{bits}-{round(100 * sparsity)}.tflite"
                result.append(Entry(network, bits, sparsity, "unstructured", path))
    if "cnn-7" in networks:
        path = BUILD / "cnn-7-int8-blocks.tflite"
        result.append(Entry("cnn-7", 8, BLOCK_SPARSITY, "32x4 blocks", path))
    return result


def make(networks: tuple[str, ...] = ("mlp", "cnn-small", "cnn-7")) -> list[Entry]:
    """Train and convert what is missing."""
    wanted = entries(networks)
    for network in networks:
        if all(entry.path.exists() for entry in wanted if entry.network == network):
            continue
        if network == "cnn-7":
            _make_cnn7([entry for entry in wanted if entry.network == network])
        else:
            _make_mnist(network, [entry for entry in wanted if entry.network == network])
    return wanted


def training(network: str) -> list[Trained]:
    """How the models of a network came about."""
    return msgspec.json.decode((BUILD / f"{network}.json").read_bytes(), type=list[Trained])


def _make_mnist(network: str, wanted: list[Entry]) -> None:
    directory = BUILD / network
    recipe = load_recipe(ROOT / "recipes" / f"bench-{network}.toml")
    summary = train(recipe, directory, resume=True)
    model = load_model(directory)
    data = datasets.load("mnist", "train", recipe.data.validation)
    for entry in wanted:
        _convert(model, data, entry, entry.sparsity)
    reached = [
        Trained(network, "unstructured", sparsity, summary.seconds, member.test.standard)
        for sparsity, member in zip(SPARSITIES, summary.members, strict=True)
    ]
    files.write(BUILD / f"{network}.json", msgspec.json.encode(reached), force=True)


def _make_cnn7(wanted: list[Entry]) -> None:
    data = datasets.load("cifar10", "train")
    test = datasets.load("cifar10", "test")
    metadata = ModelMetadata("cnn-7", 1.0, (3, 32, 32), data.classes, data.sha256)
    recipe = parse_recipe(_RECIPE)
    reached: list[Trained] = []

    def finish(network: Network, sparsity: float, pattern: str, begin: float) -> None:
        seconds = round(time.monotonic() - begin, 1)
        accuracy = _accuracy(network, test)
        logger.info("cnn-7, %s %.2f: %.3f after %.0f s", pattern, sparsity, accuracy, seconds)
        reached.append(Trained("cnn-7", pattern, sparsity, seconds, accuracy))
        model = Model(network, recipe, {}, metadata)
        for entry in wanted:
            if (entry.sparsity, entry.pattern) == (sparsity, pattern):
                # Blocks are zeros of the weights themselves, not the smallest of them.
                _convert(model, data, entry, sparsity if pattern == "unstructured" else 0.0)

    torch.set_num_threads(1)  # a second thread loses on a busy machine
    torch.manual_seed(0)
    begin = time.monotonic()
    dense = cnn7()
    _fit(dense, data, TRAINING_IMAGES, EPOCHS, {}, 1e-3)
    network = copy.deepcopy(dense)
    finish(dense, 0.0, "unstructured", begin)
    for sparsity in SPARSITIES[1:]:
        begin = time.monotonic()
        masks = magnitude_masks(network, sparsity)
        _fit(network, data, FINE_TUNING_IMAGES, 1, dict(masks), 5e-4)
        finish(network, sparsity, "unstructured", begin)
    begin = time.monotonic()
    _fit(dense, data, FINE_TUNING_IMAGES, 1, block_masks(dense), 5e-4)
    finish(dense, BLOCK_SPARSITY, "32x4 blocks", begin)
    files.write(BUILD / "cnn-7.json", msgspec.json.encode(reached), force=True)


def cnn7() -> Network:
    """The zoo's CNN7 for CIFAR-10, with other initial weights in its large layer."""
    network = build("cnn-7", (3, 32, 32), 10)
    _spread(network.get_parameter("fc1.weight"))
    return network


@torch.no_grad()
def _spread(weight: Tensor) -> None:
    """Start from weights with long tails, as a long training leaves them.

    Under uniform ones, which a short training hardly changes, the integer sums of 32,768 products
    could leave the range that a deployed graph has to prove.
    """
    size = torch.empty_like(weight).exponential_().pow(1.2)
    sign = torch.sign(torch.rand(weight.shape) - 0.5)
    weight.copy_(4 * sign * size / (2 * weight.shape[1]) ** 0.5)


def block_masks(network: Network) -> dict[str, Tensor]:
    """Keep the blocks of 32 channels by 4 inputs with the largest sums of squares.

    The 4 inputs are neighbours in the deployed layout: channels of one pixel. The first and the
    last layer stay dense; they are too small for blocks.
    """
    masks: dict[str, Tensor] = {}
    for name, layer in network.weighted()[1:-1]:
        # In torch's order the channels of a pixel are next to the last axes, flattened or not.
        weight = layer.weight.detach()
        pixels = 16 * 16 if weight.dim() == 2 else weight[0, 0].numel()
        split = weight.reshape(weight.shape[0] // BLOCK_ROWS, BLOCK_ROWS, -1, BLOCK_INPUTS, pixels)
        energy = split.square().sum((1, 3), keepdim=True)
        pruned = round(BLOCK_SPARSITY * energy.numel())
        kept = energy > energy.flatten().kthvalue(pruned).values
        masks[name] = kept.expand_as(split).reshape(weight.shape)
    return masks


def _fit(
    network: Network,
    data: datasets.Dataset,
    images: int,
    epochs: int,
    masks: dict[str, Tensor],
    learning_rate: float,
) -> None:
    """Cross-entropy and Adam; masked weights are set to 0 before the first and after each step."""
    network.train()
    _mask(network, masks)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    steps = epochs * (images // BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(images, generator=generator).split(BATCH):
            x, y = _batch(data, chosen.numpy())
            loss = functional.cross_entropy(network(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
            _mask(network, masks)
    network.eval()


@torch.no_grad()
def _mask(network: Network, masks: dict[str, Tensor]) -> None:
    for name, layer in network.weighted():
        if name in masks:
            layer.weight.mul_(masks[name])


def _batch(data: datasets.Dataset, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(data.images[chosen]).float().permute(0, 3, 1, 2) / 255
    return x.contiguous(), torch.from_numpy(data.labels[chosen])


@torch.no_grad()
def _accuracy(network: Network, test: datasets.Dataset) -> float:
    hits = 0
    for chosen in _chunks(_TEST_IMAGES):
        x, y = _batch(test, chosen)
        hits += int((network(x).argmax(1) == y).sum())
    return hits / _TEST_IMAGES


def _chunks(count: int, size: int = 100) -> Iterator[np.ndarray]:
    return iter(np.split(np.arange(count), range(size, count, size)))


def _convert(model: Model, data: datasets.Dataset, entry: Entry, sparsity: float) -> None:
    few = replace(
        data, images=data.images[:_CALIBRATION_IMAGES], labels=data.labels[:_CALIBRATION_IMAGES]
    )
    settings = Settings(bits=entry.bits, sparsity=sparsity, epsilon=0.0)
    lowering = lower(model, few, settings)
    flatbuffer.save(lowering.graph, entry.path, force=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make()
