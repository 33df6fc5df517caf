"""Reports about weight faults: what their checker accepts, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from cactus_edge import decision, fault_report, flatbuffer, inputs
from cactus_edge.certify.faults import FaultRequest, certify_faults
from cactus_edge.certify.faults_search import Effort
from cactus_edge.certify.faults_sites import (
    linear_layers,
    stored_width,
)
from cactus_edge.check_faults import check_faults
from cactus_edge.cli import app
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, PropertyNotMetError, UsageError
from cactus_edge.execute import execute
from cactus_edge.fault_report import Fault, Report
from cactus_edge.graph import (
    Linear,
)
from cactus_edge.inputs import Perturbation
from tests.certify.test_faults import tiny_graph
from tests.graphs import random_graph

COUNT = 14
Made = tuple[bytes, Dataset, Report]


def made_report(
    seed: int,
    *,
    counted: bool,
    levels: int,
    is_universal: bool,
    bits: tuple[int, ...] = (0, 1, 2, 3, 6, 7),
    count: int = COUNT,
    names: tuple[str, ...] | None = None,
    folded: bool = False,
) -> Made:
    rng = np.random.default_rng(seed)
    graph = random_graph(
        rng, shape=(1, 3, 3, 2), depth=2, channels=4, classes=3, universal=is_universal
    )
    model = flatbuffer.write_tflite(graph)
    shape = graph.tensors[graph.input].shape[1:]
    images = rng.random((count, *shape), dtype=np.float32)
    labels = decision.predict(execute(graph, inputs.stored(graph, images)))
    labels[::7] = (labels[::7] + 1) % 3
    data = Dataset("made-up", images, labels, 3, "test", "5e" * 32)
    request = FaultRequest(
        data,
        Perturbation.levels(levels),
        bits=bits,
        bias_bits=6,
        profiles=names,
        effort=Effort(counted=counted),
        folded=folded,
    )
    return model, data, certify_faults(model, request)


@pytest.mark.parametrize("seed", range(6))
def test_checker_agrees(seed: int, tmp_path: Path) -> None:
    model, data, report = made_report(
        seed, counted=seed % 2 == 0, levels=seed % 3, is_universal=seed % 3 == 1, folded=seed > 2
    )
    path = tmp_path / "faults.json"
    path.write_bytes(fault_report.encode(report))
    result = check_faults(fault_report.load(path), model, data)
    assert result.problems == ()
    assert result.samples == COUNT


@pytest.fixture(scope="module")
def made() -> Made:
    """A counted report with every verdict that a forger might want to change."""
    model, data, report = made_report(
        6,
        counted=True,
        levels=1,
        is_universal=False,
        bits=(0, 3, 7),
        count=4,
        names=("tflite-micro", "tflite-xnnpack-x86"),
    )
    findings = [f for s in report.samples for f in s.findings]
    assert {f.verdict for f in findings} >= {"certified", "refuted"}
    assert report.samples[0].findings == (), "the first one is labelled wrongly"
    return model, data, report


def resealed(report: Report, **changes: object) -> Report:
    """With all counts and the digest as a careful forger would write them."""
    report = msgspec.structs.replace(report, **changes)
    layers = tuple(
        msgspec.structs.replace(layer, verdicts=fault_report.layer_counts(report.samples, i))
        for i, layer in enumerate(report.layers)
    )
    verdicts = fault_report.counts([s.verdict for s in report.samples])
    return fault_report.sealed(msgspec.structs.replace(report, layers=layers, verdicts=verdicts))


def with_finding(report: Report, chosen: str, **changes: object) -> Report:
    """Change the first finding with this verdict, and what follows from it."""
    for i, sample in enumerate(report.samples):
        for j, finding in enumerate(sample.findings):
            if finding.verdict != chosen:
                continue
            forged = msgspec.structs.replace(finding, **changes)
            findings = (*sample.findings[:j], forged, *sample.findings[j + 1 :])
            verdict = fault_report.conjunction([f.verdict for f in findings])
            changed = msgspec.structs.replace(sample, findings=findings, verdict=verdict)
            samples = (*report.samples[:i], changed, *report.samples[i + 1 :])
            return resealed(report, samples=samples)
    raise AssertionError(f"no finding is {chosen}")


def shortened(report: Report, layers: int) -> Report:
    """Without the first findings of the last sample, so many of them."""
    sample = report.samples[-1]
    left = sample.findings[layers:]
    verdict = fault_report.conjunction([f.verdict for f in left]) if left else "refuted"
    short = msgspec.structs.replace(sample, findings=left, verdict=verdict)
    samples = (*report.samples[:-1], short)
    if not left:
        return resealed(report, samples=samples)
    forged = msgspec.structs.replace(report, samples=samples)
    verdicts = fault_report.counts([s.verdict for s in forged.samples])
    return fault_report.sealed(msgspec.structs.replace(forged, verdicts=verdicts))


def refutation(report: Report) -> Fault:
    return next(f.fault for s in report.samples for f in s.findings if f.fault is not None)


def test_checker_rejects_forgeries(made: Made) -> None:
    model, data, report = made
    assert check_faults(resealed(report), model, data).agrees
    fault = refutation(report)

    def moved(**changes: object) -> Report:
        return with_finding(report, "refuted", fault=msgspec.structs.replace(fault, **changes))

    samples = report.samples
    first = report.layers[0]
    wrong_groups = msgspec.structs.replace(first, groups=(report.profiles,))
    fewer_sites = msgspec.structs.replace(first, sites=first.sites + 1)
    forged: dict[str, tuple[Report, str]] = {
        "certified": (with_finding(report, "refuted", verdict="certified", fault=None), "derived"),
        "no fault": (with_finding(report, "refuted", fault=None), "if and only if"),
        "other bit": (moved(bit=0 if fault.bit else 3), "another integer"),
        "bit outside": (moved(bit=5), "not a covered site"),
        "other value": (moved(flipped=fault.flipped + 1), "another integer"),
        "element": (moved(index=10**6), "no element"),
        "profile": (moved(profile="none"), "not among those"),
        "hex": (moved(counterexample="zz"), "not hexadecimal"),
        "far away": (moved(counterexample="7f00" * 18), "outside the box"),
        "less than none": (with_finding(report, "certified", safe=-1), "negative"),
        "format": (resealed(report, version=2), "none that this tool reads"),
        "tool": (resealed(report, tool="another"), "tool"),
        "safe": (with_finding(report, "certified", safe=10**6), "fewer than stated"),
        "critical": (with_finding(report, "certified", critical=1), "fewer than stated"),
        "order": (resealed(report, samples=(samples[1], samples[0], *samples[2:])), "differs"),
        "label": (
            resealed(report, samples=(msgspec.structs.replace(samples[0], label=9), *samples[1:])),
            "differs",
        ),
        "groups": (resealed(report, layers=(wrong_groups, *report.layers[1:])), "differ on"),
        "sites": (resealed(report, layers=(fewer_sites, *report.layers[1:])), "stated otherwise"),
        "claim": (resealed(report, claim="safe from everything"), "claim"),
        "decision": (resealed(report, decision="argmin"), "decision rule"),
        "radius": (resealed(report, radius="-1"), "box"),
        "profiles": (resealed(report, profiles=("tflite-micro", "?")), "known profiles"),
        "a layer left out of the sites": (
            resealed(report, layers=report.layers[1:]),
            "not those of the fault model",
        ),
        "a layer left out of a sample": (shortened(report, layers=1), "do not fit"),
        "all layers left out": (shortened(report, layers=len(report.layers)), "not misclassified"),
        "a sample left out": (resealed(report, samples=samples[:-1]), "samples for range"),
        "a sample left out, and counted so": (
            resealed(
                report,
                samples=samples[1:],
                data=msgspec.structs.replace(report.data, count=len(samples) - 1),
            ),
            "index or label differs",
        ),
        "a bit left out": (
            resealed(report, faults=msgspec.structs.replace(report.faults, bits=(3, 7))),
            "stated otherwise",
        ),
        "biases left out": (
            resealed(report, faults=msgspec.structs.replace(report.faults, bias_bits=0)),
            "stated otherwise",
        ),
        "a bit that is none": (
            resealed(report, faults=msgspec.structs.replace(report.faults, bits=(0, 3, 8))),
            "not ascending positions",
        ),
        "a layer twice": (
            resealed(report, faults=msgspec.structs.replace(report.faults, layers=(0, 0))),
            "not distinct operators",
        ),
        "folded": (
            resealed(report, faults=msgspec.structs.replace(report.faults, folded=True)),
            "claim",
        ),
        "the whole sample": (
            resealed(
                report,
                samples=tuple(msgspec.structs.replace(s, verdict="certified") for s in samples),
            ),
            "does not follow",
        ),
        "digest": (msgspec.structs.replace(report, digest="00"), "changed after"),
        "verdicts": (
            fault_report.sealed(msgspec.structs.replace(report, verdicts={})),
            "do not follow",
        ),
        "faults": (
            resealed(report, faults=msgspec.structs.replace(report.faults, bits=(0,))),
            "stated otherwise",
        ),
    }
    for name, (claim, message) in forged.items():
        problems = check_faults(claim, model, data).problems
        assert any(message in problem for problem in problems), (name, problems)


def test_wider_claims_are_rejected(made: Made) -> None:
    """A wider box, or more bits than were certified, with every number made to fit."""
    model, data, report = made
    wider = resealed(report, radius="40")
    assert any("derived" in p for p in check_faults(wider, model, data).problems)
    model, data, report = made_report(6, counted=False, levels=0, is_universal=False, bits=(0,))
    assert check_faults(report, model, data).agrees
    eight = msgspec.structs.replace(report.faults, bits=tuple(range(8)))
    layers = tuple(
        msgspec.structs.replace(
            layer, sites=6 * op.channels + op.weights.values.size * stored_width(op.weights)
        )
        for layer in report.layers
        if isinstance(op := flatbuffer.read_tflite(model).operators[layer.operator], Linear)
    )
    problems = check_faults(resealed(report, faults=eight, layers=layers), model, data).problems
    assert any("'certified' cannot be re-derived" in problem for problem in problems)


def test_less_is_claimed_in_the_open(made: Made, tmp_path: Path) -> None:
    """Who claims less consistently claims something true, and the report says how little."""
    model, data, report = made
    sample = slice(0, 2)
    samples = tuple(
        msgspec.structs.replace(
            s, findings=s.findings[:1], verdict=s.findings[0].verdict if s.findings else "refuted"
        )
        for s in report.samples[sample]
    )
    less = resealed(
        report,
        samples=samples,
        data=msgspec.structs.replace(report.data, count=2),
        faults=msgspec.structs.replace(report.faults, layers=report.faults.layers[:1]),
        layers=report.layers[:1],
    )
    assert check_faults(less, model, data).agrees
    assert len(less.layers) < len(linear_layers(flatbuffer.read_tflite(model), None))


def test_checker_rejects_one_group_where_a_flip_parts_the_profiles() -> None:
    graph = tiny_graph(138, universal=True)
    model = flatbuffer.write_tflite(graph)
    shape = graph.tensors[graph.input].shape[1:]
    images = np.random.default_rng(1).random((3, *shape), dtype=np.float32)
    labels = decision.predict(execute(graph, inputs.stored(graph, images)))
    data = Dataset("made-up", images, labels, 3, "test", "5e" * 32)
    report = certify_faults(model, FaultRequest(data))
    assert check_faults(report, model, data).agrees
    (parted,) = [i for i, layer in enumerate(report.layers) if len(layer.groups) > 1]
    one = msgspec.structs.replace(report.layers[parted], groups=(report.profiles,))
    layers = (*report.layers[:parted], one, *report.layers[parted + 1 :])
    problems = check_faults(resealed(report, layers=layers), model, data).problems
    assert any("differ on a faulty layer" in problem for problem in problems)


def test_folded_is_another_claim() -> None:
    """A layer that is safe from flips before loading need not be safe from later ones."""
    model, data, report = made_report(
        6, counted=False, levels=0, is_universal=False, count=6, names=("tflite-micro",)
    )
    faults = msgspec.structs.replace(report.faults, folded=True)
    forged = resealed(report, faults=faults, claim=fault_report.claim(faults))
    problems = check_faults(forged, model, data).problems
    assert any("derived" in p or "does not change" in p for p in problems)


def test_a_report_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    for text in (b"", b"{}", b"[1]", b'{"format": "x"}'):
        path.write_bytes(text)
        with pytest.raises(DataError, match="not a report on faults"):
            fault_report.load(path)


# ---------------------------------------------------------------------- the command


def command(*arguments: object) -> tuple[dict[str, object], BaseException | None]:
    """What ``faults --json`` prints, and what it raises."""
    result = CliRunner().invoke(app, ["faults", *(str(a) for a in arguments), "--json"])
    start = result.stdout.find("{")
    shown = json.loads(result.stdout[start:]) if start >= 0 else {}
    return shown, result.exception


def test_command_writes_and_checks(tmp_path: Path) -> None:
    graph = random_graph(np.random.default_rng(6), shape=(1, 3, 3, 2), depth=2, classes=3)
    model, data, output = (tmp_path / name for name in ("m.tflite", "d.npz", "faults.json"))
    flatbuffer.save(graph, model)
    images = np.random.default_rng(0).random((6, 3, 3, 2), dtype=np.float32)
    labels = decision.predict(execute(graph, inputs.stored(graph, images)))
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    layer = graph.operators[linear_layers(graph, None)[0]].name
    base = (model, "--data", data)
    shown, error = command(*base, "--layer", layer, "--bit", 0, "--count", "-o", output)
    assert error is None
    assert (shown["samples"], shown["bits"], shown["kind"]) == (6, [0], "levels")
    (entry,) = shown["layers"]  # type: ignore[misc]
    assert entry["name"] == layer and 0 < entry["safe_share"] <= 1
    shown, error = command(*base, "--check", output)
    assert (shown["agrees"], error) == (True, None)
    stated = shown["stated"]
    assert isinstance(stated, dict)
    assert (len(stated["layers"]), stated["layers_in_model"]) == (
        1,
        len(linear_layers(graph, None)),
    )
    assert (stated["bits"], stated["first"], stated["samples"]) == ([0], 0, 6)
    certified = shown["stated"]["certified"]  # type: ignore[index]
    assert 0 < certified < 1
    _, error = command(*base, "--check", output, "--require", certified)
    assert error is None
    _, error = command(*base, "--check", output, "--require", 1)
    assert isinstance(error, PropertyNotMetError) and "100 % required" in str(error)
    for more in (("--eps", "0.1"), ("--bit", 3), ("--samples", 2), ("--first", 1)):
        _, error = command(*base, "--check", output, *more)
        assert isinstance(error, UsageError) and "says itself" in str(error)
    text = output.read_text()
    output.write_text(text.replace('"radius":"0"', '"radius":"1"'))
    shown, error = command(*base, "--check", output)
    assert shown["agrees"] is False and isinstance(error, PropertyNotMetError)
    assert shown["stated"] is None
    for more, message in (
        (("-o", output), "--force"),
        ((), "either -o"),
        (("-o", tmp_path / "x.json", "--layer", "nowhere"), "0 layers"),
        (("-o", tmp_path / "x.json", "--eps", "0", "--levels", 0), "either --eps"),
    ):
        _, error = command(*base, *more)
        assert isinstance(error, UsageError) and message in str(error)
    _, error = command(*base, "-o", tmp_path / "y.json", "--require", 1)
    assert isinstance(error, PropertyNotMetError)
