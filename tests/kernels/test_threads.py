"""``ParallelWorker``: the same bytes as one thread, whatever the helpers do or fail to do."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import profiles
from cactus_edge.graph import Graph
from cactus_edge.kernels import steps, threads
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.simd.tiers import Tier, available, choose
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.kernels.walk import Worker
from tests.graphs import random_graph
from tests.kernels.cases import PROFILES, random_case

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, 2**32 - 1)


def program_of(graph: Graph, block: int = 1, tier: Tier | None = None) -> Program:
    """Every activation is a result."""
    return build(graph, core_tensors(graph), block, Layout.DENSE, tier or choose())


def images(program: Program, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, program.image_bytes), dtype=np.uint8)


def by_one_thread(program: Program, batch: np.ndarray) -> np.ndarray:
    results = np.zeros((len(batch), program.result_bytes), np.uint8)
    Worker(program).run(batch, results)
    return results


def run(worker: ParallelWorker, batch: np.ndarray) -> np.ndarray:
    results = np.zeros((len(batch), worker.program.result_bytes), np.uint8)
    worker.run(batch, results)
    return results


def middling() -> Graph:
    """Some 100 microseconds on one thread, without a vector tile a millisecond."""
    rng = np.random.default_rng(5)
    graph = random_graph(
        rng, shape=(1, 32, 32, 16), operators=("CONV_2D",), channels=64, depth=2, classes=20
    )
    return profiles.resolve(graph)


def helpers() -> int:
    return sum(thread.name.startswith("cactus-edge") for thread in threading.enumerate())


# ---------------------------------------------------------------------- results
@settings(max_examples=24)
@given(
    SEEDS,
    st.sampled_from(PROFILES),
    st.sampled_from((2, 3, 5)),
    st.sampled_from((1, 4)),
    st.sampled_from(available()),
)
def test_random_graphs(seed: int, profile: str, count: int, block: int, tier: Tier) -> None:
    """Every step that can be divided is; more images than a block, and the memory used again."""
    program = program_of(random_case(seed, 1, profile).graph, block, tier)
    batch = images(program, 5, seed)
    expected = by_one_thread(program, batch)
    worker = ParallelWorker(program, count, grain=0)
    for _ in range(2):
        np.testing.assert_array_equal(run(worker, batch), expected)
    worker.close()


@pytest.mark.parametrize("shape", [(1, 70), (1, 3, 3, 40)])
@pytest.mark.parametrize("count", [2, 3])
def test_many_channels_of_few_windows(shape: tuple[int, ...], count: int) -> None:
    """Layers that are divided by channels, which do not come out even."""
    flat = len(shape) == 2
    graph = random_graph(
        np.random.default_rng(2),
        shape=shape,
        operators=("FULLY_CONNECTED",) if flat else ("CONV_2D",),
        channels=700,
        depth=3,
        classes=611 if flat else 5,
        bits=(8,),
    )
    for tier in available():
        program = program_of(profiles.resolve(graph, "litert-xnnpack-x86"), 1, tier)
        batch = images(program, 5)
        worker = ParallelWorker(program, count, grain=0)
        np.testing.assert_array_equal(run(worker, batch), by_one_thread(program, batch), tier)
        worker.close()


def test_staged_images() -> None:
    program = program_of(middling())
    batch = images(program, 1)
    worker = ParallelWorker(program, 2, grain=0)
    worker.images[:] = batch
    worker.run_staged(1)
    np.testing.assert_array_equal(worker.results, by_one_thread(program, batch))
    worker.close()


def test_many_runs_with_more_threads_than_cores() -> None:
    """Threads are put aside by the system wherever they are."""
    program = program_of(random_case(3, 1, "litert-xnnpack-x86").graph)
    batch = images(program, 400)
    expected = by_one_thread(program, batch)
    worker = ParallelWorker(program, 6, grain=0)
    np.testing.assert_array_equal(run(worker, batch), expected)
    worker.close()


def test_several_workers_at_once() -> None:
    program = program_of(middling())
    batch = images(program, 60)
    expected = by_one_thread(program, batch)
    workers = [ParallelWorker(program, 2, grain=0) for _ in range(3)]
    with ThreadPoolExecutor(3) as executor:
        for results in executor.map(lambda worker: run(worker, batch), workers):
            np.testing.assert_array_equal(results, expected)
    for worker in workers:
        worker.close()


# ---------------------------------------------------------------------- how many threads
def test_small_networks_stay_on_one_thread() -> None:
    graph = random_graph(np.random.default_rng(1), shape=(1, 4, 4, 1), depth=1, channels=3)
    before = helpers()
    worker = ParallelWorker(program_of(profiles.resolve(graph)), 2)
    assert worker.threads == 1
    assert helpers() == before


def test_steps_are_cut_by_their_duration() -> None:
    program = program_of(middling())
    codes = program.steps["opcode"].tolist()
    assert codes[0] == steps.LOAD and codes[-1] == steps.STORE
    long, short = threads.GRAIN * 100, threads.GRAIN / 2
    parts = threads.divide(program, [long] * len(codes), 2, threads.GRAIN)
    assert parts[0] == parts[-1] == 1, "the leader copies alone"
    assert set(parts[1:]) > {8}
    seconds = [short] * len(codes)
    seconds[1] = 2.5 * threads.GRAIN
    assert threads.divide(program, seconds, 2, threads.GRAIN) == [1] * len(codes), "too short"
    seconds[2] = long
    parts = threads.divide(program, seconds, 2, threads.GRAIN)
    assert parts == [1, 2, 8, *[1] * (len(codes) - 3)]


def test_useless_helpers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where runs take longer than on one thread, the leader makes more and more of them alone."""
    program = program_of(middling())
    batch = images(program, 1)
    expected = by_one_thread(program, batch)
    worker = ParallelWorker(program, 2, grain=0)
    team = worker._team
    team._seconds = 0.0
    # A run that had to wake somebody is not counted.
    monkeypatch.setattr(team.helpers[0], "wake", lambda: False)
    led: list[int] = []
    for number in range(100):
        resting = team._rest > 0
        np.testing.assert_array_equal(run(worker, batch), expected)
        if not resting:
            led.append(number)
    assert led == [0, 9, 26, 59], "rests grow"
    team._seconds = 1e9
    for _ in range(100):
        run(worker, batch)
    assert team._rest == 0, "rests end when helpers are of use"
    worker.close()


def test_as_many_threads_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    program = program_of(middling())
    batch = images(program, 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with caplog.at_level(logging.WARNING):
        worker = ParallelWorker(program, 3, grain=0)
    assert "can't start new thread" in caplog.text
    assert worker.threads == 1
    np.testing.assert_array_equal(run(worker, batch), by_one_thread(program, batch))


# ---------------------------------------------------------------------- idling and ending
def test_idle_helpers_sleep_and_wake() -> None:
    program = program_of(middling())
    batch = images(program, 1)
    expected = by_one_thread(program, batch)
    worker = ParallelWorker(program, 3, grain=0)
    for _ in range(3):
        np.testing.assert_array_equal(run(worker, batch), expected)
        time.sleep(0.1)
        begin = time.process_time()
        time.sleep(0.4)
        assert time.process_time() - begin < 0.1, "helpers spin while there is nothing to do"
    worker.close()


def test_threads_end_with_their_worker() -> None:
    program = program_of(middling())
    before = helpers()
    closed = ParallelWorker(program, 3, grain=0)
    assert helpers() == before + 2
    closed.close()
    closed.close()
    assert helpers() == before
    batch = images(program, 1)
    np.testing.assert_array_equal(run(closed, batch), by_one_thread(program, batch))
    dropped = ParallelWorker(program, 3, grain=0)
    del dropped
    deadline = time.monotonic() + 20
    while helpers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert helpers() == before


# ---------------------------------------------------------------------- processes
PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from tests.kernels.test_threads import *
program = program_of(middling())
batch = images(program, 3)
expected = by_one_thread(program, batch)
"""
WORKER = """
worker = ParallelWorker(program, 2, grain=0)
assert worker.threads == 2 and (run(worker, batch) == expected).all()
"""


def script(text: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in the root of the repository; a process that hangs fails the test."""
    command = [sys.executable, "-c", PRELUDE + text]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


ENDINGS = (
    "",
    "time.sleep(0.05)",
    "sys.exit(0)",
    "workers = [ParallelWorker(program, 4, grain=0) for _ in range(5)]",
    # A daemon thread is in the middle of runs when the interpreter ends.
    "threading.Thread(target=lambda: [run(worker, batch) for _ in range(9999)], daemon=True)"
    ".start(); time.sleep(0.05)",
)


def test_the_interpreter_ends() -> None:
    """With the last ending here; with the others in children, made before there were helpers.

    Where there is no fork, each has a process of its own.
    """
    if not hasattr(os, "fork"):
        for ending in ENDINGS:
            result = script(WORKER + ending)
            assert result.returncode == 0, f"{ending}\n{result.stderr}"
        return
    result = script(
        f"""
for ending in {ENDINGS[:-1]!r}:
    child = os.fork()
    if child == 0:
        break
    _, status = os.waitpid(child, 0)
    assert status == 0, (ending, status)
else:
    ending = {ENDINGS[-1]!r}
exec({WORKER!r} + ending)
"""
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not hasattr(threading, "_after_fork"), reason="no fork on this system")
def test_a_forked_child_computes_alone() -> None:
    result = script(
        f"""{WORKER}
for _ in range(5):
    child = os.fork()
    if child == 0:
        same = worker.threads == 1 and (run(worker, batch) == expected).all()
        fresh = ParallelWorker(program, 2, grain=0)
        same = same and fresh.threads == 2 and (run(fresh, batch) == expected).all()
        fresh.close()
        os._exit(0 if same else 1)
    assert (run(worker, batch) == expected).all() and worker.threads == 2
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""
    )
    assert result.returncode == 0, result.stderr


def test_an_interrupt_leaves_the_worker_usable(request: pytest.FixtureRequest) -> None:
    """Ctrl-C comes when runs are under way, however long a thread takes to start."""
    program = program_of(middling())
    batch = images(program, 3)
    expected = by_one_thread(program, batch)
    worker = ParallelWorker(program, 2, grain=0)
    # An interrupt within a callback of the collector, such as Hypothesis has, would be lost, and
    # libraries that other tests use leave handlers behind.
    gc.disable()
    request.addfinalizer(gc.enable)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for _ in range(20):
        running = threading.Event()

        def interrupt(running: threading.Event = running) -> None:
            running.wait()
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)  # the main thread handles it

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            running.set()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                run(worker, batch)
        thread.join()
        np.testing.assert_array_equal(run(worker, batch), expected)
    worker.close()
