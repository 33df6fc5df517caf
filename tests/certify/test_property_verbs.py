"""The verbs radius, sweep and verify, and what certify and check do with other properties."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from cactus_edge import flatbuffer, inputs
from cactus_edge.certificate_stream import load
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier
from cactus_edge.certify.radius import radii
from cactus_edge.cli import properties, proving
from cactus_edge.errors import DataError, OutputError, PropertyNotMetError, UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Quantization
from tests.certify.test_certificates_of_properties import NAMES, scene
from tests.certify.test_certificates_of_queries import query_of
from tests.certify.test_properties import Truth, data
from tests.graphs import random_graph

VERBS = typer.Typer()
for module in (properties, proving):
    module.register(VERBS)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON that a verb prints; its errors are raised."""
    VERBS([str(a) for a in (*arguments, "--json")], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with pixels for input."""
    rng = np.random.default_rng(11)
    pixel = json.dumps({"kind": "pixel", "levels_per_unit": 255, "offset": -128}).encode()
    while True:
        graph = random_graph(rng, shape=(1, 2, 2, 1), depth=1, classes=3)
        if graph.tensors[graph.core_input].quantization == Quantization.of(1 / 255, -128):
            break
    graph = replace(graph, metadata=((inputs.METADATA, pixel),))
    flatbuffer.save(graph, tmp_path / "m.tflite")
    images, labels = data(graph, 1, 20)
    np.savez(tmp_path / "d.npz", x_test=images, y_test=labels, x_train=images, y_train=labels)
    return tmp_path / "m.tflite"


def test_verb_radius(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = model.with_name("r.json")
    arguments = ("radius", model, "--data", model.with_name("d.npz"), "--largest", 9, "-n", 6)
    shown = call(capsys, *arguments, "--attack", "-o", output)
    graph, _ = flatbuffer.load(model)
    images, labels = data(graph, 1, 20)
    found = radii(Certifier(graph), images[:6], labels[:6], largest=9, settings=Settings())
    rows = shown["rows"]
    assert shown["certificate"] == str(output)
    assert [row["certified"] for row in rows] == [r.certified for r in found]
    assert [row["refuted"] for row in rows] == [r.refuted for r in found]
    assert shown["at_least"] == {
        str(k): sum(r.certified >= k for r in found) for k in (0, 1, 2, 4, 8, 9)
    }
    with pytest.raises(OutputError, match="exists already"):
        call(capsys, *arguments, "-o", output)
    with pytest.raises(UsageError, match="are not in"):
        call(capsys, *arguments[:-1], 21)


def test_verb_sweep(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = model.with_name("c.svg")
    arguments = ("sweep", model, "--data", model.with_name("d.npz"))
    shown = call(capsys, *arguments, "--eps", "2/255", "--eps", "0", "--svg", svg)
    assert [point["radius"] for point in shown["points"]] == ["2/255", "0"]
    assert shown["points"][0]["certified"] <= shown["points"][1]["certified"] == 16
    assert svg.read_bytes().startswith(b"<?xml")
    for bad in ((), ("--eps", "0.1", "--levels", "1")):
        with pytest.raises(UsageError, match="either with --eps or with --levels"):
            call(capsys, *arguments, *bad)


def test_verb_verify(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A query whose answer is known from every point of its box."""
    graph, _ = flatbuffer.load(model)
    lower = np.full((1, 2, 2, 1), 20, np.int64)
    truth = Truth.of(graph, lower[0], lower[0] + 3)
    most = int(truth.logits[:, 0].max())
    query = model.with_name("q.vnnlib")
    names = "".join(f"(declare-const X_{i} Real)" for i in range(4))
    names += "".join(f"(declare-const Y_{i} Real)" for i in range(3))
    box = "".join(f"(assert (<= 20 X_{i} 23))" for i in range(4))
    query.write_text(f"{names}{box}(assert (> Y_0 {most}))")
    output = model.with_name("v.json")
    shown = call(capsys, "verify", model, query, "--stored", "-o", output)
    assert (shown["verdict"], shown["result"], shown["cases"]) == ("certified", "unsat", 1)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["query"]["sha256"] == shown["query_sha256"]
    assert [line["verdict"] for line in lines[1:-1]] == ["certified"]
    query.write_text(f"{names}{box}(assert (>= Y_0 {most}))")
    with pytest.raises(PropertyNotMetError, match="breaks the property under"):
        call(capsys, "verify", model, query, "--stored")
    shown = json.loads(capsys.readouterr().out)
    point = np.array(shown["counterexample"]).reshape(1, 2, 2, 1)
    logits = execute(graph, point, shown["profile"]).reshape(-1)
    assert shown["result"] == "sat" and logits.tolist() == shown["logits"] and logits[0] == most
    with pytest.raises(UsageError, match="no such query"):
        call(capsys, "verify", model, query.with_name("none.vnnlib"))
    with pytest.raises(DataError, match="q.vnnlib"):
        query.write_text("(")
        call(capsys, "verify", model, query)


# ---------------------------------------------------------------- certificates
PROFILES = tuple(word for name in NAMES for word in ("--profile", name))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    graph, model, data = scene(3)
    (tmp_path / "m.tflite").write_bytes(model)
    pairs = {"x_test": data.images, "y_test": data.labels}
    np.savez(tmp_path / "d.npz", **pairs, x_train=data.images, y_train=data.labels)
    return tmp_path / "m.tflite", tmp_path / "d.npz"


def test_verbs_certify_and_check(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    folder = model.parent
    mask = np.zeros((3, 3), bool)
    mask[0] = True
    np.save(folder / "mask.npy", mask)
    (folder / "radii.csv").write_text(",".join(["0.01", "0", "2/255"] * 3))
    (folder / "levels.csv").write_text(",".join(["4", "0", "2"] * 3))
    for number, options in enumerate(
        (
            ("--levels", 5, "--patch", "2x1", "--top", 2),
            ("--eps", "0.02", "--mask", folder / "mask.npy"),
            ("--radii", folder / "radii.csv", "--patch", "2x2/1"),
            ("--radii", folder / "levels.csv", "--radii-kind", "levels"),
        )
    ):
        output = folder / f"{number}.jsonl"
        shown = call(
            capsys, "certify", model, "--data", data, *options, "-n", 8, *PROFILES, "-o", output
        )
        assert shown["samples"] == 8
        assert call(capsys, "check", output, model, "--data", data)["agrees"]
        found = load(output).head.property
        assert found.top == (2 if number == 0 else 1)
        assert found.patch == ((2, 1, 1), (), (2, 2, 1), ())[number]
        assert (len(found.radii) == 9) == (number > 0)
    for bad in (
        ("--levels", 5, "--patch", "2by1"),
        ("--levels", 5, "--eps", "0.1"),
        ("--mask", folder / "mask.npy"),
        ("--radii", folder / "radii.csv", "--radii-kind", "pixels"),
        ("--radii", folder / "radii.csv", "--mask", folder / "mask.npy"),
        ("--levels", 5, "--top", 4),
    ):
        with pytest.raises(UsageError):
            call(capsys, "certify", model, "--data", data, *bad, "-o", folder / "bad.jsonl")


def test_verbs_radius_and_verify(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    folder = model.parent
    output = folder / "r.jsonl"
    arguments = ("radius", model, "--data", data, "--largest", 9, "-n", 6, "--attack", *PROFILES)
    shown = call(capsys, *arguments, "-o", output)
    assert shown["rows"] == call(capsys, *arguments)["rows"]
    assert [row["certified"] for row in shown["rows"]] == [
        -1 if sample.radius is None else sample.radius for sample in load(output).samples
    ]
    assert call(capsys, "check", output, model, "--data", data)["agrees"]
    lower = np.full(9, 20)
    for bound, expected in ((900, "certified"), (-900, "refuted")):
        query, output = folder / f"{expected}.vnnlib", folder / f"{expected}.jsonl"
        query.write_bytes(query_of(lower, lower + 3, 4, [f"(>= Y_0 {bound})"]))
        arguments = ("verify", model, query, "--stored", "-o", output, *PROFILES)
        if expected == "certified":
            assert call(capsys, *arguments)["certificate"] == str(output)
        else:
            with pytest.raises(PropertyNotMetError, match="breaks the property"):
                call(capsys, *arguments)
            capsys.readouterr()
        assert [sample.verdict for sample in load(output).samples] == [expected]
        assert call(capsys, "check", output, model, "--query", query)["agrees"]
        with pytest.raises(UsageError, match="needs --query FILE"):
            call(capsys, "check", output, model)
