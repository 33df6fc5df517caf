"""What the attack leaves of the accuracy, and how long it takes, on the MNIST models."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.certify import Certifier, Settings
from cactus_edge.inputs import Perturbation
from tests.evidence import results
from tests.evidence.test_mnist import BUILD

COUNT = 2000
MODELS = {"int8, 50 % sparse": "int8-50", "int4, 80 % sparse": "int4-80"}
SETTINGS = {
    "default": Settings(),
    "strong": Settings.strong(),
    "restarts alone": Settings(restarts=60, hops=0),
}
SLOWEST = 3000
"""Images a minute that the default has to reach."""


@pytest.mark.evidence
def test_attack_on_the_mnist_models(data_dir: Path) -> None:
    data = datasets.load("mnist", "test")
    images, labels = data.images[:COUNT], data.labels[:COUNT].astype(np.int64)
    rows: list[dict[str, object]] = []
    for title, name in MODELS.items():
        model = BUILD / f"{name}.tflite"
        if not model.exists():
            pytest.skip("test_mnist makes the models; run all of `make evidence`")
        graph, _ = flatbuffer.load(model)
        certifier = Certifier(graph)
        boxes = (
            inputs.stored(graph, images),
            *inputs.box(graph, images, Perturbation.epsilon("0.1")),
        )
        certifier.verdicts(0, *(array[:2] for array in boxes), labels[:2], Settings())  # compiles
        left: dict[str, int] = {}
        for kind, settings in SETTINGS.items():
            started = time.monotonic()
            found = certifier.verdicts(0, *boxes, labels, settings)
            seconds = time.monotonic() - started
            verdicts = Counter(sample.verdict for sample in found)
            methods = Counter(sample.method for sample in found if sample.verdict == "refuted")
            assert verdicts["error"] == 0
            left[kind] = verdicts["certified"] + verdicts["unknown"]
            rate = 60 * COUNT / seconds
            rows.append(
                {
                    "model": title,
                    "settings": kind,
                    "attack accuracy %": f"{100 * left[kind] / COUNT:.2f}",
                    "certified %": f"{100 * verdicts['certified'] / COUNT:.2f}",
                    "attacked": methods["attack"] + verdicts["unknown"],
                    "refuted": methods["attack"],
                    "still open": verdicts["unknown"],
                    "seconds": f"{seconds:.1f}",
                    "images a minute": round(rate),
                }
            )
            if kind == "default":
                assert rate >= SLOWEST
        assert left["strong"] <= left["default"] <= left["restarts alone"]
    described = "; ".join(f"{kind}: {settings}" for kind, settings in SETTINGS.items())
    results.write(
        "attack",
        "What the attack finds",
        f"MNIST, epsilon 0.1, the first {COUNT} test images. Intervals and elided margins come "
        "first, as in `certify --attack`, and only what they leave open is `attacked`; `seconds` "
        "and `images a minute` are of all of it, on all images. Every counterexample is an integer "
        "input that the reference executor misclassifies. `attack accuracy` counts what is neither "
        f"misclassified nor refuted. Settings: {described}.",
        rows,
    )


def test_results_are_well_formed() -> None:
    """The page is there, and its bounds lie on the right sides of each other."""
    record = json.loads((results.FOLDER / "attack.json").read_text())
    assert {(row["model"], row["settings"]) for row in record["rows"]} == {
        (title, kind) for title in MODELS for kind in SETTINGS
    }
    for row in record["rows"]:
        assert float(row["certified %"]) <= float(row["attack accuracy %"])
        assert row["refuted"] + row["still open"] == row["attacked"]
