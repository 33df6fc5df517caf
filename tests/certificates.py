"""Certificates in memory, for tests: made, read and checked without a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO

from cactus_edge.certificate import Head, Sample
from cactus_edge.certificate_stream import Certificate, Reader, write
from cactus_edge.certify import Request, certify
from cactus_edge.check import CheckResult, check
from cactus_edge.datasets import Dataset


def certified(model: bytes, request: Request) -> Certificate:
    """The certificate of one model."""
    stream = BytesIO()
    certify(replace(request, models=(("model.tflite", model),)), stream)
    return read(stream.getvalue())


def read(content: bytes) -> Certificate:
    reader = Reader(BytesIO(content), "memory")
    samples = tuple(reader.samples())
    assert reader.tail is not None
    assert reader.problems() == []
    return Certificate(reader.head, samples, reader.tail)


def encoded(head: Head, samples: Iterable[Sample]) -> bytes:
    """With digest and summary that fit, as a careful forger would write them."""
    stream = BytesIO()
    write(stream, head, samples)
    return stream.getvalue()


def checked(content: bytes, models: bytes | list[bytes], data: Dataset) -> CheckResult:
    """What the checker says about a file's content."""
    given = [models] if isinstance(models, bytes) else models
    return check(Reader(BytesIO(content), "memory"), given, data)
