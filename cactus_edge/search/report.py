"""What a search found, as ``search.json`` holds it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cactus_edge import files
from cactus_edge.errors import DataError
from cactus_edge.search.budget import Limits, Near

FORMAT = "cactus_edge search"
VERSION = 1


class Firmware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On an emulated microcontroller; ``instructions`` is the median of one inference."""

    instructions: int
    flash_bytes: int
    ram_bytes: int
    stack_bytes: int


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A converted model, measured; what is kept to resume from.

    Attributes:
        sha256: of the file.
        file_bytes: of the file.
        universal: whether every runtime computes the same.
        weights: that ship, biases left out.
        nonzero: of these.
        samples: of the validation split.
        correct: samples that are classified as labelled.
        certified: samples that are certified for every rounding profile.
        firmware: None on this machine, and where the board cannot hold the model.
        problem: why the board cannot.
    """

    sha256: str
    file_bytes: int
    universal: bool
    weights: int
    nonzero: int
    samples: int
    correct: int
    certified: int
    firmware: Firmware | None = None
    problem: str = ""


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of one image on one thread; ``packed_bytes`` is what the kernels read."""

    packed_bytes: int
    median: float
    lower_quartile: float
    upper_quartile: float


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate among the others.

    Attributes:
        name: such as ``int4, 50 % pruned``.
        command: that converts the run to the same file.
        file: within the output directory.
        model: its figures.
        latency: on this machine; None if a microcontroller was asked for.
        size: bytes that ship, of the file or in flash.
        cost: microseconds or instructions; None where the board cannot hold the model.
        front: whether no other candidate is as certified, as small and as cheap, and better in one.
        meets: whether it keeps every limit.
    """

    name: str
    command: str
    file: str
    model: Candidate
    latency: Latency | None
    size: int
    cost: float | None
    front: bool = False
    meets: bool = False

    @property
    def standard_accuracy(self) -> float:
        """On the validation samples."""
        return self.model.correct / self.model.samples

    @property
    def certified_accuracy(self) -> float:
        """On the validation samples."""
        return self.model.certified / self.model.samples


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A training run; ``sha256`` is that of its ``model.safetensors``."""

    path: str
    sha256: str


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first ``samples`` of a split."""

    name: str
    split: str
    sha256: str
    samples: int


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``name`` is ``host`` or a board's, ``processor`` its model; ``unit`` is that of the cost."""

    name: str
    processor: str
    unit: str


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model that was chosen, and its figures on the whole test split."""

    name: str
    file: str
    certificate: str
    data: Data
    standard_accuracy: float
    certified_accuracy: float


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole result.

    Attributes:
        format: ``FORMAT``.
        version: ``VERSION``.
        tool: that wrote it.
        runs: where candidates come from.
        data: what candidates were compared on.
        epsilon: radius of certification, as it was given.
        verifier: of the certified accuracies.
        device: what costs were measured on.
        limits: that were asked for.
        rows: every candidate, in the order of the search.
        failed: candidates that could not be converted or certified, with the reason.
        chosen: None if no candidate keeps the limits.
        nearest: then, the candidates that come closest.
        needed: then, by limit, the value that would do, all other limits kept; None if none would.
    """

    format: str
    version: int
    tool: str
    runs: tuple[Run, ...]
    data: Data
    epsilon: str
    verifier: str
    device: Device
    limits: Limits
    rows: tuple[Row, ...]
    failed: dict[str, str]
    chosen: Chosen | None
    nearest: tuple[Near, ...]
    needed: dict[str, float | None]


def read(path: Path) -> Report:
    """Read a ``search.json``.

    Raises:
        UsageError: there is no such file.
        DataError: it is not a result of this version.
    """
    content = files.read(path, "result of a search")
    try:
        report = msgspec.json.decode(content, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a result of a search: {error}; search again") from error
    if (report.format, report.version) != (FORMAT, VERSION):
        raise DataError(
            f"{path}: {report.format!r} version {report.version}; "
            f"this tool reads {FORMAT!r} version {VERSION}"
        )
    return report
