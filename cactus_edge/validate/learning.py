"""Which named profile does a runtime follow? Asked of the runtime itself, by probing models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np

from cactus_edge import profiles
from cactus_edge.errors import CactusEdgeError
from cactus_edge.execute import execute
from cactus_edge.graph import Int64Array
from cactus_edge.validate.compare import Progress
from cactus_edge.validate.probes import Probe, probes
from cactus_edge.validate.runtimes import Peer, peers, runner

_STOCK = "runtimes"  # the extra that brings them; our own executors follow every profile


class Fit(msgspec.Struct, frozen=True):
    """A runtime against a profile.

    ``elements`` were compared, on the probes that the profile covers; ``mismatches`` of them
    differ; ``differing`` are the kinds of probes in which some do.
    """

    profile: str
    elements: int
    mismatches: int
    differing: tuple[str, ...]


class Learned(msgspec.Struct, frozen=True):
    """What a runtime turned out to follow.

    ``status``: ``fits`` (at least one profile without a mismatch), ``none fits``, ``absent`` or
    ``error``. ``fitting`` profiles are in the order of the table; several are listed where the
    probes that ran cannot tell them apart. ``refused`` are kinds of probes that the runtime cannot
    run, with its message. ``documented`` is the profile that ``validate`` takes for it.
    """

    name: str
    version: str
    documented: str
    status: str
    fitting: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = ()
    refused: dict[str, str] = {}
    message: str = ""


def learn(
    candidates: Sequence[Peer] | None = None, progress: Progress | None = None
) -> tuple[Learned, ...]:
    """Run the probes on every runtime.

    Args:
        candidates: runtimes; all known stock runtimes without it.
        progress: called with (runtimes done, runtimes in all).
    """
    chosen = [p for p in peers() if p.extra == _STOCK] if candidates is None else list(candidates)
    asked, expected = references()
    learned: list[Learned] = []
    for index, peer in enumerate(chosen):
        learned.append(_learn(peer, asked, expected))
        if progress:
            progress(index + 1, len(chosen))
    return tuple(learned)


@cache
def references() -> tuple[tuple[Probe, ...], tuple[dict[str, Int64Array], ...]]:
    """The probes, and for each its outputs int64 [n, ...] under every profile that covers it."""
    asked = tuple(probes())
    return asked, tuple(_expected(probe) for probe in asked)


def _expected(probe: Probe) -> dict[str, Int64Array]:
    outside = profiles.uncovered(probe.graph)
    return {
        name: execute(probe.graph, probe.inputs, name).astype(np.int64)
        for name in profiles.PROFILES
        if name not in outside
    }


def _learn(
    peer: Peer, asked: Sequence[Probe], expected: Sequence[dict[str, Int64Array]]
) -> Learned:
    head = (peer.name, peer.version, peer.profile)
    if peer.absence:
        return Learned(*head, "absent", message=peer.absence)
    outputs, refused = _outputs(peer, asked)
    if all(output is None for output in outputs):
        return Learned(*head, "error", refused=refused, message=next(iter(refused.values())))
    fits = tuple(_fit(name, asked, expected, outputs) for name in profiles.PROFILES)
    fitting = tuple(fit.profile for fit in fits if fit.elements and not fit.mismatches)
    return Learned(*head, "fits" if fitting else "none fits", fitting, fits, refused)


def _outputs(peer: Peer, asked: Sequence[Probe]) -> tuple[list[Int64Array | None], dict[str, str]]:
    """The outputs of all probes, None for kinds that the runtime refuses, with its message."""
    parts = [(probe.graph, probe.inputs) for probe in asked]
    try:
        return list(runner(peer)(parts)), {}
    except (CactusEdgeError, OSError, ValueError):
        pass  # at least one is refused: kind by kind then
    outputs: list[Int64Array | None] = []
    refused: dict[str, str] = {}
    for kind in dict.fromkeys(probe.kind for probe in asked):
        some = [part for part, probe in zip(parts, asked, strict=True) if probe.kind == kind]
        try:
            outputs += runner(peer)(some)
        except (CactusEdgeError, OSError, ValueError) as error:
            refused[kind] = " ".join(str(error).split())
            outputs += [None] * len(some)
    return outputs, refused


def _fit(
    name: str,
    asked: Sequence[Probe],
    expected: Sequence[dict[str, Int64Array]],
    outputs: Sequence[Int64Array | None],
) -> Fit:
    elements = mismatches = 0
    differing: dict[str, None] = {}
    for probe, wanted, found in zip(asked, expected, outputs, strict=True):
        if found is None or name not in wanted:
            continue
        wrong = int((found.reshape(wanted[name].shape) != wanted[name]).sum())
        elements += found.size
        mismatches += wrong
        if wrong:
            differing[probe.kind] = None
    return Fit(name, elements, mismatches, tuple(differing))
