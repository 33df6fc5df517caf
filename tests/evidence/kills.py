"""Kills commands at drawn moments and goes on with them: `python -m tests.evidence.kills FOLDER`.

Every command is a fork of this process, so that torch and the kernels are loaded once. One half of
the kills come after a drawn share of the processor time that the undisturbed command took; the
other half before a drawn one of its operations on files: opening, renaming, linking, removing.
After each kill all that stands under a final name has to be whole, and each command that was gone
on with has to end with the bytes of the undisturbed one. Prints a JSON list of rows.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cactus_edge import datasets
from cactus_edge.certify.partial import partial_of
from cactus_edge.cli import run
from cactus_edge.errors import DataError
from cactus_edge.train import checkpoint
from cactus_edge.train.checkpoint import HISTORY_FILE, METRICS_FILE, MODEL_FILE, STATE_FILE
from tests.train.killed import RECIPE

KILLS = 50
"""Of each command."""
_AT_ONCE = 6
"""At most so many kills before a command may come to its end."""
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
_OPERATIONS = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename"}


@dataclass(frozen=True)
class Command:
    """A command line that ends with the name of its output, and what is to be seen of it."""

    name: str
    words: tuple[str, ...]
    torn: Callable[[Path, Path], int]
    """How many files are not whole, of an output that is compared with the undisturbed one."""
    done: str = ""
    """The file below the output that is there when all is done."""


@dataclass
class Tally:
    """What was seen of one command."""

    kills: int = 0
    at_files: int = 0
    began: int = 0
    resumed: int = 0
    different: int = 0
    torn: int = 0


class Watch:
    """Counts the operations of this process below a folder, and kills it before a drawn one."""

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.last, self.count = str(folder), last, 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in _OPERATIONS or not any(
            str(argument).startswith(self.folder) for argument in arguments[:2]
        ):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(words: list[str], watch: Watch, log: Path, after: float | None) -> tuple[int, float]:
    """Run a command in a fork; its status and the processor time that it took.

    Args:
        words: the command line.
        watch: of the file operations; their count is the last line of the log.
        log: gets what the command prints.
        after: seconds of processor time after which it is killed.
    """
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.addaudithook(watch)
        code = run(words)
        os.write(descriptor, f"\n{watch.count}".encode())
        os._exit(code)
    clock = ~child << 3 | 2  # that of the other process, see clock_getcpuclockid(3)
    while after is not None and not os.waitid(os.P_PID, child, _ENDED):
        if time.clock_gettime(clock) >= after:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def campaign(command: Command, folder: Path, draw: random.Random) -> dict[str, object]:
    """Kill a command again and again; a row of the page."""
    log, undisturbed = folder / "log", folder / "undisturbed" / command.name
    if not command.done:  # forks need not load modules and kernels again
        assert run([*command.words, str(folder / "loading" / command.name)]) == 0
    words = [*command.words, str(undisturbed)]
    code, seconds = forked(words, Watch(undisturbed.parent, 0), log, None)
    assert code == 0, log.read_text()
    operations = int(log.read_text().splitlines()[-1])
    assert command.torn(undisturbed, undisturbed) == 0
    tally = Tally()
    while tally.kills < KILLS:
        output = folder / f"{command.name}-{tally.began}" / command.name
        tally.began += 1
        words = [*command.words, str(output)]
        killed = 0
        for number in range(_AT_ONCE + 1):
            last, after = 0, None
            at_files = draw.random() < 0.5
            if number < _AT_ONCE and at_files:
                last = draw.randint(1, operations)
            elif number < _AT_ONCE:
                after = draw.uniform(0, seconds)
            code, _ = forked(words, Watch(output.parent, last), log, after)
            tally.torn += command.torn(output, undisturbed)
            if code != -signal.SIGKILL:
                break
            killed += 1
            tally.at_files += at_files
            if (output / command.done).exists():
                break  # killed behind its last operation
        assert code == 0 or (output / command.done).exists(), log.read_text()
        tally.kills += killed
        tally.resumed += killed > 0
        for path, expected in _pairs(output, undisturbed):
            tally.different += path.read_bytes() != expected.read_bytes()
    return {
        "command": f"{command.words[0]}: {command.name}",
        "kills": tally.kills,
        "before an operation on files": tally.at_files,
        "commands that were gone on with": tally.resumed,
        "files of theirs with other bytes": tally.different,
        "files that were not whole": tally.torn,
        "processor seconds, undisturbed": f"{seconds:.2f}",
    }


def _pairs(output: Path, undisturbed: Path) -> Iterator[tuple[Path, Path]]:
    """What has to be equal, byte for byte."""
    if output.is_file():
        yield output, undisturbed
    else:
        for name in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
            yield output / name, undisturbed / name


def torn_file(output: Path, undisturbed: Path) -> int:
    """Under its name is nothing, or all of it."""
    return output.exists() and output.read_bytes() != undisturbed.read_bytes()


def torn_certificate(output: Path, undisturbed: Path) -> int:
    """So too, and the unfinished file is its beginning."""
    partial = partial_of(output)
    begun = partial.read_bytes() if partial.exists() else b""
    return torn_file(output, undisturbed) + (not undisturbed.read_bytes().startswith(begun))


def _begin(whole: bytes, begun: bytes) -> None:
    if not whole.startswith(begun):
        raise ValueError


def torn_run(output: Path, undisturbed: Path) -> int:
    """Each file of a run can be read; the history is the beginning of the undisturbed one."""
    history = (undisturbed / HISTORY_FILE).read_bytes()
    readers: dict[str, Callable[[], object]] = {
        MODEL_FILE: lambda: checkpoint.load_model(output),
        STATE_FILE: lambda: checkpoint.load_state(output),
        METRICS_FILE: lambda: json.loads((output / METRICS_FILE).read_bytes()),
        HISTORY_FILE: lambda: _begin(history, (output / HISTORY_FILE).read_bytes()),
    }
    torn = 0
    for name, read in readers.items():
        try:
            if (output / name).exists():
                read()
        except (DataError, ValueError):
            torn += 1
    return torn


def commands(folder: Path) -> list[Command]:
    """Each works on what the one before made, undisturbed."""
    recipe, made = folder / "recipe.toml", folder / "undisturbed"
    recipe.write_text(RECIPE)
    model = str(made / "model.tflite")
    certify = ("certify", model, "--data", "digits", "--eps", "0.02", "-q", "--resume")
    names = ("a-run", "model.tflite", "interval.jsonl", "linear.jsonl", "report.html")
    train = ("train", str(recipe), "--device", "cpu", "--checkpoint-every", "0", "--resume", "-o")
    report = ("report", str(made / names[2]), model, "-n", "20", "-q", "-o")
    return [
        Command(names[0], train, torn_run, METRICS_FILE),
        Command(names[1], ("convert", str(made / names[0]), "-q", "-o"), torn_file),
        Command(names[2], (*certify, "-n", "300", "-o"), torn_certificate),
        Command(names[3], (*certify, "-n", "60", "--method", "linear", "-o"), torn_certificate),
        Command(names[4], report, torn_file),
    ]


def main(folder: Path) -> None:
    """Run the campaign of each command."""
    torch.set_num_threads(1)
    datasets.load("digits", "test")
    draw = random.Random(0)
    rows: list[dict[str, object]] = []
    for command in commands(folder):
        rows.append(campaign(command, folder, draw))
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
