"""The independent checker: re-derives every line of a certificate from models and data alone.

The trusted base is this file, ``check_head``, ``check_sample``, ``check_bounds``, ``check_margin``
and ``check_linear`` with ``graph``, ``semantics``, ``inputs``, ``specification``, ``vnnlib`` and
the tables they read; it shares no code with the certifier, the executors or the kernels, and uses
no float and no compiled code. Its interval propagation differs from the certifier's on purpose: not
a doubled network, but sums and radii.

A certificate is read once, line by line; a part of its lines is a task that any process can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np

from cactus_edge import check_head, check_sample
from cactus_edge.certificate import Sample, head_of, line_of, sample_of
from cactus_edge.certificate_stream import Reader
from cactus_edge.check_linear import LinearChecker
from cactus_edge.check_sample import Context
from cactus_edge.datasets import Dataset, Images, check_unchanged
from cactus_edge.errors import DataError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Int64Array

__all__ = ["CheckResult", "Mapper", "check"]

_LINES = 250
_BYTES = 1 << 22
"""A task is as many lines as this, or as few as hold this many bytes."""
_Task = TypeVar("_Task")
_Answer = TypeVar("_Answer")


class Mapper(Protocol):
    """``map``, or something that does the same on several processes."""

    def __call__(
        self, function: Callable[[_Task], _Answer], tasks: Iterable[_Task], /
    ) -> Iterator[_Answer]:
        """Answers in the order of the tasks."""
        ...


@dataclass(frozen=True)
class CheckResult:
    """``problems`` is empty when the certificate holds."""

    samples: int
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of a certificate, from sample ``first`` on, and what they are about.

    ``labels`` int64 [samples]; -1, with ``images`` of no matter, in a claim about ``query``.
    """

    head: bytes
    models: tuple[bytes, ...]
    first: int
    lines: tuple[bytes, ...]
    images: Images
    labels: Int64Array
    query: bytes | None = None


def check(
    claim: Reader,
    models: Sequence[bytes],
    data: Dataset | None = None,
    *,
    query: bytes | None = None,
    progress: Callable[[int, int], None] | None = None,
    most: int = 20,
    mapper: Mapper = map,
) -> CheckResult:
    """Recompute a certificate.

    Args:
        claim: the certificate, of which only the head was read.
        models: the bytes of the ``.tflite`` files, in the order of the claim.
        data: the split that the certificate names, unless it is about a query.
        query: the bytes of the VNN-LIB file that the certificate names, where it is about one.
        progress: called with (samples done, samples in all).
        most: stop after this many problems.
        mapper: does the work; see ``certify.parallel`` for one with several processes.

    Raises:
        UnsupportedModelError: a model cannot be read.
        DataError: the file is cut off, or a line is no line of a certificate; the data's file was
            changed meanwhile.
    """
    head = claim.head
    names = [model.file for model in head.models]
    names += [f"model {number}" for number in range(len(names), len(models))]
    graphs = [read_tflite(model, name) for model, name in zip(models, names, strict=False)]
    problems = list(check_head.problems(head, models, graphs, data, query))
    if problems:
        return CheckResult(0, tuple(problems[:most]))
    if query is not None and head.query is not None:
        total = len(check_head.cases(head, graphs[0], query))
        labels = np.full(total, -1, np.int64)
        whole = Lines(line_of(head), tuple(models), 0, (), np.zeros(total, np.uint8), labels, query)
    else:
        assert data is not None
        assert head.data is not None
        first, total = head.data.first, head.data.count
        images, labels = data.images[first : first + total], data.labels[first : first + total]
        whole = Lines(line_of(head), tuple(models), first, (), images, labels.astype(np.int64))
    done = 0
    try:
        for answer in mapper(check_lines, _tasks(claim, whole)):
            problems += answer[1]
            done += answer[0]
            if progress:
                progress(min(done, total), total)
            if len(problems) >= most:
                return CheckResult(done, tuple(problems[:most]))
    finally:
        _context.cache_clear()
    if data is not None:
        check_unchanged(data)
    if done != total:
        problems.append(f"data: {done} samples, the head says {total}")
    problems += claim.problems()
    return CheckResult(done, tuple(problems[:most]))


def _tasks(claim: Reader, whole: Lines) -> Iterator[Lines]:
    """The lines of a certificate in portions; ``whole`` has what all of them are about."""
    lines: list[bytes] = []
    size = done = 0

    def task() -> Lines:
        part = slice(done, done + len(lines))
        images, labels = whole.images[part], whole.labels[part]
        first = whole.first + done
        return replace(whole, first=first, lines=tuple(lines), images=images, labels=labels)

    for line in claim.lines():
        lines.append(line)
        size += len(line)
        if len(lines) == _LINES or size >= _BYTES:
            yield task()
            done += len(lines)
            lines, size = [], 0
    if lines:
        yield task()


@lru_cache(maxsize=1)
def _context(head: bytes, models: tuple[bytes, ...], query: bytes | None) -> Context:
    """What all tasks about one certificate share."""
    claim = head_of(head)
    graphs = [
        read_tflite(model, about.file) for model, about in zip(models, claim.models, strict=True)
    ]
    groups = check_head.groups(claim, graphs)
    cases = () if query is None else check_head.cases(claim, graphs[0], query)
    return Context(claim, groups, [LinearChecker(group.graph) for group in groups], cases)


def check_lines(task: Lines) -> tuple[int, list[str]]:
    """How many lines were treated, and what is wrong with them."""
    context = _context(task.head, task.models, task.query)
    count = len(task.labels)
    if count < len(task.lines):
        extra = f"sample {task.first + count}: more samples than the head says"
        return len(task.lines), [extra]
    samples: list[Sample] = []
    for i, line in enumerate(task.lines):
        try:
            samples.append(sample_of(line))
        except DataError as error:
            return len(task.lines), [f"sample {task.first + i}: {error}"]
    found = check_sample.problems(context, task.first, samples, task.images, task.labels)
    return len(task.lines), found
