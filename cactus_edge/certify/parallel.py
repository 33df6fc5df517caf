"""One function on many tasks, on processes of this machine (loky) or of a Dask cluster.

A ``Mapper`` is a ``map`` whose results come in the order of the tasks, however the tasks end. It
asks for a bounded number of tasks ahead, so that neither tasks nor results pile up. A task whose
process dies is done again, and its result is taken once; what kills one process after another is
an error. The function has to be importable by its name and without effects.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from cactus_edge.errors import MissingExtraError, ToolError, UsageError

_log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 4
"""Tasks for each process that are asked for ahead of the first unfinished one."""
_DEATHS = 3
_IDLE_SECONDS = 600
_WATCH_SECONDS = 1
_CONNECT_SECONDS = 20
_ONE_THREAD = dict.fromkeys(
    ("MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)


class Mapper(Protocol):
    """``map`` of one function over tasks, results in the order of the tasks."""

    def __call__(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], /
    ) -> Iterator[Result]:
        """Results of ``function`` on each of ``tasks``."""
        ...


class _Future(Protocol):
    def result(self) -> Any: ...
    def exception(self) -> BaseException | None: ...
    def done(self) -> bool: ...


class _Pool(Protocol):
    """Where tasks run. ``generation`` grows when the processes had to be replaced."""

    workers: int
    generation: int

    def submit(self, function: Callable[[Any], Any], task: object) -> _Future: ...
    def renew(self) -> None: ...


@contextmanager
def pool(jobs: int | None = None, dask: str | None = None) -> Generator[Mapper]:
    """A mapper; its processes end with the block.

    Args:
        jobs: processes on this machine; None for this process alone.
        dask: address of a Dask scheduler instead, such as ``tcp://host:8786``.

    Raises:
        UsageError: both were given, or less than one process.
        MissingExtraError: joblib or Dask is not installed.
        ToolError: the scheduler cannot be reached; processes die again and again.
    """
    if dask is not None:
        if jobs is not None:
            raise UsageError("give either a number of jobs or a Dask scheduler, not both")
        with _dask(dask) as mapper:
            yield mapper
        return
    if jobs is None:
        yield map
        return
    if jobs < 1:
        raise UsageError(f"{jobs} jobs; give at least 1")
    processes = _Loky(jobs)
    try:
        yield lambda function, tasks: _ordered(processes, function, tasks)
    finally:
        processes.stop()


def _ordered(
    processes: _Pool, function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[Result]:
    """Results in the order of the tasks; see the module's docstring."""
    source = iter(tasks)
    waiting: deque[tuple[Task, _Future, int]] = deque()
    deaths = 0
    while True:
        while len(waiting) < AHEAD * processes.workers:
            try:
                task = next(source)
            except StopIteration:
                break
            waiting.append((task, processes.submit(function, task), processes.generation))
        if not waiting:
            return
        _, future, generation = waiting[0]
        try:
            result: Result = future.result()
        except BrokenExecutor:
            deaths += 1
            if deaths == _DEATHS:
                raise ToolError(
                    f"{deaths} processes died one after another at the same task, perhaps for "
                    "lack of memory; use fewer jobs"
                ) from None
            _log.warning("a worker process died; its samples are done again")
            if generation == processes.generation:
                processes.renew()
            waiting = deque(_again(processes, function, entry) for entry in waiting)
            continue
        deaths = 0
        waiting.popleft()
        yield result


def _again(
    processes: _Pool, function: Callable[[Task], Result], entry: tuple[Task, _Future, int]
) -> tuple[Task, _Future, int]:
    """The same task, handed in once more where its process is gone and left no result."""
    task, future, generation = entry
    if generation == processes.generation:
        return entry
    if future.done() and not isinstance(future.exception(), BrokenExecutor):
        return entry
    return task, processes.submit(function, task), processes.generation


class _Loky:
    """Processes of this machine, one thread each."""

    def __init__(self, jobs: int) -> None:
        try:
            from joblib.externals import loky
        except ImportError:
            raise MissingExtraError("joblib", "verify", "--jobs") from None
        self._loky = loky
        self.workers = jobs
        self.generation = 0
        self._executor = self._start()

    def _start(self) -> Any:
        return self._loky.ProcessPoolExecutor(
            self.workers,
            timeout=_IDLE_SECONDS,
            initializer=_prepare,
            initargs=(os.getpid(),),
            env=_ONE_THREAD,
        )

    def submit(self, function: Callable[[Any], Any], task: object) -> _Future:
        try:
            return self._executor.submit(function, task)
        except BrokenExecutor:
            self.renew()
            return self._executor.submit(function, task)

    def renew(self) -> None:
        self.stop()
        self._executor = self._start()
        self.generation += 1

    def stop(self) -> None:
        # An executor that is told to kill drops its tasks, and then fails on the numbers of those
        # that it had not yet handed out: joblib 1.6's thread dies of a KeyError, with a traceback.
        numbers = self._executor._work_ids  # noqa: SLF001
        with suppress(queue.Empty):
            while True:
                numbers.get_nowait()
        self._executor.shutdown(wait=True, kill_workers=True)


def _prepare(parent: int) -> None:
    """Ctrl-C is for the process that writes; without it, this one has nobody to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _dask(address: str) -> Generator[Mapper]:
    """Workers of a cluster; the scheduler itself hands in again what a dead worker had."""
    try:
        import distributed
    except ImportError:
        raise MissingExtraError("distributed", "verify", "--dask") from None
    try:
        client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError, ImportError) as error:
        raise ToolError(f"no Dask scheduler answers at '{address}': {error}") from None
    with client:
        processes = _Dask(client)
        if processes.workers == 0:
            raise ToolError(f"the Dask scheduler at '{address}' has no workers")
        try:
            yield lambda function, tasks: _ordered(processes, function, tasks)
        except (distributed.KilledWorker, distributed.CancelledError) as error:
            raise ToolError(
                f"the Dask cluster at '{address}' gave up a task ({type(error).__name__}: {error})"
            ) from None
        finally:
            processes.stop()


class _Dask:
    """A cluster. Its futures outlive workers, so there is nothing to renew."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.workers = sum(client.nthreads().values())
        self.generation = 0
        self._futures: deque[Any] = deque()

    def submit(self, function: Callable[[Any], Any], task: object) -> _Future:
        # Impure: equal tasks are not one task, and a result is dropped when it was taken.
        future = self._client.submit(function, task, pure=False)
        self._futures.append(future)
        while len(self._futures) > AHEAD * self.workers:
            self._futures.popleft()
        return future

    def renew(self) -> None:
        """Never needed: the scheduler does a dead worker's tasks again."""

    def stop(self) -> None:
        self._client.cancel(list(self._futures))
