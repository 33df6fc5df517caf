"""The page without a browser: its numbers are those of the files, and it needs nothing else."""

from __future__ import annotations

import base64
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.conftest import SAMPLES, Made
from report.html import embedded, parse, rows

from cactus_edge import datasets, decision, flatbuffer, inputs, profiles
from cactus_edge.certificate import VERDICTS
from cactus_edge.certify.twin import twin
from cactus_edge.cli import run
from cactus_edge.csource import generate
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph, Linear
from cactus_edge.inputs import Perturbation
from cactus_edge.report import Page, opened, read, render, widths
from cactus_edge.report.charts import Series, chart
from cactus_edge.shares import percent


def graph_of(made: Made) -> Graph:
    return flatbuffer.load(made.model)[0]


def test_numbers_are_those_of_the_certificate(made: Made) -> None:
    root = parse(made.page.read_bytes())
    counts = made.claim.tail.summary.verdicts
    assert counts["certified"] > 0 and counts["refuted"] > 0 and counts["unknown"] > 0
    shown = {
        b.attributes["data-verdict"]: int(b.text)
        for b in root.every("b")
        if "data-verdict" in b.attributes
    }
    assert shown == counts
    figures = [dd.text for dd in root.every("dd")][:4]
    summary = made.claim.tail.summary
    shares = (summary.certified_accuracy, summary.standard_accuracy, summary.attack_accuracy)
    assert figures == [*(f"{100 * share:.2f} %" for share in shares if share is not None), "40"]
    for row in rows(root.by_id("by-class")):
        lines = [line for line in made.claim.samples if line.label == int(row[0])]
        right = sum(line.label == line.prediction for line in lines)
        expected = [sum(line.verdict == verdict for line in lines) for verdict in VERDICTS]
        assert [int(cell) for cell in row[1:7]] == [len(lines), right, *expected]
        assert row[7] == percent(expected[0] / len(lines))


def test_explorer_repeats_the_certificate(made: Made) -> None:
    data = embedded(parse(made.page.read_bytes()))
    lines = {line.index: line for line in made.claim.samples}
    images = datasets.load("digits", "test").images[:SAMPLES]
    stored = inputs.stored(graph_of(made), images)
    assert len(data["samples"]) == 20
    assert {sample["verdict"] for sample in data["samples"]} == {"certified", "refuted", "unknown"}
    for sample in data["samples"]:
        line, own = lines[sample["index"]], data["own"]
        assert (sample["label"], sample["prediction"], sample["verdict"], sample["method"]) == (
            line.label,
            line.prediction,
            line.verdict,
            line.method,
        )
        assert (tuple(sample["lower"][own]), tuple(sample["upper"][own])) == (
            line.bounds[0].lower,
            line.bounds[0].upper,
        )
        assert sample["verdicts"][own] == line.verdict[0]
        assert (
            base64.b64decode(sample["image"]) == (stored[line.index] + 128).astype("u1").tobytes()
        )
        certified = [
            value
            for value, letter in zip(data["radii"], sample["verdicts"], strict=True)
            if letter == "c"
        ]
        assert sample["certified"] == (certified[-1]["value"] if certified else -1)


def test_every_bound_holds_at_its_radius(made: Made) -> None:
    """Corners and the sample itself, by the reference executor; verdicts never grow with radius."""
    graph, rng = graph_of(made), np.random.default_rng(1)
    images = datasets.load("digits", "test").images
    data = embedded(parse(made.page.read_bytes()))
    assert [Fraction(step["exact"]) for step in data["radii"]] == sorted(
        Fraction(step["exact"]) for step in data["radii"]
    )
    for number, step in enumerate(data["radii"]):
        samples = data["samples"]
        chosen = images[[sample["index"] for sample in samples]]
        lower, upper = inputs.box(graph, chosen, Perturbation.epsilon(step["exact"]))
        corner = np.where(rng.integers(0, 2, lower.shape) == 1, upper, lower)
        for points in (lower, upper, corner, inputs.stored(graph, chosen)):
            logits = execute(graph, points).reshape(len(samples), -1)
            assert (logits >= np.array([sample["lower"][number] for sample in samples])).all()
            assert (logits <= np.array([sample["upper"][number] for sample in samples])).all()
            decided = logits.argmax(axis=1)
            for sample, winner in zip(samples, decided.tolist(), strict=True):
                assert winner == sample["label"] or sample["verdicts"][number] != "c"
    for sample in data["samples"]:
        assert re.fullmatch("c*u*r*", sample["verdicts"])


def test_counterexamples_are_misclassified_where_the_page_says_refuted(made: Made) -> None:
    graph = graph_of(made)
    data = embedded(parse(made.page.read_bytes()))
    images = datasets.load("digits", "test").images
    broken = [sample for sample in data["samples"] if sample["counterexample"]]
    assert broken
    for sample in broken:
        image = images[sample["index"]][None]
        point = np.frombuffer(base64.b64decode(sample["counterexample"]), "u1").astype(np.int64)
        point = point.reshape(image.shape) - 128
        logits = execute(profiles.resolve(graph, sample["profile"]), point).reshape(1, -1)
        assert logits[0].tolist() == sample["wrong"]
        assert decision.surely_wrong(graph, logits, np.array([sample["label"]]))[0]
        assert sample["distance"] == np.abs(point - inputs.stored(graph, image)).max()
        for step, letter in zip(data["radii"], sample["verdicts"], strict=True):
            lower, upper = inputs.box(graph, image, Perturbation.epsilon(step["exact"]))
            assert bool(((lower <= point) & (point <= upper)).all()) == (letter == "r")


def test_page_needs_nothing_from_outside(made: Made) -> None:
    page = made.page.read_text()
    root = parse(page.encode())
    links = [a.attributes["href"] or "" for a in root.every("a")]
    for link in links:
        assert root.by_id(link.removeprefix("#"))
    assert links and all(link.startswith("#") for link in links)
    assert not re.findall(r"(?i)https?:|\ssrc=|@import|url\(|fetch\(|XMLHttp|WebSocket", page)
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert len(page) < 150_000


def test_equal_files_make_equal_bytes(made: Made, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    arguments = ["report", made.certificate, made.model, "-o", again, "-n", 20, "--quiet"]
    assert run([str(argument) for argument in arguments]) == 0
    assert again.read_bytes() == made.page.read_bytes()


def test_sizes_are_counted(made: Made) -> None:
    """Beside the file: the same weights as float32 and plain int8, and the generated C."""
    root, graph = parse(made.page.read_bytes()), graph_of(made)
    layers = [op for op in graph.operators if isinstance(op, Linear)]
    weights = sum(op.weights.values.size for op in layers)
    biases = sum(len(op.bias) for op in layers)
    file = made.model.stat().st_size
    constants = generate(graph).table_bytes
    expected = [file, 4 * (weights + biases), weights + 4 * biases, constants]
    (table,) = root.by_id("speed").every("table")
    shown = rows(table)
    assert [int(row[1].replace(",", "")) for row in shown] == expected
    assert [row[2] for row in shown] == [f"{size / file:.2f}" for size in expected]
    assert constants < expected[1] and "generated C" in shown[3][0]
    caption = table.every("caption")[0].text
    assert f"{weights:,} weights" in caption
    assert "No latency: no result of bench --json was given." in root.text
    alone = parse(render(Page("no model", read([made.certificate], 5), None, None)))
    with pytest.raises(KeyError):
        alone.by_id("speed")


def test_names_cannot_become_markup(made: Made) -> None:
    sources = read([made.certificate], 5)
    title = "</title><script>alert(1)</script>"
    page = render(Page(title, sources, None, None, ("<b>note</b>",)))
    root = parse(page)
    assert root.every("title")[0].text == title
    assert len(root.every("script")) == 1
    assert b"<b>note" not in page


def test_widths_are_the_twins_and_costs_add_up(made: Made) -> None:
    graph = profiles.resolve(graph_of(made), profiles.DEFAULT)
    sources = read([made.certificate, made.model], 20)
    data = datasets.load("digits", "test")
    explored = opened(sources.main, sources.models, data, 20)
    found = widths(explored)
    lower, upper = inputs.box(graph, explored.images, Perturbation.epsilon("0.1"))
    doubled = twin(graph)
    values = execute_all(doubled.graph, doubled.stack(lower, upper))
    outputs = {op.name: op.output for op in graph.core}
    for layer in found.layers[:-1]:
        low, high = doubled.split(outputs[layer.names[-1]], values[outputs[layer.names[-1]]])
        assert layer.mean == pytest.approx((high - low).mean(), abs=1e-12)
        assert layer.largest == (high - low).max()
        assert layer.reached <= layer.mean
    costs = sum(layer.cost for layer in found.layers) + found.comparing
    assert found.margin + costs == pytest.approx(found.reached, abs=1e-9)
    assert found.comparing >= 0 and found.reached > found.margin


CONTRASTS = [
    (text, back)
    for text in ("text", "faint", "link", "certified", "refuted", "unknown", "error")
    for back in ("back", "raised")
]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(scheme: int) -> None:
    style = (Path(__file__).parents[2] / "cactus_edge" / "report" / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    colours = dict(re.findall(r"--(\w+): #(\w{6})", blocks[scheme]))

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for text, back in CONTRASTS:
        bright, dim = sorted((luminance(text), luminance(back)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, back)


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 100)), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_chart_lies_in_its_frame(points: list[list[tuple[float, float]]]) -> None:
    made = chart("t", "x", "y", [Series(str(i), tuple(p)) for i, p in enumerate(points)])
    left, top, right, bottom = made.frame
    ticks = [tick.at for tick in made.x_ticks]
    assert 2 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert (ticks[0], ticks[-1]) == (left, right)
    for one, given_points in zip(made.series, points, strict=True):
        assert len(one.marks) == len(given_points)
        for x, y, _ in one.marks:
            assert left <= x <= right and top <= y <= bottom
