"""The page of the matrix: tables of places, of models, and of what was not run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cactus_edge import files
from tests.evidence import results
from tests.evidence.matrix.places import Place
from tests.evidence.matrix.running import Answer, Outcome
from tests.evidence.matrix.subjects import EVERYWHERE, LAYERS, NATIVE, Subject

Row = dict[str, object]
COMMAND = "make evidence-runtimes"
_TEXT = f"""Each place is a runtime in one mode on one machine. Its profile is the documented one,
confirmed by probing (`validate --learn-profile`: models of one operator whose accumulators lie
where methods differ), or what probing found. Stock runtimes are given the very files; layers are
looked at by changing the four bytes that name the output. `elements` are stored integers, of
layers and logits, compared with the reference executor under the profile; a profile does not
describe every model, and then nothing is claimed (`without a profile`). Here {NATIVE} samples are
run, {LAYERS} of them layer by layer; in generated C, on emulated processors and with files above
200 kB {EVERYWHERE}, over which outputs are hashed.

Other machines than the one below are emulated by qemu-user with the wheels that PyPI has for them
(Cortex-A72 and Cortex-A76 are those of Raspberry Pi 4 and 5), so this is about arithmetic, not
about speed. Kernels that are the same code on every processor of a family, such as the reference
ones, run on one of them. In the table of models, `profiles may differ in` names operators for which
no proof says that all profiles agree; without any, there must be one output. `universalize` leaves
some operators as they are ([universal.md](../universal.md)), so a universalized model may keep
them. The rows of files as they are show why this tool exists: one file, several outputs, sometimes
several decisions (the greatest output)."""


@dataclass(frozen=True)
class Summary:
    """A model over all places.

    ``disagreeing``: kinds of operators on which profiles may differ; ``flips``: samples that two
    places decide differently.
    """

    model: str
    origin: str
    disagreeing: tuple[str, ...]
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
    most = max(len(outcome.logits) for _, outcome in ran)
    decisions = np.stack([o.logits.argmax(axis=1) for _, o in ran if len(o.logits) == most])
    hashes = Counter(outcome.output for _, outcome in ran)
    usual, _ = hashes.most_common(1)[0]
    return Summary(
        model=subject.name,
        origin=subject.origin,
        disagreeing=subject.disagreeing,
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
        "profiles may differ in": ", ".join(found.disagreeing),
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
        {"machine": machine, "runtime": name, "models": ", ".join(models), "why": _short(why)}
        for (machine, name, why), models in rows.items()
    ]


def _short(message: str) -> str:
    """Without what the converter appends to the names of fused operators."""
    return re.sub(r";[^' ]*'", "'", message)[:200]


def write(
    places: Sequence[Place],
    answers: Sequence[tuple[Place, Answer]],
    summaries: Sequence[Summary],
) -> None:
    """``runtimes.md`` and ``runtimes.json`` in ``docs/results``."""
    tables = {
        "Places": [place_row(*pair) for pair in answers],
        "Models": [model_row(found) for found in summaries],
        "What was not run": absent_rows(places, answers),
    }
    machine = results.machine()
    lines = ["# Runtimes, versions, modes and machines", "", _TEXT, ""]
    lines += [f"Machine: {machine}. Reproduce: `{COMMAND}`.", ""]
    for title, rows in tables.items():
        if rows:
            lines += [f"## {title}", "", results.table(rows), ""]
    fields = ("subject", "status", "elements", "mismatches", "output")
    outcomes = {
        place.key: [[getattr(outcome, name) for name in fields] for outcome in answer.outcomes]
        for place, answer in answers
    }
    record = {
        "title": lines[0].removeprefix("# "),
        "machine": machine,
        "command": COMMAND,
        "places": tables["Places"],
        "models": [asdict(found) for found in summaries],
        "absent": tables["What was not run"],
        "fields": fields,
        "outcomes": outcomes,
    }
    folder = results.FOLDER
    content = re.sub(r"\n {4,}|\n {3}(?=\])", " ", json.dumps(record, indent=1)).encode() + b"\n"
    files.write(folder / "runtimes.json", content, force=True)
    text = "\n".join(lines).rstrip("\n") + "\n"
    files.write(folder / "runtimes.md", text.encode(), force=True)
