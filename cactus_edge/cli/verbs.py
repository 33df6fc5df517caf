"""What all verbs have in common: ``--quiet``, examples, completion, Ctrl-C, safe inputs.

Options that would be ignored are refused, too. All of it is added to every verb when the command
line is put together, so that no verb can lack it.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, get_args

import typer
from typer.models import OptionInfo

from cactus_edge import certificate, datasets, profiles
from cactus_edge.cli.ignored import refuse_ignored
from cactus_edge.cli.output import quieted, tell
from cactus_edge.errors import UsageError

QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors alone, and what --json asks for.")
]
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

OUTPUTS = frozenset(("output", "card", "bom", "svg", "plot", "roofline", "write", "new_key"))
"""Options that name what a verb writes; every other path is read."""

KNOWN: Mapping[str, Iterable[str]] = {
    "calibration": datasets.NAMES,
    "data": datasets.NAMES,
    "method": certificate.VERIFIERS,
    "profile": profiles.PROFILES,
    "split": ("test", "validation", "train"),
}
"""What shells complete the values of options with, by parameter."""

_RUN = "model.safetensors"
"""Of the folder of a run, what cannot be made again but by training."""
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


def refuse_overwriting(options: Mapping[str, object]) -> None:
    """Check the paths of a command, by parameter; ``--force`` is no word for the inputs.

    Raises:
        UsageError: a file would be written twice, or one that is read would be replaced.
    """
    written: dict[str, str] = {}
    for name in sorted(OUTPUTS & options.keys()):
        if isinstance(path := options[name], Path):
            place, option = os.path.realpath(path), f"--{name.replace('_', '-')}"
            if place in written:
                raise UsageError(f"{path}: {written[place]} and {option} need files of their own")
            written[place] = option
    for name, value in options.items():
        for path in () if name in OUTPUTS else _read(value):
            if (place := os.path.realpath(path)) in written:
                raise UsageError(
                    f"{path} is read by this command, and would be replaced; give {written[place]} "
                    "another name"
                )


def _read(value: object) -> Iterator[Path]:
    """Files that the value of an option or argument names."""
    if isinstance(value, str) and value.endswith(".npz"):
        yield Path(value)
    elif isinstance(value, list):
        for entry in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _read(entry)
    elif isinstance(value, Path):
        yield value
        yield value / _RUN


def _given(context: typer.Context) -> dict[str, str]:
    """Options on the command line, by parameter, as their long names have it."""
    source = context.get_parameter_source
    return {
        parameter.name: max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name and getattr(source(parameter.name), "name", "") == "COMMANDLINE"
    }


def _completion(known: Iterable[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def _equipped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one more option, and a word and an exit code for Ctrl-C."""

    @functools.wraps(verb)
    def call(*, context: typer.Context, quiet: bool, **options: object) -> None:
        try:
            refuse_ignored(context.info_name or "", _given(context), options)
            refuse_overwriting(options)
            with quieted(quiet):
                verb(**options)
        except KeyboardInterrupt:
            text = "stopped; no unfinished file was left, and the same command starts again"
            tell(text)
            raise typer.Exit(INTERRUPTED) from None

    # Typer reads options from the signature, and their types from the annotations.
    signature = inspect.signature(verb, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    quiet = inspect.Parameter("quiet", kind, default=False, annotation=QuietOption)
    context = inspect.Parameter("context", kind, annotation=typer.Context)
    parameters = [*signature.parameters.values(), quiet, context]
    for parameter in parameters:
        for info in get_args(parameter.annotation):
            if isinstance(info, OptionInfo) and parameter.name in KNOWN:
                info.autocompletion = _completion(KNOWN[parameter.name])
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
