"""One place of the matrix: which profile it follows, and every model in it.

Stock runtimes are given the very files, with the four bytes changed that name the output.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from cactus_edge.errors import CactusEdgeError
from cactus_edge.graph import Int64Array
from cactus_edge.validate import Learned, learn, onnx_runtime
from cactus_edge.validate.child import Worker
from cactus_edge.validate.runtimes import runner
from tests import stock
from tests.evidence.matrix.places import Place
from tests.evidence.matrix.subjects import EVERYWHERE, LAYERS, Subject

_PACKED = {"FULLY_CONNECTED, int4"}
_EMULATED_BYTES = 16_000
"""Stock files up to which an emulated processor computes each layer, on one sample."""
_WINDOWS = "litert-xnnpack-arm"
"""A profile that leaves out the windows that older XNNPACKs compute wrongly."""


Pair = tuple[Subject, list[tuple[str, int]]]
Outputs = list[Int64Array] | str


@dataclass
class Outcome:
    """A model at a place.

    ``status``: ``equal``, ``different``, ``no profile`` (nothing is claimed) or ``refused``.
    ``elements`` and ``mismatches``: against the reference executor under ``profile``, logits and
    layers; ``logits``: stored integers [samples, classes].
    """

    subject: str
    status: str
    profile: str = ""
    message: str = ""
    elements: int = 0
    mismatches: int = 0
    logits: Int64Array | None = None

    @property
    def output(self) -> str:
        """SHA-256 of the logits of the samples that every place runs, or nothing."""
        if self.logits is None:
            return ""
        return hashlib.sha256(self.logits[:EVERYWHERE].astype("<i2").tobytes()).hexdigest()


@dataclass
class Claim:
    """The profile that a place follows: documented, and found by probing."""

    profile: str
    elements: int = 0
    mismatches: int = 0
    differing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def outside(self, subject: Subject) -> str:
        """Why nothing is claimed about a model, or an empty string."""
        if not self.profile:
            return "no profile fits"
        if self.profile in subject.uncovered:
            return subject.uncovered[self.profile]
        if self.differing and subject.has_packed_layers:
            return f"on {', '.join(self.differing)} it follows another profile"
        windows = "SAME" in subject.uncovered.get(_WINDOWS, "")
        return "SAME windows that leave out inputs" if self.differing and windows else ""


@dataclass
class Answer:
    """All of a place."""

    claim: Claim
    outcomes: list[Outcome] = field(default_factory=list)


def answer(place: Place, subjects: list[Subject], suspects: set[str]) -> Answer:
    """Probe the runtime, and run every model; those in ``suspects`` by themselves."""
    claim = _claim(place)
    chosen = [(subject, _wanted(place, subject)) for subject in subjects]
    alone = [pair[0].name in suspects for pair in chosen]
    together = iter(
        _each(place, [p for p, single in zip(chosen, alone, strict=True) if not single])
    )
    outcomes: list[Outcome] = []
    for pair, single in zip(chosen, alone, strict=True):
        outputs = _alone(place, pair) if single else next(together)
        outcomes.append(_outcome(place, claim, *pair, outputs))
    return Answer(claim, outcomes)


def _each(place: Place, chosen: list[Pair]) -> list[Outputs]:
    """The outputs of all models; halves of them where a runtime refuses or crashes."""
    if len(chosen) < 2:
        return [_alone(place, pair) for pair in chosen]
    try:
        return _run(place, chosen)
    except CactusEdgeError:
        middle = len(chosen) // 2
        return _each(place, chosen[:middle]) + _each(place, chosen[middle:])


def _claim(place: Place) -> Claim:
    peer = place.peer
    if peer.extra != "runtimes":
        return Claim(peer.profile)
    (learned,) = learn([peer])
    if learned.status in ("absent", "error"):
        return Claim("", refused=(learned.message,))
    return _fitting(learned)


def _fitting(learned: Learned) -> Claim:
    """What was found; the documented one where that is among it."""
    refused = tuple(learned.refused)
    fits = {fit.profile: fit for fit in learned.fits if fit.elements}
    names = list(learned.fitting)
    if learned.documented in names:
        names.insert(0, learned.documented)
    if not names:
        # XNNPACK up to LiteRT 2.1 leaves int4 layers to another kernel: named, and left out.
        names = [name for name, fit in fits.items() if set(fit.differing) <= _PACKED]
    if not names:
        return Claim("", refused=refused)
    fit = fits[names[0]]
    return Claim(fit.profile, fit.elements, fit.mismatches, fit.differing, refused)


def _samples(place: Place, subject: Subject) -> int:
    few = place.emulated or subject.large or place.peer.extra == "sim"
    return EVERYWHERE if few else len(subject.inputs)


def _wanted(place: Place, subject: Subject) -> list[tuple[str, int]]:
    """The tensors to compute, the logits first, each with a number of samples."""
    graph = subject.graph
    logits = (graph.tensors[graph.logits].name, _samples(place, subject))
    if not place.shows_layers or subject.large:
        return [logits]
    if not place.emulated:
        return [logits, *((name, LAYERS) for name in subject.model.layers)]
    small = len(subject.model.content) <= _EMULATED_BYTES and subject.origin == "stock"
    return [logits, *((name, 1) for name in subject.model.layers if small)]


def _run(place: Place, chosen: list[Pair]) -> list[Outputs]:
    """The outputs of all models, from one process where the runtime is not our own."""
    if place.shows_layers:
        parts = [
            (subject.model, name, subject.inputs[:count])
            for subject, names in chosen
            for name, count in names
        ]
        answers = iter(stock.Layers(place.peer).run(parts))
        return [[next(answers) for _ in names] for _, names in chosen]
    inside: list[Pair] = []
    reasons: list[str] = []
    for subject, names in chosen:
        onnx = place.peer.mode == onnx_runtime.MODE
        reasons.append(onnx_runtime.outside(subject.graph) if onnx else "")
        if not reasons[-1]:
            inside.append((subject, names))
    run = runner(place.peer)
    if place.peer.module.startswith("tests."):
        run = Worker(place.peer.module, place.peer.mode, python=place.peer.python).run
    asked = [(subject.graph, subject.inputs[: names[0][1]]) for subject, names in inside]
    given = iter(run(asked) if asked else [])
    return [reason or [next(given)] for reason in reasons]


def _alone(place: Place, pair: Pair) -> Outputs:
    """A model by itself; its logits alone where that fails.

    LiteRT 1.4's XNNPACK aborts where an operator is left whose output nobody reads.
    """
    subject, names = pair
    message = ""
    for chosen in (names, names[:1]):
        try:
            (outputs,) = _run(place, [(subject, chosen)])
        except (CactusEdgeError, OSError, ValueError) as error:
            message = " ".join(str(error).split())
        else:
            return outputs
    return message


def _outcome(
    place: Place, claim: Claim, subject: Subject, names: list[tuple[str, int]], outputs: Outputs
) -> Outcome:
    if isinstance(outputs, str):
        return Outcome(subject.name, "refused", message=outputs)
    logits = outputs[0].reshape(names[0][1], -1)
    if reason := claim.outside(subject):
        return Outcome(subject.name, "no profile", message=reason, logits=logits)
    elements = mismatches = 0
    for (name, count), found in zip(names, outputs, strict=False):
        wanted = subject.expected(claim.profile, count)[name]
        elements += wanted.size
        mismatches += int(np.count_nonzero(found.reshape(wanted.shape) != wanted))
    status = "different" if mismatches else "equal"
    return Outcome(
        subject.name, status, claim.profile, elements=elements, mismatches=mismatches, logits=logits
    )
