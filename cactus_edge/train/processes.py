"""Several processes that train one network on one machine; see ``share`` for the arithmetic.

The calling process trains nothing: it starts the others through Fabric, shows their progress, and
turns Ctrl-C into a flag on which they agree between two steps. They ignore Ctrl-C themselves, so
it does not matter whether the terminal sends it to all of them. If the caller is killed they stop.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import lightning_fabric
import msgspec

from cactus_edge.errors import CactusEdgeError, ToolError
from cactus_edge.train.execution import Flag, on_interrupt
from cactus_edge.train.reports import EpochRow, Progress, StepReport

Job = TypeVar("Job", bound=msgspec.Struct)
Result = TypeVar("Result")

# Fabric logs the start of every process at this level; they import this module before they start.
logging.getLogger(lightning_fabric.__name__).setLevel(logging.WARNING)

Work = Callable[[lightning_fabric.Fabric, Job, Progress | None, Flag], Result]


def launch(
    fabric: lightning_fabric.Fabric, work: Work[Job, Result], job: Job, progress: Progress | None
) -> Result:
    """Run ``work`` in every process and return what the first one returns.

    Raises:
        CactusEdgeError: one that a process raised.
        KeyboardInterrupt: after Ctrl-C, when ``work`` raised it.
        ToolError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    receiver, sender = context.Pipe(duplex=False)
    failures: list[BaseException] = []
    listener = threading.Thread(target=_listen, args=(receiver, progress, failures), daemon=True)
    others, port = set(multiprocessing.active_children()), os.environ.get("MASTER_PORT")
    result: Result | None = None
    died: ToolError | None = None
    with on_interrupt(stop.set):
        try:
            listener.start()
            start: Any = fabric.launch  # its annotation leaves out the arguments
            result = start(_in_process, work, job, stop, sender, os.getpid())
        except Exception as error:  # Fabric reports a process's error as a text
            died = ToolError(
                f"a training process failed: {error}; after a kill (too little memory?) --resume "
                "goes on from the last checkpoint"
            )
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
                process.join()
            sender.close()  # the last one that holds it, so that the listener comes to an end
            listener.join()
            if port is None:
                os.environ.pop("MASTER_PORT", None)
    if failures:
        raise failures[0]
    if died is not None:
        raise died
    assert result is not None  # the first process returned it
    return result


def _listen(receiver: Connection, progress: Progress | None, failures: list[BaseException]) -> None:
    """Pass on what the first process sends, until nobody can send any more."""
    while True:
        try:
            message: object = receiver.recv()
        except (EOFError, OSError):
            return
        if isinstance(message, BaseException):
            failures.append(message)
        elif progress is not None and not failures:
            try:
                _tell(progress, message)
            except Exception as error:  # the display's; raised in the caller
                failures.append(error)


def _tell(progress: Progress, message: object) -> None:
    if isinstance(message, EpochRow):
        progress.epoch(message)
    elif isinstance(message, StepReport):
        progress.step(message)


class _Sender:
    """A progress display at the other end of a pipe."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def step(self, report: StepReport) -> None:
        self._sender.send(report)

    def epoch(self, row: EpochRow) -> None:
        self._sender.send(row)


def _in_process(
    fabric: lightning_fabric.Fabric,
    work: Work[Job, Result],
    job: Job,
    stop: Flag,
    sender: Connection,
    parent: int,
) -> Result | None:
    """``work`` in one of the processes."""

    def orphaned(_number: int, _frame: object) -> None:
        if os.getppid() != parent:  # the caller was killed
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, orphaned)
    try:
        return work(fabric, job, _Sender(sender) if fabric.global_rank == 0 else None, stop)
    except KeyboardInterrupt as error:  # all processes stop at the same step
        if fabric.global_rank == 0 and os.getppid() == parent:
            sender.send(error)
        return None
    except CactusEdgeError as error:
        if fabric.global_rank == 0:
            sender.send(error)
        raise  # ends the others too, which may be waiting for this one
