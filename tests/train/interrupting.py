"""A progress display that presses Ctrl-C."""

from __future__ import annotations

import signal

from cactus_edge.train.reports import EpochRow, StepReport


class InterruptAfter:
    """Presses Ctrl-C at a step, the way a user does; ``rows`` are the epochs that ended."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.rows: list[EpochRow] = []

    def step(self, report: StepReport) -> None:
        assert 0 < report.step <= report.total_steps and report.samples_per_second > 0
        if report.step == self.at:
            signal.raise_signal(signal.SIGINT)

    def epoch(self, row: EpochRow) -> None:
        self.rows.append(row)
