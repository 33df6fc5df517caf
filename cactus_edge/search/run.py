"""``search``: every candidate converted, measured and compared, one chosen and tested.

    search.json                 the report, written last
    front.svg                   certified accuracy over size
    chosen.tflite               the model that keeps the limits, and
    chosen.certificate.jsonl    its certificate on the test split
    candidates/                 what is kept to resume from, see ``store``

Choices are made on the validation split that training held out. The test split is read once, for
the model that was chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import cactus_edge
from cactus_edge import certificate, datasets, files, flatbuffer
from cactus_edge.bench.machine import machine_name
from cactus_edge.certify import Request as Certification
from cactus_edge.certify import certify
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, ToolError, UnsupportedModelError, UsageError, counted
from cactus_edge.inputs import Perturbation, rational
from cactus_edge.search import budget, drawing, measure
from cactus_edge.search.budget import Limits
from cactus_edge.search.front import front
from cactus_edge.search.report import (
    FORMAT,
    VERSION,
    Candidate,
    Chosen,
    Data,
    Device,
    Latency,
    Report,
    Row,
    Run,
)
from cactus_edge.search.space import Option, Space
from cactus_edge.search.store import Store, key_of
from cactus_edge.shares import percent
from cactus_edge.train.checkpoint import MODEL_FILE, Model, load_model
from firmware_sim import Board

REPORT_FILE = "search.json"
DRAWING_FILE = "front.svg"
CHOSEN_FILE = "chosen.tflite"
CERTIFICATE_FILE = "chosen.certificate.jsonl"
CANDIDATES = "candidates"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to search.

    Attributes:
        runs: directories of training runs, all with the same validation split.
        data: name or path of their data set.
        epsilon: radius to certify, such as ``0.1`` or ``8/255``.
        space: the candidates.
        limits: on what is chosen.
        device: ``host``, a board or a CPU that ``firmware_sim`` knows.
        samples: of the validation split; None for all.
    """

    runs: tuple[Path, ...]
    data: str
    epsilon: str
    space: Space = field(default_factory=Space)
    limits: Limits = field(default_factory=Limits)
    device: str = "host"
    samples: int | None = None


@dataclass(frozen=True)
class _Task:
    """One candidate to make: a run, and how to compress it."""

    path: Path
    sha256: str
    model: Model
    option: Option
    name: str


@dataclass(frozen=True)
class _Splits:
    training: Dataset
    validation: Dataset


def search(
    request: Request,
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Search, and write what was found to ``output``.

    Candidates that an earlier search left in ``output`` are not measured again. ``chosen`` of the
    report is None where no candidate keeps the limits.

    Args:
        request: see there.
        output: a folder.
        force: replace the result of an earlier search.
        progress: called with (samples done, samples of all candidates).
        say: called with what has just been found, a line each.

    Raises:
        UsageError: limits, devices, radii, runs or samples that do not go together.
        DataError: a run, or data that it was not trained on.
        OutputError: ``output`` holds a result already, or cannot be written.
        MissingExtraError: a package of the extras ``verify`` or ``sim`` is missing.
        UnsupportedModelError: no candidate has a deployed form.
    """
    request.limits.check(request.device)
    perturbation = Perturbation("epsilon", rational(request.epsilon))
    board = measure.board_named(request.device)
    drawing.require()
    _refuse(output, force)
    tasks = _tasks(request)
    splits = _splits(request, tasks)
    samples = _count(request, splits.validation)
    store = Store(output / CANDIDATES)
    found: list[tuple[_Task, Candidate]] = []
    failed: dict[str, Exception] = {}
    for number, task in enumerate(tasks):

        def report(done: int, _: int, before: int = number * samples) -> None:
            if progress:
                progress(before + done, len(tasks) * samples)

        try:
            made = _measured(store, task, splits, samples, perturbation, board, report)
        except (UnsupportedModelError, ToolError) as error:
            failed[task.name] = error
            say(f"{task.name}: {error}")
        else:
            found.append((task, made))
            say(f"{task.name}: {percent(made.certified / samples)} % certified")
        report(samples, samples)
    if not found:
        raise next(iter(failed.values()))
    rows = _rows(found, store, splits, request, board)
    choice = budget.choose(rows, request.limits)
    result = Report(
        format=FORMAT,
        version=VERSION,
        tool=f"cactus-edge {cactus_edge.__version__}",
        runs=tuple(dict.fromkeys(Run(str(task.path), task.sha256) for task in tasks)),
        data=_data(splits.validation, samples),
        epsilon=request.epsilon,
        verifier=certificate.VERIFIERS["interval"],
        device=_device(board),
        limits=request.limits,
        rows=rows,
        failed={name: str(error) for name, error in failed.items()},
        chosen=None
        if choice is None
        else _tested(rows[choice], store, request, perturbation, output, say),
        nearest=() if choice is not None else budget.nearest(rows, request.limits),
        needed={} if choice is not None else budget.needed(rows, request.limits),
    )
    drawing.draw(result, output / DRAWING_FILE)
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    files.write(output / REPORT_FILE, text + b"\n", force=True)
    return result


def _refuse(output: Path, force: bool) -> None:
    """An earlier result needs ``force``; so does a folder that no search has made."""
    names = [REPORT_FILE]
    if not (output / CANDIDATES).is_dir():
        names += [DRAWING_FILE, CHOSEN_FILE, CERTIFICATE_FILE]
    for name in names:
        files.refuse_existing(output / name, force)


def _tasks(request: Request) -> list[_Task]:
    """The candidates of all runs."""
    if not request.runs:
        raise UsageError("no run to search in; give one or more")
    tasks: list[_Task] = []
    seen: set[str] = set()
    for path in request.runs:
        model = load_model(path)
        content = files.read(path / MODEL_FILE if path.is_dir() else path, "run")
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in seen:
            raise UsageError(f"{path}: the same model as an earlier run; give each run once")
        seen.add(sha256)
        prefix = f"{path}: " if len(request.runs) > 1 else ""
        tasks += [
            _Task(path, sha256, model, option, prefix + option.name)
            for option in request.space.candidates(model.recipe)
        ]
    return tasks


def _splits(request: Request, tasks: Sequence[_Task]) -> _Splits:
    """What the runs were trained on and what they held out, which has to be the same for all."""
    fractions = {task.path: task.model.recipe.data.validation for task in tasks}
    if len(set(fractions.values())) > 1:
        raise DataError(
            "the runs hold out different validation splits, on which they cannot be compared; "
            "search them one by one"
        )
    training, validation = datasets.load_training(
        request.data, tasks[0].model.recipe.data.validation
    )
    for task in tasks:
        if task.model.metadata.data_sha256 != training.sha256:
            raise DataError(
                f"{task.path}: not trained on '{request.data}' as it is here, so that what is held "
                f"out here may be what it has seen; its recipe says '{task.model.recipe.data.name}'"
            )
    return _Splits(training, validation)


def _count(request: Request, validation: Dataset) -> int:
    total = len(validation.labels)
    samples = total if request.samples is None else request.samples
    if not 0 < samples <= total:
        raise UsageError(
            f"--samples {samples}: the validation split of '{request.data}' has "
            f"{counted(total, 'sample')}"
        )
    return samples


def _measured(
    store: Store,
    task: _Task,
    splits: _Splits,
    samples: int,
    perturbation: Perturbation,
    board: Board | None,
    progress: Progress,
) -> Candidate:
    """From the store, or made and put there."""
    settings = task.option.settings
    key = key_of(
        (
            task.sha256,
            settings.pruned.key(),
            settings.bits,
            task.option.member != "",  # which the file's provenance tells apart
            splits.validation.sha256,
            samples,
            str(perturbation.radius),
            "host" if board is None else board.name,
        )
    )
    kept = store.find(key)
    if kept is None:
        content = measure.deployed(task.model, splits.training, settings)
        kept = measure.candidate(content, splits.validation, samples, perturbation, board, progress)
        store.keep(key, kept, content)
    return kept


def _rows(
    found: Sequence[tuple[_Task, Candidate]],
    store: Store,
    splits: _Splits,
    request: Request,
    board: Board | None,
) -> tuple[Row, ...]:
    """Candidates with their costs, and which of them are on the front."""
    times: Sequence[Latency | None] = [None] * len(found)
    if board is None:
        graphs = [flatbuffer.read_tflite(store.content(made)) for _, made in found]
        times = measure.latencies(graphs, splits.training, splits.validation)
    rows: list[Row] = []
    for (task, made), latency in zip(found, times, strict=True):
        size, cost = made.file_bytes, latency and latency.median
        if made.firmware is not None:
            size, cost = made.firmware.flash_bytes, float(made.firmware.instructions)
        rows.append(
            Row(
                name=task.name,
                command=task.option.command(str(task.path)),
                file=f"{CANDIDATES}/{store.model(made).name}",
                model=made,
                latency=latency,
                size=size,
                cost=cost,
            )
        )
    best = set(front([budget.objectives(row) for row in rows]))
    return tuple(
        msgspec.structs.replace(
            row,
            front=index in best and row.cost is not None,
            meets=budget.meets(row, request.limits),
        )
        for index, row in enumerate(rows)
    )


def _tested(
    row: Row,
    store: Store,
    request: Request,
    perturbation: Perturbation,
    output: Path,
    say: Callable[[str], None],
) -> Chosen:
    """Write the chosen model, and certify it on the test split."""
    say(f"{row.name}: chosen; certifying the test split")
    content = store.content(row.model)
    files.write(output / CHOSEN_FILE, content, force=True)
    test = datasets.load(request.data, "test")
    certification = Certification(test, perturbation, models=((CHOSEN_FILE, content),))
    _, summary = certify(certification, output / CERTIFICATE_FILE, force=True)
    return Chosen(
        name=row.name,
        file=CHOSEN_FILE,
        certificate=CERTIFICATE_FILE,
        data=_data(test, len(test.labels)),
        standard_accuracy=summary.standard_accuracy,
        certified_accuracy=summary.certified_accuracy,
    )


def _data(data: Dataset, samples: int) -> Data:
    return Data(data.name, data.split, data.sha256, samples)


def _device(board: Board | None) -> Device:
    if board is None:
        return Device("host", machine_name(), "us")
    return Device(board.name, board.cpu, "instructions")
