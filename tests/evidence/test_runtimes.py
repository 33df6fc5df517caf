"""Models x runtimes x versions x modes x machines: one profile each, one output for universal ones.

Answers are kept in ``build/evidence/runtimes``; delete that folder to run everything again.
``CACTUS_EDGE_STOCK`` may name a folder with more files, such as those of ``stock_keras`` that are
too large to be kept.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest

from tests.evidence.matrix import page
from tests.evidence.matrix.places import Place, places
from tests.evidence.matrix.running import Answer, answer
from tests.evidence.matrix.subjects import Subject, subjects

BUILD = Path(__file__).resolve().parents[2] / "build" / "evidence" / "runtimes"


def kept(place: Place, chosen: list[Subject]) -> Answer:
    """The answer of a place, from an earlier run on the same models if there was one."""
    digest = hashlib.sha256()
    for subject in chosen:
        digest.update(subject.model.content + subject.inputs.tobytes())
    path = BUILD / f"{place.key}-{digest.hexdigest()[:12]}.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())
    found = answer(place, chosen)
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(found))
    partial.rename(path)
    return found


@pytest.mark.evidence
def test_runtimes_versions_modes_and_machines(data_dir: Path) -> None:
    more = os.environ.get("CACTUS_EDGE_STOCK")
    chosen = list(subjects(Path(more) if more else None))
    everywhere = list(places())
    answers: list[tuple[Place, Answer]] = []
    for place in everywhere:
        if place.missing:
            continue
        answers.append((place, kept(place, chosen)))
        print(page.place_row(*answers[-1]), flush=True)
    summaries = [
        page.summary(subject, [(place, found.outcomes[i]) for place, found in answers])
        for i, subject in enumerate(chosen)
    ]
    page.write(everywhere, answers, summaries)
    for place, found in answers:
        assert not any(outcome.mismatches for outcome in found.outcomes), place.key
        assert found.claim.profile == place.peer.profile or found.claim.differing, place.key
    for subject, one in zip(chosen, summaries, strict=True):
        assert subject.universal or subject.origin != "own", subject.name
        assert one.outputs == 1 or not subject.universal, (one.model, one.unlike)
