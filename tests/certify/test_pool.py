"""Processes that work: in order, one task ahead of another, and what happens when they die."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cactus_edge.certify import parallel
from cactus_edge.certify.parallel import AHEAD, pool
from cactus_edge.errors import ToolError
from tests import workers


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start at once, because they import nothing."""
    monkeypatch.setattr(parallel, "_prepare", workers.prepare)


@pytest.mark.usefixtures("light")
def test_results_come_in_order_and_tasks_are_asked_for_in_time() -> None:
    asked: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(50):
            asked.append(number)
            yield number

    with pool(2) as mapper:
        for number, result in enumerate(mapper(workers.slow_first, tasks())):
            assert result == number * number
            assert len(asked) <= number + 1 + AHEAD * 2
    assert asked == list(range(50))


@pytest.mark.usefixtures("light")
def test_a_killed_process_costs_nothing(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i}{'.die' if i in (0, 3, 11) else ''}") for i in range(20)]
    with pool(2) as mapper:
        assert list(mapper(workers.die_once, iter(names))) == names
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("light")
def test_what_kills_every_process_is_an_error() -> None:
    with pool(2) as mapper, pytest.raises(ToolError, match="died one after another"):
        list(mapper(workers.die_always, iter(range(4))))


@pytest.mark.usefixtures("light")
def test_leaving_early_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while tasks wait that no process was given."""
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(parallel, "AHEAD", 200)
    for results in range(1, 4):
        with pool(1) as mapper:
            answers = mapper(abs, iter(range(400)))
            assert [next(answers) for _ in range(results)] == list(range(results))
    assert not failures


@pytest.mark.usefixtures("light")
def test_workers_do_not_oversubscribe() -> None:
    with pool(2) as mapper:
        answers = set(mapper(workers.threads_of, iter(range(8))))
    assert {threads for threads, _ in answers} == {"1"}
    assert os.getpid() not in {process for _, process in answers}


def test_workers_end_with_the_process_they_work_for(tmp_path: Path) -> None:
    """Even where it is killed and can tell nobody."""
    pids = tmp_path / "pids"
    program = (
        "import os, sys, time\n"
        "from cactus_edge.certify.parallel import pool\n"
        "with pool(1) as mapper:\n"
        f"    open({str(pids)!r}, 'w').write(str(next(mapper(os.getpgid, [0] * 50))))\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stderr=subprocess.DEVNULL
    ) as started:
        while not (pids.exists() and pids.read_text()):
            assert started.poll() is None
            time.sleep(0.05)
        assert int(pids.read_text()) == started.pid
        started.kill()
    deadline = time.monotonic() + 30
    while _alive(started.pid):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.1)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
