"""Batches as tensors: NCHW in [0, 1], with seeded order and augmentation.

Contract: pixels stay uint8 on the device and become ``pixel / 255`` per batch, which is exactly
what the deployed input quantizer undoes. Everything random is drawn from a generator seeded by
(seed, purpose, position), so a run can go on at any step without stored generator states.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge.datasets import Dataset

CROP = 2  # largest shift of the augmentation, in pixels

Augmentation = Literal["none", "crop", "flip-crop"]


@dataclass(frozen=True)
class Samples:
    """A split on a device.

    Attributes:
        images: [N, C, H, W] or [N, F], uint8 or float32.
        labels: [N], int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) or (F,)."""
        return tuple(self.images.shape[1:])


def to_samples(dataset: Dataset, device: torch.device) -> Samples:
    """Move a split to ``device``, channels first."""
    images = torch.tensor(dataset.images)
    if images.dim() == 4:
        images = images.permute(0, 3, 1, 2).contiguous()
    return Samples(images.to(device), torch.tensor(dataset.labels).to(device))


def select(samples: Samples, index: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Images as float32 in [0, 1] and labels of the chosen samples."""
    images, labels = samples.images[index], samples.labels[index]
    return (images.float() / 255 if images.dtype == torch.uint8 else images), labels


def generator(device: torch.device, seed: int, purpose: str, position: int = 0) -> torch.Generator:
    """A generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed} {purpose} {position}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of samples in an epoch, [count]."""
    source = generator(torch.device("cpu"), seed, "order", epoch)
    return torch.randperm(count, generator=source)


def augment(images: Tensor, kind: Augmentation, source: torch.Generator) -> Tensor:
    """Shift each of the ``images`` [N, C, H, W] by up to ``CROP`` pixels; mirror half of them."""
    if kind == "none" or images.dim() != 4:
        return images
    count, _, height, width = images.shape
    device = images.device
    if kind == "flip-crop":
        flip = torch.rand(count, generator=source, device=device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, [CROP] * 4, mode="replicate")
    shift = torch.randint(0, 2 * CROP + 1, (2, count), generator=source, device=device)
    rows = shift[0][:, None] + torch.arange(height, device=device)  # [N, H]
    columns = shift[1][:, None] + torch.arange(width, device=device)  # [N, W]
    sample = torch.arange(count, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
