"""The front page quotes measured figures, and its picture is drawn from them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.certificate import Summary
from cactus_edge.profiles import PROFILES
from firmware_sim import simulate

ROOT = Path(__file__).resolve().parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
LONGEST = 170
Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["rows"]


def one(found: list[Row], **wanted: object) -> Row:
    (row,) = [row for row in found if all(row[key] == value for key, value in wanted.items())]
    return row


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_accuracies_are_measured() -> None:
    table = rows("mnist")
    for model, title in (
        ("int8, 50 % sparse", "int8, 50 % of weights pruned"),
        ("int4, 80 % sparse", "int4, 80 % of weights pruned"),
    ):
        row = one(table, model=model)
        shares = f"{float(row['standard %']):.2f} % | {float(row['certified %']):.2f} %"
        assert f"| {title} | {int(row['bytes']):,} bytes | {shares} |" in README
    page = (ROOT / "docs" / "results" / "mnist.md").read_text(encoding="utf-8")
    said = re.search(
        r"`recipes/mnist-quick.toml` \(cnn-small, ([\d,]+ parameters)\), trained in (\d+ s)", page
    )
    assert said and f"`recipes/mnist-quick.toml`, {said[1]}, {said[2]} on" in README
    card = json.loads((ROOT / "models" / "mnist-0.1" / "certificate.json").read_bytes())
    summary = msgspec.convert(card["summary"], Summary)
    shown = f"{100 * summary.standard_accuracy:.2f} % standard, "
    assert f"{shown}{100 * summary.certified_accuracy:.2f} % certified" in README


def test_soundness_and_runtimes_are_measured() -> None:
    counts = {row["figure"]: row["count"] for row in rows("soundness")}
    assert (
        f"{counts['boxes']} small boxes enumerated, [{counts['violations']} violations]" in README
    )
    executors = rows("mnist-runtimes")
    between = {row["model"]: row for row in executors if row["runtime"] == "between runtimes"}
    plain = between["int8, 50 % sparse, plain"]
    names = {row["runtime"] for row in executors} - {"between runtimes"}
    distinct = plain["profile"].removesuffix(" distinct outputs")
    said = f"{distinct} distinct outputs on {len(names)} executors, {plain['mismatches']} of "
    assert f"{said}{plain['logits']:,} logits differ" in README
    universal = [row for model, row in between.items() if model.endswith("universal")]
    assert {(row["profile"], row["mismatches"]) for row in universal} == {("1 distinct output", 0)}
    assert f"[1 output on {len(names)} executors]" in README


def test_profiles_are_counted() -> None:
    assert "all twelve named profiles" in README and "all twelve rounding profiles" in README
    assert len(PROFILES) == 12


def test_the_comparison_with_a_float_verifier_is_measured() -> None:
    row = one(rows("peers"), images="first 1000", auto_LiRPA="alpha-CROWN", **{
        "cactus-edge": "complete"})  # fmt: skip
    theirs = row["both"] + row["only theirs"] + row["theirs refuted"]
    assert f"alpha-CROWN calls {theirs} of 1,000 MNIST images robust" in README
    assert f"({row['theirs ms']} ms each), [{row['theirs refuted']} of which]" in README
    ours = f"proves {row['both'] + row['only ours']} of the integers ({row['ours ms']} ms)"
    assert ours in README
    cases = rows("peers-constructed")
    robust = [row for row in cases if row["CROWN"].startswith("robust")]
    broken = [row for row in robust if row["device"] == "misclassifies"]
    said = f"CROWN calls {len(robust)} of {len(cases)} robust, of which the device breaks "
    assert f"{said}{len(broken)}; `certify` certifies none" in README
    assert "certified" not in {row["cactus-edge"] for row in cases}


def test_speed_is_measured() -> None:
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    sparse, dense = (
        re.search(rf"^\| {name} \| ([\d.]+) \|", page, re.MULTILINE)
        for name in ("cnn-small int8 90 %", "mlp int8 0 %")
    )
    assert sparse and dense
    said = f"{sparse[1]} times as fast at 90 % zeros (cnn-small, int8), {dense[1]} at none (mlp)"
    assert said in README


def test_instructions_of_the_demo_are_those_of_its_model() -> None:
    """The 4-bit model of the demo and of docs/search.md is the one in the repository."""
    pytest.importorskip("unicorn", reason="unicorn is not installed")
    pytest.importorskip("ziglang", reason="ziglang is not installed")
    graph, _ = flatbuffer.load(ROOT / "models" / "digits-0.05" / "model.tflite")
    stored = inputs.stored(graph, datasets.load("digits", "test").images[:1])
    counted = f"{simulate(graph, stored, cpu='cortex-m4').instructions.median:,}"
    assert re.search(rf"│ int4, 70 % sparse │[^┃└]*│ {counted} │", README)
    guide = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    assert re.search(rf"\n\| int4, 70 % pruned \|[^\n]*\| {counted} \|", guide)


def test_the_picture_is_drawn_from_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    picture = __import__("picture")
    try:
        picture.draw(tmp_path / "overview.svg")
    finally:
        sys.modules.pop("picture", None)
    drawn = (tmp_path / "overview.svg").read_text(encoding="utf-8")
    kept = picture.PICTURE.read_text(encoding="utf-8")
    version = re.compile(r"Matplotlib v[\d.]+")
    assert version.sub("", drawn) == version.sub("", kept), "run `python tools/picture.py`"
    executors = rows("mnist-runtimes")
    for model in {row["model"] for row in executors}:
        distinct = {
            row["output"]
            for row in executors
            if row["model"] == model and row["runtime"] != "between runtimes"
        }
        said = f"{len(distinct)} different outputs" if len(distinct) > 1 else "1 output"
        assert f">{said}<" in drawn, model
    shares = [f"{float(row['certified %']):.2f} % proved" for row in rows("certification")]
    assert sorted(shares) == sorted(re.findall(r"[\d.]+ % proved", drawn))


def test_every_result_and_decision_is_in_its_list() -> None:
    for folder in ("results", "decisions"):
        page = ROOT / "docs" / folder / "README.md"
        linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", page.read_text(encoding="utf-8")))
        assert linked == {path.name for path in page.parent.glob("*.md")} - {"README.md"}
