"""What each method decides, what it costs, and how large its certificates are.

``search`` is what the complete search decides on a network that was not trained for it;
``certification`` compares the methods on the MNIST models that ``test_mnist`` leaves behind.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import joblib
import numpy as np
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.certificate import Sample
from cactus_edge.certificate_stream import load
from cactus_edge.certify import Certifier, Settings
from cactus_edge.certify.decide import Decider, Effort
from cactus_edge.certify.engine import cover
from cactus_edge.certify.linear.bounds import lower_bound, propagate
from cactus_edge.certify.linear.goals import pair_goal
from cactus_edge.certify.linear.search import Budget
from cactus_edge.check_linear import LinearChecker
from cactus_edge.decision import gaps
from cactus_edge.graph import Graph
from cactus_edge.inputs import Perturbation
from tests.evidence import results, small_network
from tests.evidence.test_mnist import BUILD, call

QUERIES = 350
SEARCHED = 100
RADII = (1, 2, 3, 4)
SECONDS = 60
MODELS = {"int8, 50 % sparse": "int8-50", "int4, 80 % sparse": "int4-80"}


def boxes(stored: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(stored - radius, -128), np.minimum(stored + radius, 127)


def decide(graph: Graph, stored: np.ndarray, labels: np.ndarray, first: int, radius: int):  # noqa: ANN201
    """Complete search on one sample, in a process of its own."""
    certifier = Certifier(graph, None, Effort("complete", Budget(SECONDS)))
    started = time.monotonic()
    [sample] = certifier.verdicts(first, stored, *boxes(stored, radius), labels, Settings())
    return sample, time.monotonic() - started


@pytest.mark.evidence
def test_complete_search_on_a_small_network(data_dir: Path) -> None:
    graph = small_network.train()
    data = datasets.load("mnist", "test")
    stored = small_network.pixels(data.images[:QUERIES])
    labels = data.labels[:QUERIES].astype(np.int64)
    rows: list[dict[str, object]] = []
    quick = 0.0
    for method in ("interval", "linear"):
        certifier = Certifier(graph, None, Effort(method))
        certifier.verdicts(0, stored[:2], *boxes(stored[:2], 1), labels[:2], Settings())
        for radius in RADII:
            started = time.monotonic()
            found = certifier.verdicts(0, stored, *boxes(stored, radius), labels, Settings())
            seconds = time.monotonic() - started
            quick += seconds if method == "linear" else 0
            rows.append(row(method, radius, found, seconds))
    tasks = [(i, radius) for radius in RADII for i in range(SEARCHED)]
    started = time.monotonic()
    answers = joblib.Parallel(n_jobs=2)(
        joblib.delayed(decide)(graph, stored[i : i + 1], labels[i : i + 1], i, radius)
        for i, radius in tasks
    )
    wall = time.monotonic() - started
    checker = LinearChecker(cover(graph, None).groups[0].graph)
    for radius in RADII:
        part = [a for a, (_, r) in zip(answers, tasks, strict=True) if r == radius]
        samples = [sample for sample, _ in part]
        rows.append(row("complete", radius, samples, sum(seconds for _, seconds in part)))
        for sample in samples:
            box = boxes(stored[sample.index], radius)
            for proof in sample.proofs:
                assert checker.excluded(box, sample.label, proof.rival, proof.nodes) == ""
    undecided = sum(sample.verdict == "unknown" for sample, _ in answers)
    share = 100 * (1 - undecided / len(answers))
    results.write(
        "search",
        "Complete search on a network that was not trained for it",
        f"784-64-10, 6-bit weights and activations, 8-bit MNIST pixels, radius in levels of 255; "
        f"{QUERIES} test images with bounds and attack, {SEARCHED} with complete search of at most "
        f"{SECONDS} s each on one of two processes. All {len(RADII) * QUERIES} queries with linear "
        f"bounds and attack: {quick:.1f} s. Complete search decides {share:.1f} % of "
        f"{len(answers)} queries (wall time {wall:.0f} s); every proof was accepted by the "
        "independent checker. `seconds` are summed over samples.",
        rows,
    )
    assert share >= 95
    assert quick <= 15


def row(method: str, radius: int, samples: list[Sample], seconds: float) -> dict[str, object]:
    verdicts = Counter(sample.verdict for sample in samples)
    return {
        "method": method,
        "radius": radius,
        "queries": len(samples),
        "certified": verdicts["certified"],
        "refuted": verdicts["refuted"],
        "unknown": verdicts["unknown"],
        "seconds": f"{seconds:.1f}",
    }


@pytest.mark.evidence
def test_methods_on_the_mnist_models(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    """For the models of the repository, by method, with the attack as the other side."""
    rows: list[dict[str, object]] = []
    for title, name in MODELS.items():
        model = BUILD / f"{name}.tflite"
        if not model.exists():
            pytest.skip("test_mnist makes the models; run all of `make evidence`")
        linear_rate = _linear_rate(model)
        for method in ("interval", "linear", "complete"):
            claim = BUILD / f"{name}-{method}.jsonl"
            options = ["--jobs", 2, "--budget", 20] if method == "complete" else []
            outcome, seconds = call(
                capsys, "certify", model, "--data", "mnist", "--eps", "0.1", "--method", method,
                "--attack", "-o", claim, "--force", *options,
            )  # fmt: skip
            checked, check_seconds = call(capsys, "check", claim, model, "--data", "mnist")
            assert checked["agrees"]
            samples = load(claim).samples
            by_bounds = sum(s.method == "interval" and s.verdict == "certified" for s in samples)
            certified, attacked = outcome["certified_accuracy"], outcome["attack_accuracy"]
            assert isinstance(certified, float)
            assert isinstance(attacked, float)
            if method == "interval":
                rows.append(
                    {
                        "model": title,
                        "method": "interval alone",
                        "certified %": f"{100 * by_bounds / len(samples):.2f}",
                        "attack %": f"{100 * attacked:.2f}",
                        "unknown": "",
                        "seconds": "",
                        "check s": "",
                        "bytes a sample": "",
                    }
                )
            shown = {"interval": "interval, elided margin"}.get(method, method)
            rows.append(
                {
                    "model": title,
                    "method": shown,
                    "certified %": f"{100 * certified:.2f}",
                    "attack %": f"{100 * attacked:.2f}",
                    "unknown": sum(s.verdict == "unknown" for s in samples),
                    "seconds": f"{seconds:.1f}",
                    "check s": f"{check_seconds:.1f}",
                    "bytes a sample": f"{claim.stat().st_size / len(samples):.0f}",
                }
            )
            if method == "complete":
                assert attacked - certified <= 0.01
        rows[-1]["method"] = f"complete (linear bounds alone: {linear_rate:.0f} images/s)"
    results.write(
        "certification",
        "Certification by method",
        "MNIST, epsilon 0.1, all 10,000 test images, deployed integers, universal over the "
        "rounding profiles. `seconds` is the whole command, attack included, the complete search "
        "with two processes and at most 20 s a sample. `attack %` is the accuracy that the attack "
        "leaves: no verifier can certify more. The rate of linear bounds alone is measured with "
        "the bounds of all nine rivals of every image, intervals notwithstanding, on one core.",
        rows,
    )


def _linear_rate(model: Path, count: int = 200) -> float:
    """Images a second when every rival of every image is bounded by the rule."""
    graph, _ = flatbuffer.load(model)
    decider = Decider(cover(graph, None).groups[0].graph)
    data = datasets.load("mnist", "test")
    lower, upper = inputs.box(graph, data.images[:count], Perturbation.epsilon("0.1"))
    network, layer = decider.network, decider.layer
    assert layer is not None
    zero_point = network.zero_points[graph.core_input]
    started = 0.0
    for i in range(-1, count):
        if i == 0:  # the first one compiles
            started = time.monotonic()
        ends = lower[i].reshape(-1) - zero_point, upper[i].reshape(-1) - zero_point
        state = propagate(network, ends)
        assert state is not None
        label = int(data.labels[i % count])
        needed = gaps(graph, label, len(layer.bias))
        for rival in range(len(layer.bias)):
            if rival != label:
                aim = pair_goal(network, layer, label, rival, int(needed[rival])).aim(state)
                if aim is not None:
                    lower_bound(network, state, aim.target)
    return count / (time.monotonic() - started)


def test_results_are_well_formed() -> None:
    """The pages that the documentation quotes are there, and say how they were made."""
    for name in ("certification", "search"):
        record = json.loads((results.FOLDER / f"{name}.json").read_text())
        assert record["rows"]
        assert record["command"] == "make evidence"
