"""What training costs: time per epoch, per sample and per member, and memory.

``costs.csv`` has one row per epoch, so that a run has its costs after a resumption too. They are
kept apart from ``history.csv`` and the checkpoint because they differ from run to run.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from cactus_edge import files
from cactus_edge.errors import DataError
from cactus_edge.train.checkpoint import COSTS_FILE
from cactus_edge.train.share import ALONE, Share

REPETITIONS = 3  # of a member's timed step; training has just warmed up what it calls


class EpochCost(msgspec.Struct, frozen=True):
    """One row of ``costs.csv``.

    Attributes:
        epoch: from 1.
        samples: that were timed: those since the run was started or resumed within the epoch.
        seconds: for these samples.
        evaluation_seconds: batch statistics, validation and checkpoint after the epoch.
        memory_bytes: the most that the process had by then, or the largest process.
        gpu_memory_bytes: the most that tensors took on a GPU; 0 without one.
        evaluations: sum over these samples of the members that were evaluated.
    """

    epoch: int
    samples: int
    seconds: float
    evaluation_seconds: float
    memory_bytes: int
    gpu_memory_bytes: int
    evaluations: int = 0

    @property
    def samples_per_second(self) -> float:
        """Of training; 0 if nothing was timed."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0


class Cost(msgspec.Struct, frozen=True):
    """Costs of a run in ``metrics.json``; of the epochs that ``costs.csv`` has.

    Attributes:
        seconds_per_epoch: of training.
        evaluation_seconds_per_epoch: of what comes after it.
        samples_per_second: of training.
        networks_per_step: members that a step evaluates, on average.
        microseconds_per_network: time per sample and evaluated member.
        memory_bytes: the most that a process had.
        gpu_memory_bytes: the most that a process's tensors took on a GPU; 0 without one.
        device: ``cpu`` or the GPU's name.
        devices: processes.
        threads: of torch in each of them.
        precision: of training steps.
    """

    seconds_per_epoch: float
    evaluation_seconds_per_epoch: float
    samples_per_second: float
    networks_per_step: float
    microseconds_per_network: float
    memory_bytes: int
    gpu_memory_bytes: int
    device: str
    devices: int
    threads: int
    precision: str


def summarise(
    rows: Sequence[EpochCost],
    *,
    samples_per_epoch: int,
    device: torch.device,
    devices: int,
    precision: str,
) -> Cost:
    """The costs of a run from those of its epochs."""
    samples = sum(row.samples for row in rows)
    seconds = sum(row.seconds for row in rows)
    rate = samples / max(seconds, 1e-9)
    evaluations = sum(row.evaluations for row in rows)
    cuda = device.type == "cuda"
    return Cost(
        seconds_per_epoch=_short(samples_per_epoch / rate if rate else 0.0),
        evaluation_seconds_per_epoch=_short(
            statistics.fmean(row.evaluation_seconds for row in rows) if rows else 0.0
        ),
        samples_per_second=_short(rate),
        networks_per_step=_short(evaluations / max(samples, 1)),
        microseconds_per_network=_short(1e6 * seconds / max(evaluations, 1)),
        memory_bytes=max((row.memory_bytes for row in rows), default=0),
        gpu_memory_bytes=max((row.gpu_memory_bytes for row in rows), default=0),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        devices=devices,
        threads=torch.get_num_threads(),
        precision=precision,
    )


def peak_memory(device: torch.device, share: Share = ALONE) -> tuple[int, int]:
    """Bytes: the largest resident set of a process, the largest GPU allocation of one."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peaks = torch.tensor([_resident(), gpu], dtype=torch.int64, device=device)
    resident, allocated = share.largest(peaks).tolist()
    return int(resident), int(allocated)


def step_time(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of ``step``: the median of a few repetitions."""
    times: list[float] = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def write_costs(output: Path, rows: Sequence[EpochCost]) -> None:
    """Write ``costs.csv``."""
    names = EpochCost.__struct_fields__
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    files.write(output / COSTS_FILE, text.getvalue().encode("ascii"), force=True)


def read_costs(output: Path, epochs: int) -> list[EpochCost]:
    """The rows of ``costs.csv`` about the first ``epochs`` epochs; none without the file.

    Raises:
        DataError: the file is damaged.
    """
    file = output / COSTS_FILE
    if not file.exists():
        return []
    try:
        lines = list(csv.DictReader(io.StringIO(file.read_text(encoding="ascii"))))
        rows = msgspec.convert(lines, type=list[EpochCost], strict=False)
    except (OSError, UnicodeDecodeError, msgspec.ValidationError, csv.Error) as error:
        raise DataError(f"{file}: damaged: {error}; remove the file") from error
    return [row for row in rows if row.epoch <= epochs]


def _short(value: float) -> float:
    """Four digits after the point."""
    return round(value, 4)


def _resident() -> int:
    """The largest resident set of this process, in bytes; 0 where no system call tells it.

    Linux first through /proc: its ``getrusage`` remembers what the process was before ``exec``.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
