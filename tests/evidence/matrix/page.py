"""The page of the matrix: tables of places, of models, and of what could not be run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cactus_edge import files
from tests.evidence import results
from tests.evidence.matrix.places import NATIVE, Place
from tests.evidence.matrix.running import Answer, Outcome
from tests.evidence.matrix.subjects import EVERYWHERE, Subject

Row = dict[str, object]
COMMAND = "make evidence-runtimes"
_TEXT = f"""Each place is a runtime in one mode on one machine. Its profile is the documented one,
confirmed by probing (`validate --learn-profile`: models of one operator whose accumulators lie
where methods differ), or what probing found. Stock runtimes are given the very files; every layer
is looked at by changing the four bytes that name the output. `elements` are stored integers, of
layers and logits, compared with the reference executor under the profile; a profile does not
describe every model, and then nothing is claimed. Arm and Haswell are emulated by qemu-user with
the wheels that PyPI has for them, so this is about arithmetic, not about speed. Outputs are hashed
over {EVERYWHERE} samples of each model. A model that is not universal shows why this tool exists:
one file, several outputs, sometimes several decisions."""


@dataclass(frozen=True)
class Summary:
    """A model over all places. ``flips``: samples that two places decide differently."""

    model: str
    origin: str
    universal: bool
    places: int
    outputs: int
    hash: str
    differing: int
    logits: int
    flips: int
    samples: int
    unlike: tuple[str, ...]


def summary(subject: Subject, found: Sequence[tuple[Place, Outcome]]) -> Summary:
    """What all places say about a model."""
    ran = [(place, outcome) for place, outcome in found if outcome.logits is not None]
    few = np.stack([outcome.logits[:EVERYWHERE] for _, outcome in ran])
    here = [o.logits for place, o in ran if place.machine == NATIVE]
    most = np.stack(here)
    decisions = most.argmax(axis=2)
    hashes = Counter(outcome.output for _, outcome in ran)
    usual, _ = hashes.most_common(1)[0]
    return Summary(
        model=subject.name,
        origin=subject.origin,
        universal=subject.universal,
        places=len(ran),
        outputs=len(hashes),
        hash=usual[:12],
        differing=int((few != few[0]).any(axis=0).sum()),
        logits=few[0].size,
        flips=int((decisions != decisions[0]).any(axis=0).sum()),
        samples=len(decisions[0]),
        unlike=tuple(place.key for place, outcome in ran if outcome.output != usual),
    )


def place_row(place: Place, answer: Answer) -> Row:
    """A line of the first table."""
    status = Counter(outcome.status for outcome in answer.outcomes)
    profile = answer.claim.profile or "none fits"
    if answer.claim.differing:
        profile += f", except {'; '.join(answer.claim.differing)}"
    return {
        "machine": place.machine,
        "runtime": place.peer.name,
        "version": place.peer.version,
        "profile": profile,
        "probed": answer.claim.elements or "",
        "models equal": status["equal"],
        "without a profile": status["no profile"],
        "refused": status["refused"],
        "elements": sum(outcome.elements for outcome in answer.outcomes),
        "mismatches": sum(outcome.mismatches for outcome in answer.outcomes),
    }


def model_row(found: Summary) -> Row:
    """A line of the second table."""
    return {
        "model": found.model,
        "universal": "yes" if found.universal else "no",
        "places": found.places,
        "distinct outputs": found.outputs,
        "SHA-256": found.hash if found.outputs == 1 else "",
        "logits that differ": f"{found.differing} of {found.logits}",
        "decisions that differ": f"{found.flips} of {found.samples}",
    }


def absent_rows(places: Sequence[Place], answers: Sequence[tuple[Place, Answer]]) -> list[Row]:
    """Lines of the third table: what was not run, once for each reason."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for place in places:
        if place.missing:
            key = place.machine, f"{place.peer.name} {place.peer.version}", place.missing
            rows.setdefault(key, []).append("all")
    for place, answer in answers:
        for outcome in answer.outcomes:
            if outcome.status == "refused":
                name = f"{place.peer.name} {place.peer.version}"
                rows.setdefault((place.machine, name, outcome.message), []).append(outcome.subject)
    return [
        {"machine": machine, "runtime": name, "models": ", ".join(models), "why": why[:200]}
        for (machine, name, why), models in rows.items()
    ]


def write(
    places: Sequence[Place],
    answers: Sequence[tuple[Place, Answer]],
    summaries: Sequence[Summary],
) -> None:
    """``runtimes.md`` and ``runtimes.json`` in ``docs/results``."""
    tables = {
        "Places": [place_row(*pair) for pair in answers],
        "Models": [model_row(found) for found in summaries],
        "What could not be run": absent_rows(places, answers),
    }
    machine = results.machine()
    lines = ["# Runtimes, versions, modes and machines", "", _TEXT, ""]
    lines += [f"Machine: {machine}. Reproduce: `{COMMAND}`, half an hour on two idle cores.", ""]
    for title, rows in tables.items():
        if rows:
            lines += [f"## {title}", "", *results.table(rows), ""]
    outcomes = [
        {
            "machine": place.machine,
            "runtime": place.peer.name,
            "version": place.peer.version,
            **{k: v for k, v in asdict(outcome).items() if k != "logits"},
            "output": outcome.output,
        }
        for place, answer in answers
        for outcome in answer.outcomes
    ]
    record = {
        "title": lines[0].removeprefix("# "),
        "machine": machine,
        "command": COMMAND,
        "places": tables["Places"],
        "models": [asdict(found) for found in summaries],
        "absent": tables["What could not be run"],
        "outcomes": outcomes,
    }
    folder = results.FOLDER
    content = json.dumps(record, indent=1, default=str).encode() + b"\n"
    files.write(folder / "runtimes.json", content, force=True)
    text = "\n".join(lines).rstrip("\n") + "\n"
    files.write(folder / "runtimes.md", text.encode(), force=True)
