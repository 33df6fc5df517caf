"""Consecutive ranges of samples; certificates in parts, made apart and joined into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from cactus_edge import files
from cactus_edge.certificate import Data, Head, Summary
from cactus_edge.certificate_stream import Writer, reading
from cactus_edge.errors import DataError, UsageError, counted

_SHOWN = 256
"""Progress is told after so many samples."""


class Merged(NamedTuple):
    """What ``merge`` has written."""

    head: Head
    summary: Summary


def selected(first: int, count: int | None, total: int, about: str) -> int:
    """How many samples from ``first`` on are asked for: ``count``, or without it all of them.

    Raises:
        UsageError: they are not among the ``total`` samples of ``about``.
    """
    if not 0 <= first < total:
        raise UsageError(f"--first {first}: samples 0 to {total - 1} are in {about}")
    found = total - first if count is None else count
    if found < 1:
        raise UsageError(f"--samples {found}: at least one is needed")
    if found > total - first:
        raise UsageError(
            f"samples {first} to {first + found - 1} are not in {about}, which has {total}"
        )
    return found


def shard(first: int, count: int, part: tuple[int, int]) -> tuple[int, int]:
    """First sample and number of samples of part ``(i, n)``, the i-th of n consecutive ranges.

    Raises:
        UsageError: there is no such part, or it would be empty.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise UsageError(f"shard {number}/{parts}: give i/n with i from 1 to n")
    start, end = (count * i // parts for i in (number - 1, number))
    if start == end:
        raise UsageError(
            f"shard {number}/{parts} of {counted(count, 'sample')} is empty; use fewer shards"
        )
    return first + start, end - start


def merge(
    shards: Sequence[Path],
    output: Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Join the certificates of consecutive ranges into the certificate of the whole run.

    The shards may be given in any order. The result has the bytes that one run would have written.
    ``progress`` is called with (samples done, samples in all).

    Raises:
        DataError: shards that are not about the same claim, leave a gap or overlap; a damaged one.
        OutputError: ``output`` exists and ``force`` is not given, or it cannot be written.
    """
    files.refuse_existing(output, force)
    heads: list[tuple[Data, Head, Path]] = []
    for path in shards:
        with reading(path) as reader:
            if reader.head.data is None:
                raise DataError(f"{path}: is about a query, not about samples; it has no shards")
            heads.append((reader.head.data, reader.head, path))
    if not heads:
        raise UsageError("give the certificates that are to be joined")
    heads.sort(key=lambda entry: entry[0].first)
    first = heads[0][0].first
    following = first
    for data, head, path in heads:
        if _blank(head) != _blank(heads[0][1]):
            raise DataError(
                f"{path}: makes another claim than {heads[0][2]}: models, data, property, method, "
                "search or version differ"
            )
        if data.first != following or data.count < 1:
            raise DataError(f"{path}: begins at sample {data.first}, expected {following}")
        following += data.count
    whole = _with_range(heads[0][1], first, following - first)
    with files.writing(output, force=force) as stream:
        writer = Writer(stream, whole)
        for data, _, path in heads:
            _append(writer, path, data, partial(_report, progress, first, following))
        summary = writer.finish()
    return Merged(whole, summary)


def _report(
    progress: Callable[[int, int], None] | None, first: int, end: int, following: int
) -> None:
    """Of the samples ``first`` to ``end``, those before ``following`` are done."""
    done, total = following - first, end - first
    if progress is not None and (done == total or not done % _SHOWN):
        progress(done, total)


def _append(writer: Writer, path: Path, data: Data, done: Callable[[int], None]) -> None:
    """All samples of one shard; its own tail has to follow from them."""
    expected = data.first
    with reading(path) as reader:
        for line in reader.lines():
            index = writer.append(line).index
            if index != expected:
                raise DataError(f"{path}: holds sample {index} where {expected} should be")
            expected += 1
            done(expected)
        problems = reader.problems()
    if expected != data.first + data.count:
        problems.append(f"{expected - data.first} samples, the head says {data.count}")
    if problems:
        raise DataError(f"{path}: {problems[0]}")


def _blank(head: Head) -> Head:
    """The claim without its range of samples."""
    return _with_range(head, 0, 0)


def _with_range(head: Head, first: int, count: int) -> Head:
    assert head.data is not None
    data = msgspec.structs.replace(head.data, first=first, count=count)
    return msgspec.structs.replace(head, data=data)
