"""``validate --device``: a board on a serial line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cactus_edge.cli.output import bar, emit, table, tell
from cactus_edge.errors import RuntimesDisagreeError, UsageError, counted

if TYPE_CHECKING:
    from cactus_edge.graph import Graph, Int64Array
    from cactus_edge.validate import Difference


@dataclass(frozen=True)
class BoardOptions:
    """Where the board is, and what is compared; ``timeout`` in seconds."""

    device: str
    baud: int
    timeout: float
    levels: int
    layer_samples: int


def validate_board(
    model: Path, graph: Graph, stored: Int64Array, options: BoardOptions, as_json: bool
) -> None:
    """Compare a board with the reference and print the report.

    Raises:
        UsageError: an option out of its range, no such port, or another model on the board.
        RuntimesDisagreeError: the board computed something else.
    """
    from cactus_edge.validate import Console, opened, validate_device

    if options.baud < 1 or not 0 < options.timeout < 1e6:
        raise UsageError("--baud and --timeout have to be above 0")
    if options.layer_samples < 0:
        raise UsageError(f"--layer-samples {options.layer_samples}: give 0 or more")
    with (
        opened(options.device, options.baud) as line,
        bar("validate", "samples") as progress,
    ):
        board = Console(line, options.device, baud=options.baud, timeout=options.timeout)
        report = validate_device(
            graph,
            stored,
            board,
            options.device,
            levels=options.levels,
            layer_samples=options.layer_samples,
            progress=progress,
        )
    rows = [
        (name.replace("_", " "), value)
        for name, value in msgspec.structs.asdict(report).items()
        if not name.startswith("first")
    ]
    emit(report, as_json, table(f"{model.name} on {options.device}", ("", "value"), rows))
    if report.first is not None:
        show_difference(options.device, report.first)
    if report.first_verdict is not None:
        found = report.first_verdict
        tell(
            f"{options.device}: first verdict that differs: sample {found.sample}, {found.field}: "
            f"expected {found.expected}, found {found.found}"
        )
    if not report.agrees:
        wrong = report.mismatches + report.layer_mismatches
        raise RuntimesDisagreeError(
            f"{options.device}: not those of {model}: {counted(wrong, 'element')}, "
            f"{counted(report.verdict_mismatches, 'verdict')}"
        )


def show_difference(name: str, first: Difference) -> None:
    """One line that says where a runtime first differs."""
    where = f"layer {first.layer} ({first.kind} '{first.name}')"
    tell(
        f"{name}: first difference in {where}, sample {first.sample}, "
        f"element {list(first.position)}: expected {first.expected}, found {first.found}"
    )
