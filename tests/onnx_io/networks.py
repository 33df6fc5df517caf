"""Small networks of torch on the digits: what users export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge import datasets

_EPOCHS = 5


class Plain(nn.Module):
    """Convolutions with normalization, pools, a flatten by ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.hidden = nn.Linear(64, 32)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = functional.max_pool2d(torch.relu(self.second(x)), 2)
        x = torch.relu(self.hidden(x.view(x.size(0), -1)))
        return self.last(self.drop(x))


class Residual(nn.Module):
    """A normalized input, a linear bottleneck with its sum, a concatenation, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem((x - 0.3) / 0.4)))
        y = functional.relu6(self.expand(x))
        x = x + self.project(functional.relu6(self.depthwise(y)))
        x = torch.cat([x, torch.relu(self.branch(x))], 1)
        x = functional.avg_pool2d(functional.max_pool2d(x, 2), 2)
        return torch.softmax(self.last(x.reshape(-1, 64)), 1)


def trained(kind: str) -> nn.Module:
    """In evaluation mode."""
    network = {"plain": Plain, "residual": Residual}[kind]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for one another
    data = datasets.load("digits", "train")
    images = torch.tensor(data.images[..., 0])[:, None].float() / 255
    labels = torch.tensor(data.labels)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(_EPOCHS):
        for start in range(0, len(images), 64):
            optimizer.zero_grad()
            output = network(images[start : start + 64])
            logits = output if kind == "plain" else torch.log(output + 1e-9)
            functional.cross_entropy(logits, labels[start : start + 64]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return network.eval()
