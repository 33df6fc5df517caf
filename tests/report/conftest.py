"""A certificate of a trained model with all kinds of verdicts, and the page made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cactus_edge import datasets, files
from cactus_edge.certificate_stream import Certificate, load
from cactus_edge.certify import Request, Settings, certify
from cactus_edge.cli import run
from cactus_edge.inputs import Perturbation

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "digits-0.05" / "model.tflite"
SAMPLES = 40


@dataclass(frozen=True)
class Made:
    """Files of one report."""

    certificate: Path
    model: Path
    page: Path
    claim: Certificate


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    certificate, page = folder / "digits.jsonl", folder / "report.html"
    request = Request(
        datasets.load("digits", "test"),
        Perturbation.epsilon("0.1"),
        count=SAMPLES,
        attack=Settings(steps=5, restarts=1),
        models=(("model.tflite", files.read(MODEL, "model")),),
    )
    certify(request, certificate)
    arguments = ["report", certificate, MODEL, "-o", page, "-n", 20, "--quiet"]
    assert run([str(argument) for argument in arguments]) == 0
    return Made(certificate, MODEL, page, load(certificate))
