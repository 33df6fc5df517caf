"""What worker processes do in tests: nothing that would have them import the package first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def prepare(_parent: int) -> None:
    """Stands for what a worker does before its first task."""


def slow_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number * number


def die_once(mark: str) -> str:
    path = Path(mark)
    if path.suffix == ".die" and not path.exists():
        path.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return mark


def die_always(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def threads_of(_: object) -> tuple[str, int]:
    return os.environ["OMP_NUM_THREADS"], os.getpid()
