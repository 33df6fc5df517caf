"""The independent checker: re-derives every line of a certificate from models and data alone.

The trusted base is this file, ``check_head``, ``check_bounds``, ``check_margin`` and
``check_linear`` with ``graph``, ``semantics`` and the tables they read; it shares no code with the
certifier, the executors or the kernels, and uses no float and no compiled code. Its interval
propagation differs from the certifier's on purpose: not a doubled network, but sums and radii.

A certificate is read once, line by line; a part of its lines is a task that any process can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np

from cactus_edge import certificate, check_head, check_margin, decision, inputs
from cactus_edge.certificate import Head, Sample, head_of, line_of, sample_of
from cactus_edge.certificate_stream import Reader
from cactus_edge.check_bounds import Box, logits_box
from cactus_edge.check_head import Group
from cactus_edge.check_linear import LinearChecker
from cactus_edge.datasets import Dataset, Images
from cactus_edge.errors import DataError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Int64Array
from cactus_edge.proofs import Leaf, Proof

_LINES = 250
_BYTES = 1 << 22
"""A task is as many lines as this, or as few as hold this many bytes."""
_SLOW = ("linear", "complete")
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
    """Consecutive lines of a certificate, from sample ``first`` on, and the data they are about."""

    head: bytes
    models: tuple[bytes, ...]
    first: int
    lines: tuple[bytes, ...]
    images: Images
    labels: Int64Array


def check(
    claim: Reader,
    models: Sequence[bytes],
    data: Dataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    most: int = 20,
    mapper: Mapper = map,
) -> CheckResult:
    """Recompute a certificate.

    Args:
        claim: the certificate, of which only the head was read.
        models: the bytes of the ``.tflite`` files, in the order of the claim.
        data: the split that the certificate names.
        progress: called with (samples done, samples in all).
        most: stop after this many problems.
        mapper: does the work; see ``certify.parallel`` for one with several processes.

    Raises:
        UnsupportedModelError: a model cannot be read.
        DataError: the file is cut off, or a line is no line of a certificate.
    """
    head = claim.head
    names = [model.file for model in head.models]
    names += [f"model {number}" for number in range(len(names), len(models))]
    graphs = [read_tflite(model, name) for model, name in zip(models, names, strict=False)]
    problems = list(check_head.problems(head, models, graphs, data))
    if problems:
        return CheckResult(0, tuple(problems[:most]))
    assert head.data is not None
    done = 0
    try:
        for answer in mapper(check_lines, _tasks(claim, tuple(models), data)):
            problems += answer[1]
            done += answer[0]
            if progress:
                progress(min(done, head.data.count), head.data.count)
            if len(problems) >= most:
                return CheckResult(done, tuple(problems[:most]))
    finally:
        _context.cache_clear()
    if done != head.data.count:
        problems.append(f"data: {done} samples, the head says {head.data.count}")
    problems += claim.problems()
    return CheckResult(done, tuple(problems[:most]))


def _tasks(claim: Reader, models: tuple[bytes, ...], data: Dataset) -> Iterator[Lines]:
    assert claim.head.data is not None
    head, first, count = line_of(claim.head), claim.head.data.first, claim.head.data.count
    lines: list[bytes] = []
    size = done = 0

    def task() -> Lines:
        part = slice(first + done, first + min(done + len(lines), count))
        labels = data.labels[part].astype(np.int64)
        return Lines(head, models, first + done, tuple(lines), data.images[part], labels)

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
def _context(
    head: bytes, models: tuple[bytes, ...]
) -> tuple[Head, list[Group], list[LinearChecker]]:
    """What all tasks about one certificate share."""
    claim = head_of(head)
    graphs = [
        read_tflite(model, about.file) for model, about in zip(models, claim.models, strict=True)
    ]
    groups = check_head.groups(claim, graphs)
    return claim, groups, [LinearChecker(group.graph) for group in groups]


def check_lines(task: Lines) -> tuple[int, list[str]]:
    """How many lines were treated, and what is wrong with them."""
    head, groups, linear = _context(task.head, task.models)
    count = len(task.labels)
    if count < len(task.lines):
        extra = f"sample {task.first + count}: more samples than the head says"
        return len(task.lines), [extra]
    graph = groups[0].graph
    stored = inputs.stored(graph, task.images)
    low, high = inputs.box(graph, task.images, check_head.perturbation(head.property))
    points = [logits_box(group.graph, (stored, stored))[0][0] for group in groups]
    bounds = [logits_box(group.graph, (low, high)) for group in groups]
    problems: list[str] = []
    for i, line in enumerate(task.lines):
        facts = _Facts(
            head=head,
            groups=groups,
            linear=linear,
            label=int(task.labels[i]),
            stored=stored[i],
            box=(low[i], high[i]),
            points=[point[i] for point in points],
            logits=[(own[0][i], own[1][i]) for own, _ in bounds],
            hidden=[(own[0][i], own[1][i]) for _, own in bounds],
        )
        try:
            found = facts.problems(sample_of(line), task.first + i)
        except DataError as error:
            found = iter([str(error)])
        problems += [f"sample {task.first + i}: {problem}" for problem in found]
    return len(task.lines), problems


@dataclass(frozen=True, eq=False)
class _Facts:
    """What was derived about one sample; an entry of a list for each group."""

    head: Head
    groups: list[Group]
    linear: list[LinearChecker]
    label: int
    stored: Int64Array
    box: Box
    points: list[Int64Array]
    logits: list[Box]
    hidden: list[Box]

    def problems(self, sample: Sample, index: int) -> Iterator[str]:
        """What is wrong with a sample."""
        classes = self.points[0].size
        if (sample.index, sample.label) != (index, self.label):
            yield "index or label differs from the data"
            return
        if not 0 <= self.label < classes:
            yield f"label {self.label}, yet the model has {classes} logits"
            return
        if sample.method not in _methods(self.head, sample.verdict):
            yield f"'{sample.verdict}' by method '{sample.method}', which is not among those used"
        if sample.verdict == "error":
            yield "'error', yet it can be treated; certify again"
            return
        yield from _stray(sample)
        if sample.prediction != int(self.points[0].argmax()):
            yield f"predicted {self.points[0].argmax()}, not {sample.prediction}"
        expected = [(tuple(low.tolist()), tuple(high.tolist())) for low, high in self.logits]
        if [(own.lower, own.upper) for own in sample.bounds] != expected:
            yield "bounds of the logits differ"
        if sample.verdict == "refuted":
            problem = self._counterexample(sample)
            yield from [problem] if problem else []
            return
        wrong = any(self._wrong(group, self.stored) for group in range(len(self.groups)))
        if wrong and sample.verdict == "certified":
            yield "'certified' cannot be re-derived: the sample itself is misclassified"
            return
        if wrong:
            yield "'unknown', yet the sample itself is misclassified"
            return
        yield from self._proved(sample)

    def _proved(self, sample: Sample) -> Iterator[str]:
        """Whether each rival is excluded in each group, and by the method that is named."""
        rivals = set(range(self.points[0].size)) - {self.label}
        open_: set[tuple[int, int]] = set()
        for number, group in enumerate(self.groups):
            logits, hidden = self.logits[number], self.hidden[number]
            found = check_margin.excluded(group.graph, logits, hidden, self.label)
            open_ |= {(number, rival) for rival in rivals - set(found)}
        if sample.verdict == "unknown":
            if not open_:
                yield "'unknown', yet it can be certified"
            return
        if sample.method not in _SLOW:
            if open_:
                yield "'certified' cannot be re-derived"
            elif (sample.method == "interval") != self._plain():
                yield f"certified, but not by method '{sample.method}'"
            return
        proofs = {(proof.group, proof.rival): proof for proof in sample.proofs}
        if len(proofs) != len(sample.proofs) or not open_ or set(proofs) != open_:
            yield (
                "'certified' cannot be re-derived: the proofs are not about the "
                f"{len(open_)} rivals that bounds and margins leave open"
            )
            return
        if (sample.method == "linear") != all(_single(proof) for proof in sample.proofs):
            yield f"certified, but not by method '{sample.method}'"
        for (number, rival), proof in proofs.items():
            problem = self.linear[number].excluded(self.box, self.label, rival, proof.nodes)
            if problem:
                yield (
                    f"'certified' cannot be re-derived: rival {rival} in group {number}: {problem}"
                )

    def _plain(self) -> bool:
        """Whether stored bounds alone suffice."""
        for group, (low, high) in zip(self.groups, self.logits, strict=True):
            gaps = decision.gaps(group.graph, self.label, low.size)
            behind = low[self.label] >= high + gaps
            behind[self.label] = True
            if not behind.all():
                return False
        return True

    def _wrong(self, group: int, point: Int64Array) -> bool:
        graph = self.groups[group].graph
        own = (
            self.points[group]
            if point is self.stored
            else logits_box(graph, (point[None], point[None]))[0][0][0]
        )
        return bool(decision.surely_wrong(graph, own[None], np.array([self.label]))[0])

    def _counterexample(self, sample: Sample) -> str:
        """What is wrong with a refutation, or an empty string."""
        try:
            content = bytes.fromhex(sample.counterexample)
            difference = np.frombuffer(content, "<i2").astype(np.int64)
        except ValueError:
            return "the counterexample is not hexadecimal int16"
        if (sample.method == "sample") != (difference.size == 0):
            return f"a counterexample of {difference.size} elements by method '{sample.method}'"
        if difference.size not in (0, self.stored.size):
            return f"the counterexample has {difference.size} elements, not {self.stored.size}"
        point = self.stored
        if difference.size:
            point = self.stored + difference.reshape(self.stored.shape)
        if not ((self.box[0] <= point) & (point <= self.box[1])).all():
            return "the counterexample lies outside the perturbation set"
        for number, group in enumerate(self.groups):
            if group.model == sample.model and sample.profile in group.names:
                wrong = self._wrong(number, point)
                return "" if wrong else "the counterexample is classified as labelled"
        return (
            f"the counterexample's profile '{sample.profile}' of model {sample.model} is not among "
            "those certified"
        )


def _methods(head: Head, verdict: str) -> list[str]:
    """The methods that may have led to a verdict, given what the head says was tried."""
    allowed = ["interval", "elided-margin", "sample", "none"]
    if head.search.attack:
        allowed.append("attack")
    if head.method != "interval":
        allowed.append("linear")
    # The search behind linear bounds tries points too; one that breaks the claim is a refutation.
    if head.method == "complete" or (head.method == "linear" and verdict == "refuted"):
        allowed.append("complete")
    return [method for method in certificate.METHODS[verdict] if method in allowed]


def _stray(sample: Sample) -> Iterator[str]:
    """Fields that do not belong to the verdict."""
    refuted = sample.verdict == "refuted"
    if not refuted and (sample.counterexample or sample.profile or sample.model):
        yield f"a counterexample, yet the verdict is '{sample.verdict}'"
    if sample.proofs and not (sample.verdict == "certified" and sample.method in _SLOW):
        yield f"proofs, yet '{sample.verdict}' by '{sample.method}'"
    if sample.message and sample.verdict != "unknown":
        yield f"a message, yet the verdict is '{sample.verdict}'"
    if sample.radius is not None:
        yield "a radius, which is not what was claimed"


def _single(proof: Proof) -> bool:
    """Whether it is one linear bound, without cases."""
    node = proof.nodes[0] if len(proof.nodes) == 1 else None
    return isinstance(node, Leaf) and node.method != "points"
