"""Single bit flips in the weights of the MNIST model: per layer, per box, and on real runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, fault_report, flatbuffer, inputs
from cactus_edge.certify.faults_sites import Site, Sites, linear_layers
from cactus_edge.cli import run
from cactus_edge.fault_report import FaultModel, Report
from cactus_edge.graph import Graph, Linear
from cactus_edge.validate import validate_model
from tests.evidence import results
from tests.evidence.test_mnist import BUILD, ROOT, call

SAMPLES = 100
ON_RUNTIMES = 20
LOW_BITS = tuple(part for bit in range(6) for part in ("--bit", bit))
CLAIMS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("0", "any bit", ()),
    ("0", "bits 0 to 5", LOW_BITS),
    ("0", "any bit, folded", ("--folded",)),
    ("0.05", "any bit", ("--eps", "0.05")),
    ("0.05", "bits 0 to 5", ("--eps", "0.05", *LOW_BITS)),
)


@pytest.fixture(scope="module")
def model() -> Path:
    """The int8 model of ``test_mnist``, half of its weights pruned."""
    path, directory = BUILD / "int8-50.tflite", BUILD / "run"
    if not path.exists():
        if not (directory / "metrics.json").exists():
            recipe = ROOT / "recipes" / "mnist-quick.toml"
            assert run(["train", str(recipe), "--output", str(directory), "--force"]) == 0
        convert = ["convert", str(directory), "--bits", "8", "--sparsity", "0.5"]
        assert run([*convert, "-o", str(path), "--force"]) == 0
    return path


@pytest.mark.evidence
def test_faults_in_mnist(model: Path, capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    graph, _ = flatbuffer.load(model)
    names = [graph.operators[index].name for index in linear_layers(graph, None)]
    report = BUILD / "faults.json"
    base = (model, "--data", "mnist")
    rows: list[dict[str, object]] = []
    refuted: Report | None = None
    for radius, flips, options in CLAIMS:
        separate = [
            call(
                capsys,
                "faults",
                *base,
                "--samples",
                SAMPLES,
                "--layer",
                name,
                *options,
                "-o",
                BUILD / "faults-layer.json",
                "--force",
            )  # fmt: skip
            for name in names
        ]
        whole, seconds = call(
            capsys, "faults", *base, "--samples", SAMPLES, *options, "-o", report, "--force"
        )
        checked, check_seconds = call(capsys, "faults", *base, "--check", report)
        assert checked["agrees"] and checked["samples"] == SAMPLES
        refuted = refuted or fault_report.load(report)
        layers = whole["layers"]
        assert isinstance(layers, list) and [layer["name"] for layer in layers] == names
        for layer, (alone, own_seconds) in zip(layers, separate, strict=True):
            assert alone["layers"] == [layer], "a layer's verdicts depend on that layer alone"
            assert not layer["uncovered"]
            rows.append(_row(radius, flips, layer["name"], layer, f"{own_seconds:.1f}", "-"))
        entry = {"sites": whole["sites"], "verdicts": whole["verdicts"]}
        rows.append(
            _row(radius, flips, "all layers", entry, f"{seconds:.1f}", f"{check_seconds:.1f}")
        )
    assert refuted is not None
    results.write("faults", "Single bit flips in the weights, MNIST", _text(graph, refuted), rows)


def _row(
    radius: str, flips: str, name: str, entry: dict[str, object], seconds: str, check: str
) -> dict[str, object]:
    verdicts = entry["verdicts"]
    assert isinstance(verdicts, dict) and sum(verdicts.values()) == SAMPLES
    counts = {verdict: verdicts[verdict] for verdict in fault_report.VERDICTS}
    head = {"epsilon": radius, "flips": flips, "layer": name, "fault sites": f"{entry['sites']:,}"}
    return {**head, **counts, "seconds": seconds, "check s": check}


def _text(graph: Graph, report: Report) -> str:
    models, logits, runtimes = _on_runtimes(graph, report)
    return (
        "`int8-50.tflite` of [mnist.md](mnist.md): cnn-small, 166,550 parameters, half of the "
        f"weights pruned; the first {SAMPLES} test images. A layer is `certified` for an image if "
        "no flip of any one of its bits changes the decision, on the whole box, under every "
        "rounding profile; `refuted` names a bit that does; images that are misclassified as they "
        "are count as refuted. `all layers`: any one bit of the model. `folded`: the flip comes "
        "after zero points were folded into biases, see [faults.md](../faults.md). `seconds`: the "
        "command for that layer, or for all layers together. Every report was re-derived by the "
        f"independent checker. {models} faulty models were written to files, sign flips of pruned "
        f"weights into -128 among them, and run by every installed runtime ({runtimes}) on "
        f"{ON_RUNTIMES} images: {logits:,} logits, 0 differ from what the faulty graph computes "
        "under the runtime's profile."
    )


def _on_runtimes(graph: Graph, report: Report) -> tuple[int, int, int]:
    """Faulty models, logits compared, runtimes; every runtime equals its profile."""
    chosen = {(layer.operator, site) for layer in report.layers for site in _sites(graph, layer)}
    for sample in report.samples:
        for layer, finding in zip(report.layers, sample.findings, strict=bool(sample.findings)):
            fault = finding.fault
            own = sum(operator == layer.operator for operator, _ in chosen)
            if fault is not None and own < 5:
                chosen.add((layer.operator, (fault.tensor, fault.index, fault.bit)))
    data = datasets.load("mnist", "test")
    stored = inputs.stored(graph, data.images[:ON_RUNTIMES])
    logits, names = 0, set[str]()
    for index, (tensor, place, bit) in sorted(chosen):
        op = graph.operators[index]
        assert isinstance(op, Linear)
        sites = Sites(graph, op, FaultModel((index,)))
        content = flatbuffer.write_tflite(sites.faulty(graph, Site(tensor, place, bit)))
        faulty = flatbuffer.read_tflite(content)
        outcome = validate_model(faulty, stored, data=content, layer_samples=1)
        for peer in outcome.peers:
            if peer.status == "absent":
                continue
            assert peer.status == "equal", peer
            names.add(peer.name)
            logits += peer.elements
    assert len(names) >= 2
    return len(chosen), logits, len(names)


def _sites(graph: Graph, layer: fault_report.Layer) -> list[tuple[str, int, int]]:
    """Sign bits of two pruned weights: 0 becomes -128."""
    op = graph.operators[layer.operator]
    assert isinstance(op, Linear)
    zeros = np.flatnonzero(op.weights.values.reshape(-1) == 0)
    return [("weights", int(place), 7) for place in zeros[[0, -1]]]
