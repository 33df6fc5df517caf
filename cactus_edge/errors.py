"""The exception tree; every branch carries the exit code that the command line returns.

    CactusEdgeError                 5
    ├── PropertyNotMetError         1   a requested property was checked and does not hold
    ├── UsageError                  2   the call is wrong
    │   ├── DataError               2   a data set, recipe or checkpoint is wrong
    │   ├── OutputError             2   an output exists already or cannot be written
    │   └── MissingExtraError       2   an optional package is not installed
    ├── UnsupportedModelError       3   a model that this tool does not handle
    │   ├── DoesNotFitError         3   a model that is too large for its board
    │   ├── MalformedModelError     3   a file that is not a well-formed model
    │   └── InvalidGraphError       3   a graph that breaks a constraint
    ├── RuntimesDisagreeError       4   two runtimes computed different integers
    └── ToolError                   5   a compiler, an emulator or a runtime failed

A message says what is wrong, where (file, layer, tensor) and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable
from contextlib import contextmanager

__all__ = [
    "CactusEdgeError",
    "DataError",
    "DoesNotFitError",
    "InvalidGraphError",
    "MalformedModelError",
    "MissingExtraError",
    "OutputError",
    "PropertyNotMetError",
    "RuntimesDisagreeError",
    "ToolError",
    "UnsupportedModelError",
    "UsageError",
    "about",
    "counted",
    "meant",
    "shortened",
]


class CactusEdgeError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code: int = 5


def meant(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name in a message: the nearest known one, if one is near."""
    folded = {option.lower(): option for option in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    return f"; did you mean '{folded[near[0]]}'?" if near else ";"


def counted(count: int, noun: str) -> str:
    """Such as ``1 sample`` and ``2,000 samples``."""
    return f"{count:,} {noun if count == 1 else f'{noun}s'}"


def shortened(text: object, most: int = 300) -> str:
    """What a stranger's file makes a message say, on one line of at most ``most`` characters."""
    line = " ".join(str(text)[: 2 * most].split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


class PropertyNotMetError(CactusEdgeError):
    """A property was checked and does not hold."""

    exit_code = 1


class UsageError(CactusEdgeError):
    """The call is wrong: an option, a name, a combination."""

    exit_code = 2


class DataError(UsageError):
    """A data set, a recipe, a checkpoint or a certificate is not what it should be."""


class OutputError(UsageError):
    """An output exists already (use ``--force``) or cannot be written."""


class MissingExtraError(UsageError):
    """An optional package is missing; the message names the line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Name the missing ``package``, the ``extra`` that brings it and what it is needed for."""
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"run: pip install 'cactus-edge[{extra}]'"
        )
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        """How it is sent from one process to another."""
        return MissingExtraError, (self.package, self.extra, self.purpose)


class UnsupportedModelError(CactusEdgeError):
    """A model that this tool does not handle."""

    exit_code = 3


class DoesNotFitError(UnsupportedModelError):
    """A model that is too large for the memory of its board."""


class MalformedModelError(UnsupportedModelError):
    """A file that is not a well-formed model."""


class InvalidGraphError(UnsupportedModelError):
    """A graph that breaks a constraint (see ``constraints``)."""


class RuntimesDisagreeError(CactusEdgeError):
    """Two runtimes computed different integers from the same model and input."""

    exit_code = 4


class ToolError(CactusEdgeError):
    """A compiler, an emulator or a runtime failed."""

    exit_code = 5


@contextmanager
def about(name: object) -> Generator[None]:
    """Say of errors about a model which file it is."""
    try:
        yield
    except UnsupportedModelError as error:
        raise type(error)(f"{name}: {error}") from error
