"""Models x runtimes x versions x modes x machines: one profile each, one output for universal ones.

Answers are kept in ``build/evidence/runtimes``; delete that folder to run everything again.
``CACTUS_EDGE_STOCK`` may name a folder with more files, such as those of ``stock_keras`` that are
too large to be kept; ``CACTUS_EDGE_MACHINES`` the machines to run on, such as ``x86_64,Haswell``.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cactus_edge import files
from cactus_edge.profiles import PROFILES
from tests.evidence.matrix import page
from tests.evidence.matrix.places import Place, places
from tests.evidence.matrix.running import Answer, Claim, Outcome, answer
from tests.evidence.matrix.subjects import Subject, subjects

BUILD = Path(__file__).resolve().parents[2] / "build" / "evidence" / "runtimes"


def kept(place: Place, chosen: list[Subject], suspects: set[str]) -> Answer:
    """The answer of a place, from an earlier run on the same models and profiles if there was."""
    digest = hashlib.sha256(repr(PROFILES).encode())
    for subject in chosen:
        digest.update(subject.model.content + subject.inputs.tobytes())
    path = BUILD / f"{place.key}-{digest.hexdigest()[:12]}.json"
    if path.exists():
        return restored(path.read_bytes())
    found = answer(place, chosen, suspects)
    BUILD.mkdir(parents=True, exist_ok=True)
    files.write(path, stored(found), force=True)
    return found


def stored(found: Answer) -> bytes:
    """An answer as JSON."""
    return msgspec.json.encode(found, enc_hook=lambda logits: logits.tolist())


def restored(data: bytes) -> Answer:
    """What ``stored`` made of an answer."""

    def hook(_kind: type, value: object) -> object:
        return np.array(value, np.int64)

    return msgspec.json.decode(data, type=Answer, dec_hook=hook)


def test_answers_are_kept_as_they_are() -> None:
    logits = np.arange(-6, 6).reshape(4, 3)
    outcomes = [Outcome("a", "equal", "tflite-micro", "", 12, 0, logits), Outcome("b", "refused")]
    found = Answer(Claim("tflite-micro", 7, 0, ("ADD",)), outcomes)
    again = restored(stored(found))
    assert again.claim == found.claim and again.outcomes[1] == outcomes[1]
    kept_logits = again.outcomes[0].logits
    assert kept_logits is not None and np.array_equal(kept_logits, logits)
    assert again.outcomes[0].output == outcomes[0].output != ""


def asked_for(place: Place) -> Place:
    """The place, missing where ``CACTUS_EDGE_MACHINES`` leaves it out."""
    machines = os.environ.get("CACTUS_EDGE_MACHINES", place.machine).split(",")
    left_out = "" if place.machine in machines else "left out of this run by CACTUS_EDGE_MACHINES"
    return replace(place, missing=place.missing or left_out)


def not_reached(place: Place) -> Place:
    """What the page says of a place while the run is under way, and if it is stopped."""
    return replace(place, missing=place.missing or "not reached: the run was stopped before")


@pytest.mark.evidence
def test_runtimes_versions_modes_and_machines(data_dir: Path) -> None:
    more = os.environ.get("CACTUS_EDGE_STOCK")
    chosen = list(subjects(Path(more) if more else None))
    everywhere = [asked_for(place) for place in places()]
    answers: list[tuple[Place, Answer]] = []
    suspects: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    summaries: list[page.Summary] = []
    for number, place in enumerate(everywhere, 1):
        if place.missing:
            continue
        found = kept(place, chosen, suspects[place.peer.package, place.peer.mode])
        answers.append((place, found))
        refused = {outcome.subject for outcome in found.outcomes if outcome.status == "refused"}
        suspects[place.peer.package, place.peer.mode] |= refused
        print(page.place_row(*answers[-1]), flush=True)
        summaries = [
            page.summary(subject, [(place, found.outcomes[i]) for place, found in answers])
            for i, subject in enumerate(chosen)
        ]
        page.write(
            [*everywhere[:number], *map(not_reached, everywhere[number:])], answers, summaries
        )
    for place, found in answers:
        assert not any(outcome.mismatches for outcome in found.outcomes), place.key
        assert found.claim.profile == place.peer.profile or found.claim.differing, place.key
    for one in summaries:
        assert one.origin != "own" or not one.disagreeing, one.model
        assert one.outputs == 1 or one.disagreeing, (one.model, one.unlike)
