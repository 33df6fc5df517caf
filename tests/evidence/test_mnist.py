"""The main job on MNIST, as a user runs it: train, convert, certify, check, validate.

The run is kept in ``build/evidence/mnist``; delete that folder to train again. The recipe was
chosen among candidates whose test figures were seen, see ``docs/training.md``.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from cactus_edge.cli import run
from cactus_edge.errors import counted
from tests.evidence import results

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "evidence" / "mnist"
SAMPLES = 10_000


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, object], float]:
    """A verb with ``--json``: its result and its wall time."""
    started = time.monotonic()
    code = run([*(str(a) for a in arguments), "--json"])
    seconds = time.monotonic() - started
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), seconds


@pytest.fixture(scope="module")
def trained() -> tuple[Path, float]:
    """The run's directory and its training time in seconds."""
    directory = BUILD / "run"
    if not (directory / "metrics.json").exists():
        recipe = ROOT / "recipes" / "mnist-quick.toml"
        assert run(["train", str(recipe), "--output", str(directory), "--force"]) == 0
    return directory, json.loads((directory / "metrics.json").read_text())["seconds"]


@pytest.mark.evidence
def test_certified_accuracy(
    trained: tuple[Path, float], capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    directory, seconds = trained
    rows: list[dict[str, object]] = []
    for bits, sparsity in ((8, 0.0), (8, 0.5), (4, 0.5), (4, 0.8)):
        model = BUILD / f"int{bits}-{round(100 * sparsity)}.tflite"
        converted, _ = call(
            capsys, "convert", directory, "--bits", bits, "--sparsity", sparsity, "-o", model,
            "--force",
        )  # fmt: skip
        claim = model.with_suffix(".json")
        certified, certify_seconds = call(
            capsys, "certify", model, "--data", "mnist", "--eps", "0.1", "-o", claim, "--force"
        )
        checked, check_seconds = call(capsys, "check", claim, model, "--data", "mnist")
        assert certified["samples"] == checked["samples"] == SAMPLES
        assert checked["agrees"]
        rows.append(
            {
                "model": f"int{bits}, {round(100 * sparsity)} % sparse",
                "universal": converted["universal"],
                "bytes": converted["bytes"],
                "standard %": f"{100 * certified['standard_accuracy']:.2f}",  # type: ignore[operator]
                "certified %": f"{100 * certified['certified_accuracy']:.2f}",  # type: ignore[operator]
                "certify s": f"{certify_seconds:.1f}",
                "check s": f"{check_seconds:.1f}",
            }
        )
        if (bits, sparsity) == (8, 0.5):
            assert certified["standard_accuracy"] >= 0.975  # type: ignore[operator]
            assert certified["certified_accuracy"] >= 0.945  # type: ignore[operator]
            assert certify_seconds <= 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results.write(
        "mnist",
        "MNIST at epsilon 0.1: the deployed integers",
        "`recipes/mnist-quick.toml` (cnn-small, 166,550 parameters), trained in "
        f"{seconds:.0f} s, then converted in one shot at several widths and sparsities. All 10,000 "
        "test images; certified by interval bounds with elided margin, exact in integers, for "
        "every rounding profile of a universal model; re-derived by the independent checker. Peak "
        f"memory of the whole process: {peak:.2f} GiB. The recipe was chosen among candidates "
        "whose test figures were seen.",
        rows,
    )


@pytest.mark.evidence
def test_every_runtime_computes_the_same(
    trained: tuple[Path, float], capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    directory, _ = trained
    rows: list[dict[str, object]] = []
    for bits, sparsity, scales in (
        (8, 0.5, "universal"),
        (4, 0.8, "universal"),
        (8, 0.5, "plain"),
    ):
        model = BUILD / f"validate-{scales}-int{bits}.tflite"
        call(
            capsys, "convert", directory, "--bits", bits, "--sparsity", sparsity, "-o", model,
            "--force", f"--{scales}",
        )  # fmt: skip
        outcome, _ = call(capsys, "validate", model, "--data", "mnist", "--samples", 1000)
        assert outcome["samples"] == 1000
        assert outcome["universal"] is (scales == "universal")
        assert (outcome["outputs"] == 1) is (scales == "universal")
        runtimes = outcome["peers"]
        assert isinstance(runtimes, list)
        for runtime in runtimes:
            assert runtime["status"] == "equal", runtime
            rows.append(
                {
                    "model": f"int{bits}, {round(100 * sparsity)} % sparse, {scales}",
                    "runtime": runtime["name"],
                    "version": runtime["version"],
                    "profile": runtime["profile"],
                    "logits": runtime["elements"],
                    "mismatches": runtime["mismatches"],
                    "layer elements": runtime["layer_elements"],
                    "layer mismatches": runtime["layer_mismatches"],
                    "output": runtime["output"][:12],
                }
            )
        rows.append(
            {
                "model": f"int{bits}, {round(100 * sparsity)} % sparse, {scales}",
                "runtime": "between runtimes",
                "version": "",
                "profile": counted(outcome["outputs"], "distinct output"),
                "logits": runtimes[0]["elements"],
                "mismatches": outcome["runtimes_differ"],
                "layer elements": "",
                "layer mismatches": "",
                "output": f"{outcome['decisions_differ']} decisions differ",
            }
        )
    results.write(
        "mnist-runtimes",
        "Every installed runtime against its profile",
        "1,000 MNIST images through every runtime, in this environment. `mismatches` are against "
        "the reference executor under the runtime's own profile; in the rows 'between runtimes' "
        "they are logits on which at least two runtimes differ. `--plain` converts without "
        "universal scales: every runtime still equals its profile, but the profiles differ.",
        rows,
    )
