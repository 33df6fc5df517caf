"""What all verbs have in common: ``--quiet``, examples below their help, and Ctrl-C.

It is added to every verb when the command line is put together, so that no verb can lack it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated

import typer

from cactus_edge.cli.output import console, quieted

QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors alone, and what --json asks for.")
]
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

_EXAMPLE = re.compile(r"\s*\bExample:\s+(cactus-edge .*?)(?=\n\s*\n|\s*\Z)", re.DOTALL)


def equip(app: typer.Typer) -> None:
    """Complete all verbs that are registered."""
    for command in app.registered_commands:
        verb = command.callback
        assert verb is not None
        text = inspect.getdoc(verb) or ""
        command.help = _EXAMPLE.sub("", text)
        command.epilog = "\n\n".join(f"Example: {line}" for line in examples(text))
        command.callback = _equipped(verb)


def examples(text: str) -> list[str]:
    """The commands after ``Example:`` in a docstring, each on one line."""
    return [" ".join(found.split()) for found in _EXAMPLE.findall(text)]


def _equipped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one more option, and a word and an exit code for Ctrl-C."""

    @functools.wraps(verb)
    def call(*, quiet: bool, **options: object) -> None:
        try:
            with quieted(quiet):
                verb(**options)
        except KeyboardInterrupt:
            text = "stopped; no unfinished file was left, and the same command starts again"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None

    # Typer reads options from the signature, and their types from the annotations.
    signature = inspect.signature(verb, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    quiet = inspect.Parameter("quiet", kind, default=False, annotation=QuietOption)
    parameters = [*signature.parameters.values(), quiet]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
