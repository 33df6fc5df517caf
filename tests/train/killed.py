"""Kills training runs for ``test_execution.py``: `killed.py RECIPE OUTPUT SEED`.

Every run is a fork of this process, which has only one thread, so that torch is imported once.
Prints at which step each of the killed runs had arrived.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch

from cactus_edge.train import load_recipe, train
from cactus_edge.train.checkpoint import METRICS_FILE, STATE_FILE, load_state
from cactus_edge.train.state import Position

KILLS = 6


def started(recipe: Path, output: Path) -> int:
    """A process that trains or goes on; its number."""
    child = os.fork()
    if child == 0:
        try:
            train(load_recipe(recipe), output, resume=True, device="cpu", checkpoint_seconds=0.02)
        finally:
            os._exit(0 if (output / METRICS_FILE).exists() else 1)
    return child


def main() -> None:
    recipe, output, source = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(sys.argv[3])
    torch.set_num_threads(1)
    began = time.monotonic()
    os.waitpid(started(recipe, output / "whole"), 0)
    seconds = time.monotonic() - began
    steps: list[int] = []
    while len(steps) < KILLS:
        child = started(recipe, output / "parts")
        time.sleep(source.uniform(0.1, 0.6) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it was faster
            break
        state = output / "parts" / STATE_FILE
        text = load_state(state.parent)[1] if state.exists() else '{"recipe":"","data_sha256":""}'
        steps.append(msgspec.json.decode(text, type=Position).step)
    _, status = os.waitpid(started(recipe, output / "parts"), 0)
    print(json.dumps({"steps": steps, "status": status, "seconds": seconds}))


if __name__ == "__main__":
    main()
