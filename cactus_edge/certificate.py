"""The certificate: what is claimed, about which bytes, and what lets anyone check it.

A certificate is JSON Lines: a ``Head``, one ``Sample`` a line, a ``Tail`` with the summary and the
SHA-256 of everything before it. It is written and checked as a stream (``certificate_stream``), so
that its length does not matter. Every line is the one canonical encoding of its content.

The JSON schema is published in ``docs/certificate.schema.json`` and generated from these classes.
A certificate names the files by their SHA-256; a file cannot name the certificate in turn, because
each hash would then depend on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from cactus_edge.errors import DataError
from cactus_edge.proofs import Proof

FORMAT = "cactus_edge certificate"
VERSION = 2
LINE_LIMIT = 1 << 24
"""Bytes of the longest line; the certifier writes ``unknown`` where a proof would be longer."""
Method = Literal["interval", "linear", "complete"]
VERIFIERS: dict[Method, str] = {
    "interval": "interval twin with elided margin, exact in integers",
    "linear": "interval twin with elided margin, then linear bounds; exact in integers",
    "complete": "interval twin, linear bounds, then case distinctions; exact in integers",
}
SIDE_CONDITIONS = (
    "every effective multiplier lies in [2^-31, 1)",
    "every accumulator, bias included, is below 2^27 in magnitude",
    "weight zero points are 0",
    "the input reaches the model through the stated input map, rounding to nearest",
)
METHODS: dict[str, tuple[str, ...]] = {
    "certified": ("interval", "elided-margin", "linear", "complete"),
    "refuted": ("sample", "attack", "complete"),
    "unknown": ("interval", "elided-margin", "linear", "complete"),
    "error": ("none",),
}
Verdict = Literal["certified", "refuted", "unknown", "error"]
VERDICTS: tuple[Verdict, ...] = ("certified", "refuted", "unknown", "error")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The certified bytes. ``fingerprint`` covers the arithmetic alone."""

    file: str
    sha256: str
    fingerprint: str
    bytes: int


class Arithmetic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``universal``: every profile was proved to compute the same integers.

    ``conjunction``: one propagation for each group of profiles that differ on this model; a verdict
    of ``certified`` holds under all of ``profiles``. ``uncovered``: known profiles about which the
    certificate says nothing, with the reason.
    """

    rounding: Literal["universal", "conjunction"]
    profiles: tuple[str, ...]
    uncovered: dict[str, str] = {}


class Property(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Over which inputs the decision is claimed, and which decision.

    ``epsilon``: real inputs within ``radius`` (a rational) and [0, 1]. ``levels``: stored integers
    within ``radius`` levels. ``radius``: the largest number of levels, up to ``radius``, is part of
    each sample. ``vnnlib``: the sets are those of the query. ``radii``: one radius for each input
    element instead of ``radius``; 0 fixes it. ``patch``: height, width and stride of a window; each
    of its places is a set of its own, and outside it nothing changes. ``top``: the label is among
    that many largest logits.
    """

    kind: Literal["epsilon", "levels", "radius", "vnnlib"]
    radius: str = ""
    radii: tuple[str, ...] = ()
    patch: tuple[int, ...] = ()
    top: int = 1
    decision: str = ""


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The samples: ``first`` to ``first + count - 1`` of a data set's split."""

    name: str
    split: str
    sha256: str
    first: int
    count: int


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A VNN-LIB file, over ``real`` inputs and outputs or over ``stored`` integers."""

    file: str
    sha256: str
    variables: Literal["real", "stored"]


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hard the search was; it decides what stays ``unknown``, never what is certified.

    ``attack``: the attack's settings, empty where none ran. ``budget``: seconds a sample, empty
    where no method with a budget was allowed. ``memory``: bytes that such a method may use.
    """

    attack: str = ""
    budget: str = ""
    memory: int = 0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line: the claim. A verdict holds for every one of ``models``.

    ``arithmetic`` has an entry for each model. ``method`` is the strongest that was allowed.
    """

    format: str
    version: int
    tool: str
    models: tuple[Model, ...]
    arithmetic: tuple[Arithmetic, ...]
    input_map: dict[str, str | int]
    property: Property
    data: Data | None
    query: Query | None
    method: Method
    search: Search
    verifier: str
    side_conditions: tuple[str, ...]
    how_to_check: str


class Bounds(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Stored logits over the whole box under one group of profiles of one model."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One verdict and its witness.

    ``bounds`` has an entry for each group, in order of models, then of groups: the profiles that
    compute the same integers on a model. ``counterexample`` is the difference of stored integers to
    the sample, hexadecimal int16 little-endian; model number ``model`` misclassifies it under
    ``profile``. ``radius``: the largest number of levels that was certified. ``proofs``: what
    excludes the rivals that the bounds do not.
    """

    index: int
    label: int
    prediction: int
    verdict: Verdict
    method: str
    bounds: tuple[Bounds, ...] = ()
    counterexample: str = ""
    profile: str = ""
    model: int = 0
    message: str = ""
    radius: int | None = None
    proofs: tuple[Proof, ...] = ()


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fractions of all samples; ``attack_accuracy`` only where an attack ran."""

    standard_accuracy: float
    certified_accuracy: float
    attack_accuracy: float | None
    verdicts: dict[str, int]


class Tail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last line. ``digest``: SHA-256 of all lines before and of the summary's JSON."""

    summary: Summary
    digest: str


class Brief(msgspec.Struct, frozen=True):
    """The fields of a sample that the summary counts; other fields are passed over."""

    index: int
    label: int
    prediction: int
    verdict: Verdict


class Tally:
    """SHA-256 and counts of the lines so far, in constant memory."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._verdicts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        self._standard = 0
        self.samples = 0

    def head(self, line: bytes) -> None:
        """Take in the first line, newline included."""
        self._hash.update(line)

    def sample(self, line: bytes) -> Brief:
        """Take in a sample's line, newline included.

        Raises:
            DataError: it is not a sample.
        """
        try:
            brief = msgspec.json.decode(line, type=Brief)
        except _MALFORMED as error:
            raise DataError(f"not a sample: {error}") from None
        self._hash.update(line)
        self.count(brief)
        return brief

    def count(self, sample: Brief | Sample) -> None:
        """Count a verdict without its line."""
        self._verdicts[sample.verdict] += 1
        self._standard += sample.label == sample.prediction and sample.verdict != "error"
        self.samples += 1

    def summary(self, attacked: bool) -> Summary:
        """Of the samples so far; an attacked sample that was not refuted counts as surviving."""
        total = max(self.samples, 1)
        survived = self._verdicts["certified"] + self._verdicts["unknown"]
        return Summary(
            standard_accuracy=self._standard / total,  # float: reported, decides nothing
            certified_accuracy=self._verdicts["certified"] / total,  # float: reported
            attack_accuracy=survived / total if attacked else None,  # float: reported
            verdicts=dict(self._verdicts),
        )

    def digest(self, summary: Summary) -> str:
        """SHA-256 of the lines so far and of this summary."""
        whole = self._hash.copy()
        whole.update(msgspec.json.encode(summary))
        return whole.hexdigest()

    def tail(self, attacked: bool) -> Tail:
        """The last line of a certificate of the lines so far."""
        summary = self.summary(attacked)
        return Tail(summary, self.digest(summary))


_Part = TypeVar("_Part", Head, Sample, Tail)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def summarize(samples: Iterable[Sample], attacked: bool) -> Summary:
    """Count the verdicts of samples that are at hand."""
    tally = Tally()
    for sample in samples:
        tally.count(sample)
    return tally.summary(attacked)


def line_of(part: Head | Sample | Tail) -> bytes:
    """The canonical line, newline included."""
    return msgspec.json.encode(part) + b"\n"


def head_of(line: bytes) -> Head:
    """The first line, decoded.

    Raises:
        DataError: it is no head, or not in canonical form.
    """
    return _decoded(line, Head)


def sample_of(line: bytes) -> Sample:
    """A sample's line, decoded.

    Raises:
        DataError: it is no sample, or not in canonical form.
    """
    return _decoded(line, Sample)


def tail_of(line: bytes) -> Tail:
    """The last line, decoded.

    Raises:
        DataError: it is no tail, or not in canonical form.
    """
    return _decoded(line, Tail)


def _decoded(line: bytes, kind: type[_Part]) -> _Part:
    try:
        part = msgspec.json.decode(line, type=kind)
    except _MALFORMED as error:
        raise DataError(f"not a certificate's {kind.__name__.lower()}: {error}") from None
    # Other encodings of the same content (doubled keys, spaces) could read otherwise elsewhere.
    if line_of(part) != line:
        raise DataError(f"the {kind.__name__.lower()} is not in canonical form")
    return part


def how_to_check(files: Sequence[str], data: str, query: str = "") -> str:
    """The command that re-derives a certificate."""
    what = f"--query {query}" if query else f"--data {data}"
    return f"cactus-edge check CERTIFICATE {' '.join(files)} {what}"


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a line of a certificate: head, sample or tail."""
    kinds = (Head, Sample, Tail)
    lines, components = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of a cactus_edge certificate: the head, then samples, then the tail",
        "anyOf": list(lines),
        "$defs": components,
    }
