"""The command ``cactus-edge``: verbs, exit codes, progress. No logic.

Exit codes: 0 ok, 1 property not met, 2 usage, 3 unsupported model, 4 runtimes disagree, 5 tool
failure. Whatever this package raises on purpose becomes one line on stderr.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.text import Text

import cactus_edge
from cactus_edge.cli import (
    comparing,
    converting,
    exporting,
    faults,
    firmware,
    inspecting,
    kernels,
    making,
    properties,
    proving,
    reporting,
    running,
    searching,
    signing,
    verbs,
)
from cactus_edge.cli.output import console, inert
from cactus_edge.errors import CactusEdgeError, ToolError

app = typer.Typer(
    name="cactus-edge",
    help="Train, convert, certify and prove quantized networks, bit for bit as deployed.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MODULES = (
    making,
    converting,
    exporting,
    searching,
    inspecting,
    proving,
    properties,
    signing,
    faults,
    running,
    firmware,
    kernels,
    comparing,
    reporting,
)
for module in _MODULES:
    module.register(app)
verbs.equip(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(cactus_edge.__version__)
        raise typer.Exit


@app.callback()
def _common(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the library's log.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the project's code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        app(args=arguments)
    except CactusEdgeError as error:
        _fail(str(error))
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except OSError as error:  # such as a full disk behind stdout
        logging.getLogger(__name__).info("the refusal, in full", exc_info=True)
        text = f"{error}; the system refused this, --verbose shows where"
        _fail(text)
        return ToolError.exit_code
    except KeyboardInterrupt:  # between the verbs: while they are read or when they are done
        return verbs.INTERRUPTED
    except Exception as error:  # a defect: still one line, and never the code of a verdict
        logging.getLogger(__name__).info("the defect, in full", exc_info=True)
        text = f"{type(error).__name__}: {error}; this is a defect, --verbose shows where"
        _fail(text)
        return ToolError.exit_code
    return 0


def _fail(text: str) -> None:
    """One line, with nothing that rich would take for markup or a terminal for a command."""
    line = inert(" ".join(text.split()))
    console.print(Text.assemble(("error:", "red"), " ", line), highlight=False, soft_wrap=True)
