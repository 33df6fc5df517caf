"""The protocol for a Raspberry Pi: what has to be right before, pinned cores, runs repeated.

A Pi slows down when it is hot or its supply is weak, and its clock follows a governor. So each run
notes temperature, clock and the firmware's throttling flags before and after; a run during which
a flag was set, or the clock fell, is counted as spoilt. Between runs the board cools down. Nothing
here needs a Pi: on another machine the report says what could not be known.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from cactus_edge.bench import machine
from cactus_edge.bench.machine import State
from cactus_edge.bench.run import Benchmark
from cactus_edge.errors import UsageError, counted

logger = logging.getLogger(__name__)

COOL_CELSIUS = 60.0
"""Runs begin below this; a Pi caps its clock from 80 degrees on."""
_COOLING_SECONDS = 300.0
_POLL_SECONDS = 5.0
_BUSY_LOAD = 0.5
_SLOWER = 0.98


@dataclass(frozen=True)
class Run:
    """One repetition."""

    before: State
    after: State
    median_us: float
    ratios: dict[str, float]
    spoilt: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the protocol found.

    Attributes:
        machine: its name.
        board: whether it is a Raspberry Pi.
        missing: what the protocol asks for and this machine lacks or does not report.
        cpus: to which the process was pinned.
        threads: of each runtime.
        runs: in order.
        median_us: of the unspoilt runs' medians; of all where none is.
        spread: largest of these over the smallest.
        ratios: of each peer, median over the same runs.
    """

    machine: str
    board: bool
    missing: tuple[str, ...]
    cpus: tuple[int, ...]
    threads: int
    runs: tuple[Run, ...]
    median_us: float
    spread: float
    ratios: dict[str, float]


def missing(state: State, *, board: bool) -> tuple[str, ...]:
    """What is not as the protocol asks for, in words that say what to do."""
    found: list[str] = []
    if not board:
        found.append("this is no Raspberry Pi: its figures say nothing about one")
    if state.governor is None:
        found.append("the clock's governor is not reported")
    elif state.governor != "performance":
        found.append(
            f"the governor is '{state.governor}'; run: echo performance | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if state.celsius is None:
        found.append("no temperature is reported")
    elif state.celsius >= COOL_CELSIUS:
        found.append(f"{state.celsius:.0f} degrees; below {COOL_CELSIUS:.0f} are needed: cool it")
    if state.throttling is None:
        found.append("throttling flags are not reported: vcgencmd is not installed or not allowed")
    elif state.throttling:
        found.append(f"the firmware reports: {', '.join(state.throttling)}; check supply and fan")
    if state.load is not None and state.load > _BUSY_LOAD:
        found.append(f"other processes are busy (load {state.load:.1f}): stop them")
    return tuple(found)


def spoilt(before: State, after: State) -> tuple[str, ...]:
    """Why a run does not count."""
    found: list[str] = []
    if before.throttling is not None and after.throttling is not None:
        found += [flag for flag in after.throttling if flag not in before.throttling]
    if before.megahertz and after.megahertz and after.megahertz < _SLOWER * before.megahertz:
        found.append(f"the clock fell from {before.megahertz} to {after.megahertz} MHz")
    return tuple(found)


def protocol(
    measure: Callable[[], Benchmark],
    *,
    runs: int = 5,
    threads: int = 1,
    wait: Callable[[], None] | None = None,
    read: Callable[[], State] = machine.state,
) -> Report:
    """Repeat a benchmark on pinned cores.

    Args:
        measure: one benchmark, which loads its runtimes anew.
        runs: how many.
        threads: cores to which the process is pinned, the last ones.
        wait: called before each run; waits until it is cool if None.
        read: the machine's state.

    Raises:
        UsageError: less than one run, or more threads than cores.
    """
    if runs < 1:
        raise UsageError(f"{runs} runs; at least 1 is needed")
    board = machine.is_raspberry_pi()
    lacking = missing(read(), board=board)
    for text in lacking:
        logger.warning("%s", text)
    taken: list[Run] = []
    with pinned(threads) as cpus:
        for _ in range(runs):
            (wait or cool)()
            before = read()
            result = measure()
            after = read()
            ratios = {name: figures.ratio for name, figures in result.peers.items()}
            why = spoilt(before, after)
            taken.append(Run(before, after, result.ours.median_us, ratios, why))
    good = [run for run in taken if not run.spoilt] or taken
    medians = [run.median_us for run in good]
    return Report(
        machine=machine.machine_name(),
        board=board,
        missing=lacking if cpus else (*lacking, "the process could not be pinned to cores"),
        cpus=cpus,
        threads=threads,
        runs=tuple(taken),
        median_us=float(np.median(medians)),
        spread=max(medians) / min(medians),
        ratios={name: _median(run.ratios[name] for run in good) for name in good[0].ratios},
    )


@contextmanager
def pinned(threads: int) -> Generator[tuple[int, ...]]:
    """Keep this process on its last ``threads`` cores: the first one serves most interrupts.

    Gives the cores; none where the operating system cannot do that.

    Raises:
        UsageError: the process has fewer cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise UsageError(
            f"{threads} threads, but the process may use {counted(len(allowed), 'core')}"
        )
    chosen = allowed[-threads:]
    os.sched_setaffinity(0, chosen)
    try:
        yield tuple(chosen)
    finally:
        os.sched_setaffinity(0, allowed)


def cool(
    read: Callable[[], float | None] = machine.temperature,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the board is cool, but not for ever."""
    waited = 0.0
    while (celsius := read()) is not None and celsius >= COOL_CELSIUS:
        if waited >= _COOLING_SECONDS:
            logger.warning("still at %.0f degrees after %.0f s", celsius, waited)
            return
        sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _median(values: Sequence[float] | Generator[float]) -> float:
    return float(np.median(list(values)))
