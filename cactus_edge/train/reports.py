"""What a training run tells: progress while it runs, history and summary when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from cactus_edge.train.cost import Cost
from cactus_edge.train.evaluate import Accuracy


class EpochRow(msgspec.Struct, frozen=True):
    """One row of ``history.csv``; accuracies are those of the first member on validation data."""

    epoch: int
    epsilon: float
    certified_weight: float
    learning_rate: float
    loss: float
    validation_standard: float
    validation_certified: float


class MemberResult(msgspec.Struct, frozen=True):
    """One member of the compression set.

    Attributes:
        member: its label.
        validation: accuracies on the held-out part of the training data.
        test: accuracies on the test split.
        microseconds_per_sample: of a training step with this member alone: loss and gradient.
    """

    member: str
    validation: Accuracy
    test: Accuracy
    microseconds_per_sample: float = 0.0


class Summary(msgspec.Struct, frozen=True):
    """What ``metrics.json`` holds.

    Attributes:
        output: the run's directory.
        parameters: number of trainable parameters.
        epochs: passes over the training split.
        seconds: of the last uninterrupted stretch.
        samples_per_second: of that stretch, evaluation included.
        epsilon: radius of the certified accuracies.
        domain: of the bounds.
        verifier: that computed them, and its arithmetic.
        members: accuracies per member.
        data_sha256: of the training split.
        start_sha256: of the model that the run started from; empty if it was initialised.
        cost: time and memory; runs before version 0.1 lack it.
    """

    output: str
    parameters: int
    epochs: int
    seconds: float
    samples_per_second: float
    epsilon: float
    domain: str
    verifier: str
    members: tuple[MemberResult, ...]
    data_sha256: str
    start_sha256: str = ""
    cost: Cost | None = None


@dataclass(frozen=True)
class StepReport:
    """Where a run stands.

    Attributes:
        epoch: from 1.
        step: steps done in the whole run.
        total_steps: of the whole run.
        loss: of the last step.
        samples_per_second: since the run started or resumed.
        seconds_left: estimated.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    samples_per_second: float
    seconds_left: float


class Progress(Protocol):
    """Receives reports; rendering is the caller's business."""

    def step(self, report: StepReport) -> None:
        """A few times per second."""
        ...

    def epoch(self, row: EpochRow) -> None:
        """After every epoch."""
        ...
