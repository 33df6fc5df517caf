"""Held up against auto_LiRPA: the same images, the same radius, real against deployed arithmetic.

auto_LiRPA (the library inside alpha,beta-CROWN) bounds real-valued networks, so it is given the
dequantized weights of the deployed model. It runs in an environment of its own that the first run
makes in ``build/evidence/peers-venv``. Its verdicts are about another object than ours: where it
says robust and a stored input of the box is misclassified, the device is not what was verified.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, decision, files, inputs
from cactus_edge.certificate import Sample
from cactus_edge.certify import Certifier, Settings
from cactus_edge.certify.engine import cover
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.validate.runtimes import peers, runner
from tests.certify.constructed import CASES, Case
from tests.evidence import results
from tests.evidence.peers import environment, export
from tests.evidence.peers.ours import OURS, SECONDS, Box, attacked, counterexample

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "evidence"
MODEL = BUILD / "mnist" / "int8-50.tflite"
EPSILON = "0.1"
IMAGES = 1000
"""The first of the test set; the hard ones are those of them that are classified correctly and not
proved by intervals."""
WHOLE_LEVELS = int(Fraction(EPSILON) * 255)
"""Stored levels that lie inside the real ball."""
POINTS = 100
"""Images on which the exported network is compared with the device."""
THEIRS = {
    "IBP": "IBP",
    "CROWN-IBP": "CROWN-IBP",
    "CROWN": "CROWN",
    "alpha-CROWN": "CROWN-Optimized",
}
"""Name on the page and name of auto_LiRPA's method, with its default settings."""
Points = dict[int, Int64Array]
"""Stored inputs by image."""


@dataclass
class Answers:
    """Of one method, by image: verdict, seconds, (ours) the whole and (theirs) the bound."""

    proved: dict[int, bool] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    sample: dict[int, Sample | None] = field(default_factory=dict)
    margin: dict[int, float] = field(default_factory=dict)

    def median(self, samples: list[int]) -> str:
        return f"{1000 * statistics.median(self.seconds[i] for i in samples):.2f}"


@dataclass(frozen=True)
class Job:
    """Deployed model with boxes of stored integers, and the real boxes on its dequantized form."""

    graph: Graph
    boxes: list[Box]
    lower: export.FloatArray
    upper: export.FloatArray

    def write(self, path: Path) -> str:
        labels = np.array([label for *_, label in self.boxes])
        content = export.encode(self.graph, self.lower, self.upper, labels)
        files.write(path, content, force=True)
        return str(path)


@pytest.fixture(scope="module")
def peer() -> environment.Environment:
    return environment.environment()


@pytest.fixture
def lirpa(peer: environment.Environment) -> Iterator[environment.Lirpa]:
    with environment.Lirpa(peer.python, BUILD / "peers.log") as process:
        yield process


@pytest.fixture(scope="module")
def mnist(data_dir: Path) -> Job:
    if not MODEL.exists():
        pytest.skip(f"{MODEL.name} is made by test_mnist; run it first")
    graph = read_tflite(MODEL.read_bytes(), MODEL.name)
    data = datasets.load("mnist", "test")
    images, labels = data.images[:IMAGES], data.labels[:IMAGES].tolist()
    stored = inputs.stored(graph, images)
    lower, upper = inputs.box(graph, images, inputs.Perturbation.epsilon(EPSILON))
    pixels = np.moveaxis(images.reshape(stored.shape) / 255, -1, 1)
    radius = float(Fraction(EPSILON))
    boxes = list(zip(stored, lower, upper, labels, strict=True))
    return Job(graph, boxes, np.maximum(pixels - radius, 0), np.minimum(pixels + radius, 1))


def ask(
    job: Job, images: list[int], lirpa: environment.Lirpa, methods: Iterable[str]
) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """Every method on every image; image by image, so that load falls on all alike."""
    provers = {name: OURS[name](job.graph) for name in methods}
    ours = {name: Answers() for name in provers}
    theirs = {name: Answers() for name in THEIRS}
    # Compilation and first allocations are no part of anybody's time.
    for prove in provers.values():
        prove(job.boxes[images[0]])
    for method in THEIRS.values():
        lirpa.ask(sample=images[0], method=method)
    for i in images:
        for name, prove in provers.items():
            started = time.perf_counter()
            ours[name].proved[i], ours[name].sample[i] = prove(job.boxes[i])
            ours[name].seconds[i] = time.perf_counter() - started
        for name, method in THEIRS.items():
            answer = lirpa.ask(sample=i, method=method)
            theirs[name].proved[i] = answer["margin"] > 0
            theirs[name].seconds[i] = answer["seconds"]
            theirs[name].margin[i] = answer["margin"]
        # A bound above a point's own lead would be a defect of the adapter, or of the peer.
        point = lirpa.ask(sample=i, method="forward")["margin"]
        assert all(answers.margin[i] <= point + 1e-3 for answers in theirs.values()), i
    return ours, theirs


def _tally(
    label: str,
    images: list[int],
    ours: dict[str, Answers],
    theirs: dict[str, Answers],
    wrong: Collection[int],
) -> Iterator[dict[str, object]]:
    for own, mine in ours.items():
        for other, answers in theirs.items():
            counts = {"both": 0, "only ours": 0, "only theirs": 0, "theirs refuted": 0, "open": 0}
            for i in images:
                pair = (mine.proved[i], answers.proved[i])
                key = {(True, True): "both", (True, False): "only ours", (False, False): "open"}
                only = "theirs refuted" if i in wrong else "only theirs"
                counts[key.get(pair, only)] += 1
            yield {
                "images": label,
                "number": len(images),
                "cactus-edge": own,
                "auto_LiRPA": other,
                **counts,
                "ours ms": mine.median(images),
                "theirs ms": answers.median(images),
            }


def _export_agrees(job: Job, lirpa: environment.Lirpa) -> tuple[float, int]:
    """The float network on the images themselves against the device, in output steps."""
    points = np.stack([stored for stored, *_ in job.boxes[:POINTS]])
    reals = export.real(job.graph, points)
    Job(job.graph, job.boxes[:POINTS], reals, reals).write(BUILD / "peers-points.npz")
    lirpa.ask(load=str(BUILD / "peers-points.npz"))
    answers = [lirpa.ask(sample=i, method="forward")["logits"] for i in range(POINTS)]
    steps = np.array(answers) / export.scale(job.graph, job.graph.logits)
    logits = execute(job.graph, points) - job.graph.tensors[job.graph.logits].zero_point
    inside = (logits > 0) & (logits < 255)
    same = (steps.argmax(axis=1) == logits.argmax(axis=1)).sum()
    return float(np.abs(steps - logits)[inside].max()), int(same)


def _stored_boxes(job: Job) -> Job:
    """The same with auto_LiRPA's boxes widened to all that our boxes hold."""
    lower, upper = (np.stack([box[k] for box in job.boxes]) for k in (1, 2))
    return Job(job.graph, job.boxes, *(export.real(job.graph, end) for end in (lower, upper)))


def _counterexamples(job: Job, ours: dict[str, Answers], images: list[int]) -> Points:
    """Stored inputs that the device misclassifies: of the real ball where one is found."""
    proved = {i for answers in ours.values() for i in images if answers.proved[i]}
    rest = {i: job.boxes[i] for i in images if i not in proved}
    found = attacked(job.graph, rest, Settings())
    for answers in ours.values():
        for i in images:
            point = counterexample(job.graph, job.boxes[i], answers.sample[i])
            if point is not None:
                assert i not in proved, "one method proves what another one refutes"
                found.setdefault(i, point)
    limits = job.graph.tensors[job.graph.core_input].dtype.range
    inner = {}
    for i in found:
        stored, _, _, label = job.boxes[i]
        ends = (np.clip(stored + step, *limits) for step in (-WHOLE_LEVELS, WHOLE_LEVELS))
        inner[i] = (stored, *ends, label)
    return {**found, **attacked(job.graph, inner, Settings(steps=100, restarts=4))}


def _disagreements(
    job: Job, theirs: dict[str, Answers], points: Points, lirpa: environment.Lirpa
) -> list[dict[str, object]]:
    """Images that auto_LiRPA calls robust and the device does not, each with its input."""
    images = [i for i in points if any(answers.proved[i] for answers in theirs.values())]
    if not images:
        return []
    stored = np.stack([points[i] for i in images])
    reals = export.real(job.graph, stored)
    boxes = [job.boxes[i] for i in images]
    lirpa.ask(load=Job(job.graph, boxes, reals, reals).write(BUILD / "peers-points.npz"))
    step = export.scale(job.graph, job.graph.logits)
    logits = execute(job.graph, stored)
    outputs = {
        peer.name: runner(peer, (job.graph, MODEL.read_bytes()))([(job.graph, stored)])[0]
        for peer in peers()
        if peer.package and peer.version
    }
    rows: list[dict[str, object]] = []
    for row, i in enumerate(images):
        label = job.boxes[i][3]
        lead = logits[row, label] - np.delete(logits[row], label).max()
        real = lirpa.ask(sample=row, method="forward")["margin"] / step
        wrong = [n for n, output in outputs.items() if output[row].argmax() != label]
        assert logits[row].argmax() != label
        distance = int(np.abs(stored[row] - job.boxes[i][0]).max())
        claims = [f"{name} {a.margin[i] / step:.2f}" for name, a in theirs.items() if a.proved[i]]
        rows.append(
            {
                "image": i,
                "label": label,
                "auto_LiRPA robust, by steps": ", ".join(claims),
                "levels": distance,
                "input in the real ball": distance <= WHOLE_LEVELS,
                "float lead there": f"{real:.2f}",
                "device's lead there": int(lead),
                "runtimes that misclassify it": f"{len(wrong)} of {len(outputs)}",
            }
        )
    return rows


@pytest.mark.evidence
def test_mnist(peer: environment.Environment, lirpa: environment.Lirpa, mnist: Job) -> None:
    exported = _export_agrees(mnist, lirpa)
    assert exported[0] < 4, "the exported network is not the deployed one but for its rounding"
    assert exported[1] >= POINTS - 1
    loaded = lirpa.ask(load=mnist.write(BUILD / "peers-mnist.npz"))
    images = list(range(IMAGES))
    ours, theirs = ask(mnist, images, lirpa, OURS)
    for weak, strong in itertools.pairwise(ours.values()):
        assert all(strong.proved[i] for i in images if weak.proved[i])
    predictions = decision.predict(execute(mnist.graph, np.stack([b[0] for b in mnist.boxes])))
    right = [i for i in images if predictions[i] == mnist.boxes[i][3]]
    hard = [i for i in right if not ours["interval"].proved[i]]
    points = _counterexamples(mnist, ours, images)
    lirpa.ask(load=_stored_boxes(mnist).write(BUILD / "peers-mnist.npz"))
    _, wider = ask(mnist, hard, lirpa, ())
    rows = [
        row
        for label, part, answers in (
            (f"first {IMAGES}", images, theirs),
            ("hard ones of them", hard, theirs),
            ("hard ones, one box", hard, wider),
        )
        for row in _tally(label, part, ours, answers, points)
    ]
    text = _text(peer, loaded, len(hard), len(points), exported)
    results.write("peers", "Held up against auto_LiRPA on MNIST", text, rows)
    found = _disagreements(mnist, theirs, points, lirpa)
    if found:
        results.write("peers-refuted", "MNIST images on which the two disagree", _REFUTED, found)


_REFUTED = (
    "The images of `peers.md` that auto_LiRPA calls robust and the device misclassifies somewhere "
    f"in the box. {WHOLE_LEVELS} levels lie inside the real ball of epsilon {EPSILON}: the real "
    "number that such an input stands for was covered, and only rounding and clamps are not; an "
    "input one level further out is what a quantizer makes of a real input on the ball's border. "
    "`float lead` is that of the exported network on the very input, in output steps, `device's "
    "lead` the reference executor's; below 0 (or at 0 against a lower index) is misclassified."
)


def _text(
    peer: environment.Environment,
    loaded: dict[str, object],
    hard: int,
    refuted: int,
    exported: tuple[float, int],
) -> str:
    names = " and ".join(f"`{name}`" for name in loaded["supplied"])  # type: ignore[attr-defined]
    text = f"""\
`{MODEL.name}` of the MNIST evidence at epsilon {EPSILON}. auto_LiRPA gets the dequantized weights
and biases with ReLU, without rounding and clamps (`tests/evidence/peers/export.py`), and the real
ball clipped to [0, 1]; cactus-edge the deployed integers and every stored integer that some
quantizer makes of that ball, one level more than the ball at its border. The exported network
differs from the device by at most {exported[0]:.2f} output steps on the first {POINTS} images and
predicts {exported[1]} of them alike.

`both`, `only ours`, `only theirs`: who proves robustness. `theirs refuted`: auto_LiRPA says robust,
yet a stored input of the box was found that the device misclassifies (`peers-refuted.md`). `open`:
neither proves it, misclassified images included. The hard images are the {hard} that are classified
correctly and not proved by intervals, so the first method has none of them by definition. `one
box`: auto_LiRPA is given the real hull of our box of integers, so that only the arithmetic differs.
Over all images {refuted} are refuted by a stored input.

Each of our methods tries those before it first; `complete` may take {SECONDS} s an image. No attack
is part of them. Times are medians over the images, each alone, auto_LiRPA on one thread, methods
taking turns image by image, after one call each that does not count. auto_LiRPA computes in float32
with its default settings (alpha-CROWN: 20 iterations), one specification matrix for all rivals;
only `compute_bounds` is timed. Its bounds are about real arithmetic and are themselves computed
without directed rounding.

`{peer.command}` does not work here as it is: {peer.refusal or "it does"}. So it is installed
without its declared requirements, with torch {loaded["torch"]}; what torch dropped since
({names or "nothing"}) is supplied: it reads a traced graph, and no bound depends on it. Each of its
bounds is compared with the leads of the float network at the box's middle and 16 corners: none lies
above."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


# ---------------------------------------------------------------- the constructed cases
def _job(case: Case) -> Job:
    reals = [export.real(case.graph, end[None]) for end in (case.lower, case.upper)]
    box = (case.centre, case.lower, case.upper, case.label)
    return Job(case.graph, [box], reals[0], reals[1])


@pytest.mark.evidence
def test_constructed_cases(lirpa: environment.Lirpa) -> None:
    rows: list[dict[str, object]] = []
    for name, case in CASES.items():
        job = _job(case)
        lirpa.ask(load=job.write(BUILD / "peers-constructed.npz"))
        steps = export.scale(case.graph, case.graph.logits)
        row: dict[str, object] = {"case": name.replace("_", " ")}
        for method, theirs in THEIRS.items():
            answer = lirpa.ask(sample=0, method=theirs)
            if "unavailable" in answer:
                row[method] = answer["unavailable"]
                continue
            margin = answer["margin"] / steps
            row[method] = f"{'robust' if margin > 0 else 'open'}, {margin:.2f}"
        # In real arithmetic each case is robust: ``test_constructed`` proves it in fractions.
        assert str(row["CROWN"]).startswith("robust"), row
        one = (case.centre[None], case.lower[None], case.upper[None], np.array([case.label]))
        found = Certifier(case.graph).verdicts(0, *one, Settings())[0]
        assert found.verdict != "certified"
        groups = cover(case.graph, None).groups
        verdicts = [
            Certifier(case.graph, [group.names[0]]).verdicts(0, *one, Settings())[0].verdict
            for group in groups
        ]
        row["cactus-edge"] = found.verdict
        row["profiles certified"] = sum(
            len(group.names)
            for group, verdict in zip(groups, verdicts, strict=True)
            if verdict == "certified"
        )
        row["device"] = "misclassifies" if found.verdict == "refuted" else "SOFTMAX ties"
        rows.append(row)
    results.write(
        "peers-constructed",
        "Cases on which real arithmetic is not the device",
        "Models of a few weights (`tests/certify/constructed.py`), each with one box. auto_LiRPA "
        "on the dequantized network, verdict and proved margin in output steps; cactus-edge on the "
        "deployed integers, over all profiles, with its attack; under how many of the "
        f"{len(next(iter(CASES.values())).expected)} profiles alone it certifies. Every point of "
        "each box is executed in `tests/certify/test_constructed.py`, by the reference executor "
        "and by the stock runtimes that are installed.",
        rows,
    )
