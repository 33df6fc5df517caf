"""What a report is made from: files of the other verbs, told apart by what they hold.

Only facts about one model go on one page. The first certificate says which model that is; results
of other verbs have to name the same SHA-256, and what names another model is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from cactus_edge import files
from cactus_edge.certificate import FORMAT, VERDICTS, Head, Sample, Summary
from cactus_edge.certificate_stream import reading
from cactus_edge.certify.sweep import Curve
from cactus_edge.errors import DataError, UsageError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph
from cactus_edge.validate import Validation

_LARGEST_RESULT = 1 << 26
SEARCH_FORMAT = "cactus_edge search"


class Start(msgspec.Struct, frozen=True):
    """Start and memory of a runtime, as ``bench`` measures them."""

    load_seconds: float
    memory_kib: int | None


class Figures(msgspec.Struct, frozen=True):
    """What is shown of a runtime that ``bench`` timed, in microseconds for one image."""

    version: str
    median_us: float
    lower_quartile_us: float
    upper_quartile_us: float
    ratio: float
    images_per_second: float
    differing: int
    compared: int
    start: Start | None


class Bench(msgspec.Struct, frozen=True):
    """What is shown of a result of ``bench --json``."""

    model: str
    model_sha256: str
    machine: str
    threads: int
    batch: int
    ours: Figures
    peers: dict[str, Figures]
    absent: dict[str, str]


class SearchedFirmware(msgspec.Struct, frozen=True):
    """What a candidate takes on a microcontroller, program included."""

    flash_bytes: int


class SearchedLatency(msgspec.Struct, frozen=True):
    """What a candidate takes when it is timed on the machine of the search."""

    packed_bytes: int


class SearchedModel(msgspec.Struct, frozen=True):
    """A deployed candidate; ``correct`` and ``certified`` count validation samples."""

    sha256: str
    file_bytes: int
    weights: int
    nonzero: int
    samples: int
    correct: int
    certified: int
    firmware: SearchedFirmware | None = None


class SearchedRow(msgspec.Struct, frozen=True):
    """A candidate among the others; the unit of ``cost`` is the device's."""

    name: str
    model: SearchedModel
    size: int
    cost: float | None
    front: bool
    latency: SearchedLatency | None = None


class SearchedData(msgspec.Struct, frozen=True):
    """What candidates were compared on."""

    name: str
    split: str
    samples: int


class SearchedDevice(msgspec.Struct, frozen=True):
    """What costs were measured on."""

    name: str
    processor: str
    unit: str


class Search(msgspec.Struct, frozen=True):
    """What is shown of ``search.json``."""

    format: str
    version: int
    data: SearchedData
    epsilon: str
    verifier: str
    device: SearchedDevice
    rows: tuple[SearchedRow, ...]


@dataclass(frozen=True)
class Claim:
    """A certificate, counted in one pass.

    Attributes:
        path: of the file.
        sha256: of the file.
        head: its claim.
        summary: its last line's.
        classes: by label, the number of samples of each verdict, and of right predictions.
        samples: the lines that an explorer may show: at most ``limit`` of each verdict.
        radii: of a certificate of radii: how many samples have that largest certified radius.
    """

    path: Path
    sha256: str
    head: Head
    summary: Summary
    classes: dict[int, dict[str, int]]
    samples: tuple[Sample, ...]
    radii: dict[int, int]


@dataclass(frozen=True, eq=False)
class Model:
    """A model's file, read."""

    path: Path
    sha256: str
    bytes: int
    graph: Graph


@dataclass(frozen=True)
class Sources:
    """All that was given; the first of ``claims`` is what the page is about.

    ``models`` are the models of that claim in its order; empty where not all of them were given.
    """

    claims: tuple[Claim, ...]
    models: tuple[Model, ...]
    curves: tuple[Curve, ...]
    searches: tuple[Search, ...]
    benches: tuple[Bench, ...]
    validations: tuple[Validation, ...]

    @property
    def main(self) -> Claim:
        """The claim that the page is about."""
        return self.claims[0]


_Result = TypeVar("_Result", Curve, Search, Validation)


def read(paths: Sequence[Path], limit: int) -> Sources:
    """Read files, and those directly in folders; of a folder what is no result is passed over.

    Args:
        paths: certificates, models, and results of sweep, search, bench and validate; or folders.
        limit: how many samples of each verdict are kept.

    Raises:
        UsageError: a file cannot be read, or no certificate is among them.
        DataError: a file is damaged, or about another model.
        MalformedModelError: a model cannot be read.
    """
    claims: list[Claim] = []
    models: list[Model] = []
    results: list[tuple[Path, object]] = []
    for path, asked in _listed(paths):
        if path.suffix == ".tflite":
            content = files.read(path, "model")
            graph = read_tflite(content, path.name)
            models.append(Model(path, _sha256(content), len(content), graph))
        elif _is_certificate(path):
            claims.append(_claim(path, limit))
        elif path.suffix == ".json":
            found = _results(path)
            if not found and asked:
                raise DataError(
                    f"{path}: no result of sweep -o, search, bench --json or validate --json"
                )
            results += [(path, result) for result in found]
        elif asked:
            raise DataError(
                f"{path}: neither a certificate, nor a .tflite model, nor a .json result"
            )
    if not claims:
        raise UsageError("no certificate among the files; give one that certify or radius wrote")
    return _together(claims, models, results)


def _together(
    claims: Sequence[Claim], models: Sequence[Model], results: Sequence[tuple[Path, object]]
) -> Sources:
    """Sorted by kind, and checked to be about one model."""
    wanted = [model.sha256 for model in claims[0].head.models]
    by_hash = {model.sha256: model for model in models}
    for path, result in results:
        if isinstance(result, (Curve, Bench, Validation)):
            _same_model(path, result.model_sha256, wanted)
    given = tuple(by_hash[sha256] for sha256 in wanted if sha256 in by_hash)
    others = [model.path for model in models if model.sha256 not in wanted]
    if others and not given:
        raise DataError(f"{others[0]}: not the model of {claims[0].path}; give {_names(claims[0])}")
    return Sources(
        claims=tuple(claims),
        models=given if len(given) == len(wanted) else (),
        curves=tuple(_only(results, Curve)),
        searches=tuple(_only(results, Search)),
        benches=tuple(r for _, r in results if isinstance(r, Bench)),
        validations=tuple(_only(results, Validation)),
    )


def _only(results: Iterable[tuple[Path, object]], kind: type[_Result]) -> Iterable[_Result]:
    return (result for _, result in results if isinstance(result, kind))


def _names(claim: Claim) -> str:
    return ", ".join(
        f"{model.file} (SHA-256 {model.sha256[:12]}...)" for model in claim.head.models
    )


def _same_model(path: Path, sha256: str, wanted: Sequence[str]) -> None:
    if not sha256:
        raise DataError(
            f"{path}: does not say which model it is about; make it anew with this tool"
        )
    if sha256 not in wanted:
        raise DataError(
            f"{path}: is about the model with SHA-256 {sha256[:12]}..., and the first certificate "
            "about another; report on one model at a time"
        )


def _listed(paths: Sequence[Path]) -> Iterable[tuple[Path, bool]]:
    """Each file once, with whether it was named itself."""
    seen: set[Path] = set()
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            if file.is_dir() or file.resolve() in seen:
                continue
            seen.add(file.resolve())
            yield file, not path.is_dir()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_certificate(path: Path) -> bool:
    start = b'{"format":"' + FORMAT.encode() + b'"'
    try:
        with path.open("rb") as stream:
            return stream.read(len(start)) == start
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the file ({error.strerror})") from None


def _claim(path: Path, limit: int) -> Claim:
    """Read a certificate once, in bounded memory, and check that it is whole."""
    with reading(path) as reader:
        classes: dict[int, dict[str, int]] = {}
        kept: dict[str, list[Sample]] = {verdict: [] for verdict in VERDICTS}
        radii: dict[int, int] = {}
        for sample in reader.samples():
            counts = classes.setdefault(sample.label, dict.fromkeys((*VERDICTS, "correct"), 0))
            counts[sample.verdict] += 1
            counts["correct"] += sample.label == sample.prediction
            if len(kept[sample.verdict]) < limit:
                # Proofs can be large, and no page shows them.
                kept[sample.verdict].append(msgspec.structs.replace(sample, proofs=()))
            if reader.head.property.kind == "radius":
                radius = -1 if sample.radius is None else sample.radius
                radii[radius] = radii.get(radius, 0) + 1
        problems = reader.problems()
        if problems:
            raise DataError(f"{path}: {problems[0]}")
        assert reader.tail is not None
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        shown = _spread(kept, limit)
        ordered = dict(sorted(classes.items()))
        return Claim(path, sha256, reader.head, reader.tail.summary, ordered, shown, radii)


def _spread(kept: dict[str, list[Sample]], limit: int) -> tuple[Sample, ...]:
    """At most ``limit`` in order of index: the first of each verdict in turn."""
    turns = sorted(
        (turn, number, sample)
        for number, found in enumerate(kept.values())
        for turn, sample in enumerate(found)
    )
    return tuple(sorted((s for _, _, s in turns[:limit]), key=lambda sample: sample.index))


def _results(path: Path) -> list[object]:
    """What a .json file holds; nothing where it is no result that a report shows."""
    if path.stat().st_size > _LARGEST_RESULT:
        return []
    content = files.read(path, "result")
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    entries = found if isinstance(found, list) else [found]
    kinds = [_kind(entry) for entry in entries]
    if not kinds or None in kinds:
        return []
    try:
        return [
            msgspec.convert(entry, kind) for entry, kind in zip(entries, kinds, strict=True) if kind
        ]
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: not what this version of the tool writes: {error}") from None


def _kind(entry: object) -> type[Curve | Bench | Search | Validation] | None:
    if not isinstance(entry, dict):
        return None
    if entry.get("format") == SEARCH_FORMAT:
        return Search
    marks = {
        Curve: {"samples", "correct", "attacked", "points"},
        Bench: {"ours", "peers", "threads"},
        Validation: {"universal", "peers", "runtimes_differ"},
    }
    for kind, names in marks.items():
        if names <= set(entry):
            return kind
    return None
