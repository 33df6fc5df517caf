"""Logs for TensorBoard, beside ``history.csv``.

Event files can only be appended to. So a run that is resumed writes them anew from its history:
every epoch is there once, whatever was lost or written twice, and a run that was begun without
logs gets them for all its epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from cactus_edge.train.cost import EpochCost
from cactus_edge.train.reports import EpochRow

DIRECTORY = "tensorboard"
_EVENTS = "events.out.tfevents.*"


class Logs:
    """The event file of one run."""

    def __init__(
        self, output: Path, history: Sequence[EpochRow], costs: Mapping[int, EpochCost]
    ) -> None:
        """Replace earlier logs in ``output`` by the epochs that are done."""
        clear(output)
        self._logger = TensorBoardLogger(output, name=DIRECTORY, version="")
        for row in history:
            self.epoch(row, costs.get(row.epoch))

    def epoch(self, row: EpochRow, cost: EpochCost | None) -> None:
        """Write an epoch's scalars."""
        scalars = {
            "loss": row.loss,
            "validation/standard": row.validation_standard,
            "validation/certified": row.validation_certified,
            "schedule/epsilon": row.epsilon,
            "schedule/lambda": row.certified_weight,
            "schedule/learning_rate": row.learning_rate,
        }
        if cost is not None:
            scalars["cost/samples_per_second"] = cost.samples_per_second
        self._logger.log_metrics(scalars, row.epoch)
        self._logger.save()

    def close(self) -> None:
        """Write what is left."""
        self._logger.finalize("success")


def clear(output: Path) -> None:
    """Remove the event files of a run."""
    directory = output / DIRECTORY
    for file in directory.glob(_EVENTS):
        file.unlink()
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
