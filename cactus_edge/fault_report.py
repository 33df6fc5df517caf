"""The report on weight faults: what is claimed about single bit flips, and what lets one check it.

For each sample and each chosen layer: does the decision stay the label, for every input of the
box, when at most one stored bit of that layer is flipped before the model is loaded? A refuted
layer names the bit (and the input, where it is not the sample itself).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from cactus_edge import files
from cactus_edge.errors import DataError

FORMAT = "cactus_edge faults"
VERSION = 1
_CLAIM = (
    "for every input of the box and at most one flipped bit of a layer's stored tensors the "
    "decision is the label; weights of up to 4 bits are stored as 4-bit two's complement, others "
    "as 8-bit, biases as 32-bit; "
)
_MOMENT = {
    False: "the flip happens before the model is loaded",
    True: "the flip happens after zero points of inputs were folded into the biases",
}
Verdict = Literal["certified", "refuted", "unknown"]
VERDICTS: tuple[Verdict, ...] = ("certified", "refuted", "unknown")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes that the report is about; ``fingerprint`` covers the arithmetic alone."""

    file: str
    sha256: str
    fingerprint: str
    bytes: int


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples ``first`` to ``first + count - 1`` of a data set's split."""

    name: str
    split: str
    sha256: str
    first: int
    count: int


class FaultModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which bits may flip, one at a time.

    ``layers``: indices of operators. ``bits``: positions within a stored weight, 0 the lowest;
    positions that a weight does not have are ignored. ``bias_bits``: how many of the lowest bits of
    each bias may flip as well. ``counted``: whether every site was decided for every sample, so
    that layers state how many sites are safe and critical.

    ``folded``: what a flip does. Without it, everything that a runtime derives from weights is
    derived from the flipped ones: ``w (x - z)`` becomes ``v (x - z)`` for an input ``x`` of zero
    point ``z``. With it, ``- w z`` is part of the bias already, and ``v x - w z`` is computed.
    """

    layers: tuple[int, ...]
    bits: tuple[int, ...] = tuple(range(8))
    bias_bits: int = 0
    counted: bool = False
    folded: bool = False


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chosen layer; ``groups``: each names the profiles that compute the same integers on it.

    ``sites`` may flip; ``uncovered`` of them are not covered by any ``certified``, for ``reason``.
    ``verdicts`` counts samples.
    """

    operator: int
    name: str
    kind: str
    sites: int
    uncovered: int
    reason: str
    groups: tuple[tuple[str, ...], ...]
    verdicts: dict[str, int]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A flip that changes the decision: bit ``bit`` of element ``index`` of a stored tensor.

    ``index`` counts in the stored order; the element holds ``value`` and after the flip
    ``flipped``. ``counterexample``: difference of stored integers to the sample, hexadecimal int16
    little-endian; empty where the sample itself is misclassified.
    """

    tensor: Literal["weights", "bias"]
    index: int
    bit: int
    value: int
    flipped: int
    profile: str
    counterexample: str = ""


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One sample and one layer; ``safe`` and ``critical`` count sites in a counted report.

    At least ``safe`` sites were proved for the whole box, and at least ``critical`` ones change the
    decision on the sample itself.
    """

    verdict: Verdict
    safe: int = 0
    critical: int = 0
    fault: Fault | None = None


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The conjunction over the layers, and each layer in the order of ``FaultModel.layers``.

    ``findings`` is empty where the sample is misclassified without any fault (``refuted``).
    """

    index: int
    label: int
    prediction: int
    verdict: Verdict
    findings: tuple[Finding, ...] = ()


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole report; ``digest`` is the SHA-256 of everything else."""

    format: str
    version: int
    tool: str
    claim: str
    model: Model
    input_map: dict[str, str | int]
    kind: Literal["epsilon", "levels"]
    radius: str
    decision: str
    data: Data
    faults: FaultModel
    profiles: tuple[str, ...]
    uncovered_profiles: dict[str, str]
    layers: tuple[Layer, ...]
    verdicts: dict[str, int]
    samples: tuple[Sample, ...]
    digest: str = ""


def claim(faults: FaultModel) -> str:
    """What ``certified`` says under a fault model, in words."""
    return _CLAIM + _MOMENT[faults.folded]


def conjunction(findings: Sequence[Verdict]) -> Verdict:
    """Refuted where one is, certified where all are, and unknown otherwise."""
    if "refuted" in findings:
        return "refuted"
    return "certified" if all(verdict == "certified" for verdict in findings) else "unknown"


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often each verdict occurs."""
    return {verdict: sum(v == verdict for v in verdicts) for verdict in VERDICTS}


def layer_counts(samples: Sequence[Sample], position: int) -> dict[str, int]:
    """Verdicts of one layer; a sample that is wrong without a fault counts as refuted."""
    return counts([s.findings[position].verdict if s.findings else "refuted" for s in samples])


def digest(report: Report) -> str:
    """SHA-256 of the report without its digest."""
    bare = msgspec.structs.replace(report, digest="")
    return hashlib.sha256(msgspec.json.encode(bare)).hexdigest()


def sealed(report: Report) -> Report:
    """With its digest filled in."""
    return msgspec.structs.replace(report, digest=digest(report))


def encode(report: Report) -> bytes:
    """JSON with the digest filled in: one line for the head, one for each sample."""
    text = msgspec.json.encode(sealed(report))
    return text.replace(b'{"index":', b'\n{"index":') + b"\n"


def load(path: Path) -> Report:
    """Read a report.

    Raises:
        UsageError: the file cannot be read.
        DataError: it is not a report of this version.
    """
    data = files.read(path, "report on faults")
    try:
        report = msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a report on faults: {error}") from None
    if (report.format, report.version) != (FORMAT, VERSION):
        raise DataError(
            f"{path}: {report.format!r} version {report.version}; "
            f"this tool reads {FORMAT!r} version {VERSION}"
        )
    return report
