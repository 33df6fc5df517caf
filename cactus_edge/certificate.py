"""The certificate: what is claimed, about which bytes, and what lets anyone check it.

The JSON schema is published in ``docs/certificate.schema.json`` and generated from these classes.
A certificate names the file by its SHA-256; the file cannot name the certificate in turn, because
each hash would then depend on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from cactus_edge import files
from cactus_edge.errors import DataError

FORMAT = "cactus_edge certificate"
VERSION = 1
VERIFIER = "interval twin with elided margin, exact in integers"
SIDE_CONDITIONS = (
    "every effective multiplier lies in [2^-31, 1)",
    "every accumulator, bias included, is below 2^27 in magnitude",
    "weight zero points are 0",
    "the input reaches the model through the stated input map, rounding to nearest",
)
METHODS = {"certified": ("interval", "elided-margin"), "refuted": ("sample", "attack")}
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
    """``epsilon``: real inputs within ``radius`` and [0, 1]; ``levels``: stored integers."""

    kind: Literal["epsilon", "levels"]
    radius: str
    decision: str


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The samples: ``first`` to ``first + count - 1`` of a data set's split."""

    name: str
    split: str
    sha256: str
    first: int
    count: int


class Bounds(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Stored logits over the whole box under one group of profiles."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One verdict and its witness.

    ``bounds`` has an entry for each group of profiles that computes the same integers.
    ``counterexample`` is the difference of stored integers to the sample, hexadecimal int16
    little-endian; it is misclassified under ``profile``.
    """

    index: int
    label: int
    prediction: int
    verdict: Verdict
    method: str
    bounds: tuple[Bounds, ...] = ()
    counterexample: str = ""
    profile: str = ""
    message: str = ""


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fractions of all samples; ``attack_accuracy`` only where an attack ran."""

    standard_accuracy: float
    certified_accuracy: float
    attack_accuracy: float | None
    verdicts: dict[str, int]


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole certificate; ``digest`` is the SHA-256 of everything else."""

    format: str
    version: int
    tool: str
    model: Model
    arithmetic: Arithmetic
    input_map: dict[str, str | int]
    property: Property
    data: Data
    verifier: str
    side_conditions: tuple[str, ...]
    summary: Summary
    samples: tuple[Sample, ...]
    how_to_check: str
    digest: str = ""


def how_to_check(file: str, data: str) -> str:
    """The command that re-derives a certificate."""
    return f"cactus-edge check CERTIFICATE {file} --data {data}"


def sealed(certificate: Certificate) -> Certificate:
    """With its digest filled in."""
    return msgspec.structs.replace(certificate, digest=digest(certificate))


def digest(certificate: Certificate) -> str:
    """SHA-256 of the certificate without its digest."""
    bare = msgspec.structs.replace(certificate, digest="")
    return hashlib.sha256(msgspec.json.encode(bare)).hexdigest()


def encode(certificate: Certificate) -> bytes:
    """JSON with the digest filled in: one line for the head, one for each sample."""
    text = msgspec.json.encode(sealed(certificate))
    return text.replace(b'{"index":', b'\n{"index":') + b"\n"


def load(path: Path) -> Certificate:
    """Read a certificate.

    Raises:
        UsageError: the file cannot be read.
        DataError: it is not a certificate of this version.
    """
    data = files.read(path, "certificate")
    try:
        certificate = msgspec.json.decode(data, type=Certificate)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a certificate: {error}") from None
    if (certificate.format, certificate.version) != (FORMAT, VERSION):
        raise DataError(
            f"{path}: {certificate.format!r} version {certificate.version}; "
            f"this tool reads {FORMAT!r} version {VERSION}"
        )
    return certificate


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a certificate."""
    described = msgspec.json.schema(Certificate)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def summarize(samples: Sequence[Sample], attacked: bool) -> Summary:
    """Count verdicts; an attacked sample that was not refuted counts as surviving."""
    total = max(len(samples), 1)
    counts = {verdict: sum(s.verdict == verdict for s in samples) for verdict in VERDICTS}
    standard = sum(s.label == s.prediction and s.verdict != "error" for s in samples)
    survived = counts["certified"] + counts["unknown"]
    return Summary(
        standard_accuracy=standard / total,  # float: reported, decides nothing
        certified_accuracy=counts["certified"] / total,  # float: reported, decides nothing
        attack_accuracy=survived / total if attacked else None,  # float: reported
        verdicts=counts,
    )
