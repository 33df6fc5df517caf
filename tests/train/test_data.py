from __future__ import annotations

import torch

from cactus_edge import datasets
from cactus_edge.train.data import augment, generator, order, select, to_samples

CPU = torch.device("cpu")


def test_batches_are_channels_first_in_0_1() -> None:
    dataset = datasets.load("digits", "test")
    samples = to_samples(dataset, CPU)
    images, labels = select(samples, torch.tensor([5, 3]))
    assert images.shape == (2, 1, 8, 8) and samples.input_shape == (1, 8, 8)
    torch.testing.assert_close(images[0, 0], torch.tensor(dataset.images[5, :, :, 0]) / 255)
    assert labels.tolist() == dataset.labels[[5, 3]].tolist()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(50, 1, 2)
    assert sorted(first.tolist()) == list(range(50))
    assert first.equal(order(50, 1, 2))
    assert not first.equal(order(50, 1, 3)) and not first.equal(order(50, 2, 2))


def test_augmentation_mirrors_and_shifts() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1) + 1000
    moved = augment(image, "flip-crop", generator(CPU, 0, "augment"))
    assert moved.shape == image.shape
    for sample in moved[:, 0]:
        step = sample[3, 4] - sample[3, 3]
        assert float(step) in (1.0, -1.0) and float(sample[4, 3] - sample[3, 3]) == 8.0
        expected = 27 + 1000 if step == 1 else 28 + 1000
        rows, columns = divmod(int(sample[3, 3]) - expected + 18, 8)
        assert abs(rows - 2) <= 2 and abs(columns - 2) <= 2
    shifted = augment(image, "crop", generator(CPU, 0, "augment"))
    assert bool((shifted[:, 0, 3, 4] - shifted[:, 0, 3, 3] == 1).all())
    assert augment(image, "none", generator(CPU, 0, "augment")) is image
