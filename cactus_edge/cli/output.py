"""Terminal output: progress and messages on stderr, results on stdout, errors in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from cactus_edge import files, shares
from cactus_edge.errors import UsageError

console = Console(stderr=True)
# A pipe has no width; tables are cut to 80 columns there unless told otherwise.
stdout = Console(width=None if sys.stdout.isatty() else 160)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
ServeOption = Annotated[
    bool, typer.Option("--serve", help="Show how far it is in the browser, on this machine alone.")
]
PortOption = Annotated[
    int, typer.Option("--port", help="Port of 127.0.0.1 for --serve; 0 takes a free one.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="A data set's name (docs/training.md lists them) or a .npz file.",
        metavar="NAME",
    ),
]


def emit(result: object, as_json: bool, *tables: Table) -> None:
    """Print ``result`` as JSON, or the tables, each below its title.

    A title is text of its own: rich would break it where the table ends. It is cut nowhere in a
    pipe, and at words on a terminal.
    """
    if as_json:
        text = msgspec.json.format(msgspec.json.encode(result), indent=2)
        typer.echo(text.decode())
        return
    for table in tables:
        title, table.title = table.title, None
        if title:
            line = Text(str(title), style="table.title")
            stdout.print(line, soft_wrap=not stdout.is_terminal)
        for part in _fitted(table, stdout.width):
            stdout.print(part)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A rich table; numbers stand to the right, and what names hold is shown, never obeyed."""
    result = Table(title=inert(title))
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[position]) for row in rows)
        result.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(inert(str(cell))) for cell in row))
    return result


def inert(text: str) -> str:
    """``text`` with what would steer a terminal, such as escape sequences in names, spelled out."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


# With what stands for a byte of a file's name that is no UTF-8, which stdout would refuse.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LONG = 20  # Cells of sentences may be wrapped down to that many characters, all others never.
_FRAME = 3  # What a cell takes beside its text: a space on either side and a line.


def _fitted(whole: Table, width: int) -> Iterator[Table]:
    """``whole``, or where the screen is too narrow its columns in parts, each behind the first.

    Left alone, rich breaks every column of such a table in the middle of words and numbers.
    """
    needed = [_width(column) for column in whole.columns]
    if len(needed) <= 2:
        yield whole
        return
    part = [0]
    for position in range(1, len(needed)):
        if len(part) > 1 and 1 + sum(needed[i] for i in part) + needed[position] > width:
            yield _part(whole, part, width)
            part = [0]
        part.append(position)
    yield _part(whole, part, width)


def _width(column: Column) -> int:
    """The least width at which no word of a column is broken."""
    cells = [str(column.header), *map(str, column.cells)]
    words = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
    return max(words, min(max(map(cell_len, cells)), _LONG)) + _FRAME


def _part(whole: Table, positions: Sequence[int], width: int) -> Table:
    """Some columns of a table; what fits is not wrapped."""
    result = Table()
    columns = [whole.columns[position] for position in positions]
    fits = 1 + sum(map(_width, columns)) <= width
    for column in columns:
        longest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        result.add_column(
            column.header,
            justify=column.justify,
            overflow=column.overflow,
            no_wrap=fits and longest + _FRAME <= _width(column),
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        result.add_row(*row)
    return result


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) or str(cell)[:1].isdigit() or cell in ("", "-")


def percent(fraction: float | None) -> str:
    """A fraction as percent with two decimals; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def drawn(option: str, path: Path | None) -> Path | None:
    """Where a drawing goes; it is SVG, whatever a name says.

    Raises:
        UsageError: the name says otherwise.
    """
    if path is not None and path.suffix.lower() not in ("", ".svg"):
        raise UsageError(f"{option} {path}: drawings are SVG; give a name that ends in .svg")
    return path


def share(fraction: float | None) -> str:
    """A share of samples as percent, rounded down; a dash for None."""
    return "-" if fraction is None else shares.percent(fraction)


@contextmanager
def quieted(quiet: bool) -> Generator[None]:
    """With ``quiet``, only JSON on stdout, and what follows the block, is printed."""
    before = [(screen, screen.quiet) for screen in (console, stdout)]
    for screen, was in before:
        screen.quiet = was or quiet
    try:
        yield
    finally:
        for screen, was in before:
            screen.quiet = was


def say(text: str) -> None:
    """A line on stdout, as it is."""
    stdout.print(inert(text), highlight=False, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """A line on stderr, as it is."""
    console.print(inert(text), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def announced(page: AbstractContextManager[str] | None) -> Generator[None]:
    """Say where ``page`` is served, while it is; None: it is not."""
    with page or nullcontext("") as address:
        if address:
            tell(f"live view: {address}")
        yield


@contextmanager
def bar(title: str, unit: str = "samples") -> Generator[Callable[[int, int], None]]:
    """A progress bar with throughput and remaining time, driven by (done, in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        # At first use kernels are compiled, and large files take a while to be read and hashed.
        task = progress.add_task(title, total=None, rate="preparing")

        def update(done: int, total: int) -> None:
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate)

        yield update


@contextmanager
def working(title: str) -> Generator[None]:
    """A sign of life and the time, for work that cannot be counted."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        progress.add_task(title, total=None)
        yield


def save_json(path: Path, result: Any, *, force: bool) -> None:
    """A result as indented JSON in a file."""
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    files.write(path, text + b"\n", force=force)
