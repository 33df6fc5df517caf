"""Kills training runs for ``test_execution.py``: `killed.py RECIPE OUTPUT SEED`.

Every run is a fork of this process, so that torch and the data are imported once. A run is killed
a drawn number of steps after its start and a drawn fraction of a step later: while it computes, or
while it writes. Prints the steps at which the checkpoints of the killed runs were.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import msgspec
import torch

from cactus_edge import datasets
from cactus_edge.train import load_recipe, loop, train
from cactus_edge.train.checkpoint import METRICS_FILE, load_state
from cactus_edge.train.reports import EpochRow, StepReport
from cactus_edge.train.state import Position

KILLS = 3
LONGEST = 0.02  # seconds from a step's report to the kill: about one step and its checkpoint
RECIPE = """
seed = 3
threads = 1
[data]
name = "digits"
augment = "crop"
[network]
name = "mlp"
width = 0.25
[objective]
epsilon = 0.02
epsilon_ramp = 1
[compression]
members = [{ kind = "dense" }, { kind = "pruned-quantized", sparsity = 0.5, bits = 4 }]
draw = "one"
activations = "int8"
mask_refresh = "epoch"
[optimizer]
epochs = 4
batch_size = 100
"""
"""What is trained, and killed: draws, masks and ranges that all have to be stored."""


class Killer:
    """Kills its process soon after the given number of reports; never if it is negative."""

    def __init__(self, reports: int, seconds: float) -> None:
        self.left, self.seconds = reports, seconds

    def step(self, report: StepReport) -> None:
        del report
        self.left -= 1
        if self.left == 0:
            kill = (os.getpid(), signal.SIGKILL)
            threading.Timer(self.seconds, os.kill, kill).start()

    def epoch(self, row: EpochRow) -> None:
        pass


def run(recipe: Path, output: Path, killer: Killer) -> bool:
    """Train, or go on, in a fork; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            train(
                load_recipe(recipe),
                output,
                resume=True,
                progress=killer,
                device="cpu",
                checkpoint_seconds=0.0,
            )
        finally:
            os._exit(0 if (output / METRICS_FILE).exists() else 1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def main() -> None:
    recipe, output, source = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(sys.argv[3])
    loop.REPORT_INTERVAL = -1.0
    torch.set_num_threads(1)
    datasets.load("digits", "test")
    assert not run(recipe, output / "whole", Killer(-1, 0.0))
    steps: list[int] = []
    for _ in range(KILLS):
        killer = Killer(source.randint(1, 9), source.uniform(0.0, LONGEST))
        assert run(recipe, output / "parts", killer)
        text = load_state(output / "parts")[1]
        steps.append(msgspec.json.decode(text, type=Position).step)
    assert not run(recipe, output / "parts", Killer(-1, 0.0))
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
