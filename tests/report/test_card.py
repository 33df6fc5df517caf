"""The model card and the bill of materials say what the files say, in the same bytes each time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from report.conftest import Made
from report.html import parse

from cactus_edge import report
from cactus_edge.cli import run
from cactus_edge.report.page import certified_text


@pytest.fixture(scope="module")
def sources(made: Made) -> report.Sources:
    return report.read([made.certificate, made.model], 10)


def test_the_card(sources: report.Sources, made: Made) -> None:
    text = report.card(sources).decode()
    _, head, body = text.split("---\n", 2)
    values = yaml.safe_load(head)
    result = values["model-index"][0]["results"][0]
    summary = made.claim.tail.summary
    assert [metric["value"] for metric in result["metrics"]] == [
        summary.standard_accuracy,
        summary.certified_accuracy,
    ]
    assert values["datasets"] == ["digits"]
    assert f"model.tflite, the file that ships | {made.model.stat().st_size} | 1.00 |" in body
    for fact in (made.claim.head.models[0].sha256, sources.main.sha256):
        assert fact in body
    assert report.card(report.read([made.certificate, made.model], 10)) == text.encode()


def test_radii_are_named_as_such(sources: report.Sources, made: Made) -> None:
    """What counts as certified then is the largest radius, not the certificate's accuracy."""
    claim = sources.main
    what = msgspec.structs.replace(claim.head.property, kind="radius", radius="7")
    head = msgspec.structs.replace(claim.head, property=what)
    found = replace(sources, claims=(replace(claim, head=head), sources.main))
    text = report.card(found).decode()
    assert "| certified up to 7 levels |" in text and "| certified accuracy |" not in text
    names = yaml.safe_load(text.split("---\n", 2)[1])["model-index"][0]["results"][0]["metrics"]
    assert names[1]["name"] == "certified up to 7 levels"
    one, none = (msgspec.structs.replace(what, radius=radius) for radius in ("1", "?"))
    assert certified_text(one) == "certified up to 1 level"
    assert certified_text(none) == "certified up to ? levels", "no strange file ends a report"
    root = parse(report.render(report.Page("radii", found, None, None)))
    assert [dt.text for dt in root.every("dt")][::4][:2] == [
        "certified up to 7 levels",
        "certified accuracy",
    ]


def test_names_are_no_markup(sources: report.Sources) -> None:
    claim = sources.main
    model = msgspec.structs.replace(claim.head.models[0], file="<b>|x`\n---\n# y")
    head = msgspec.structs.replace(claim.head, models=(model,))
    text = report.card(replace(sources, claims=(replace(claim, head=head),))).decode()
    assert "\n# y" not in text
    assert "<b>" not in text.split("---\n", 2)[2]
    assert yaml.safe_load(text.split("---\n", 2)[1])["model-index"][0]["name"] == model.file


def test_the_bill_is_valid(sources: report.Sources, made: Made) -> None:
    content = report.bill_of_materials(sources)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode()) is None
    document = json.loads(content)
    by_kind = {entry["type"]: entry for entry in document["components"]}
    model = by_kind["machine-learning-model"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": made.claim.head.models[0].sha256}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert float(metrics[1]["value"]) == made.claim.tail.summary.certified_accuracy
    assert report.bill_of_materials(report.read([made.certificate, made.model], 10)) == content


def test_the_command_line(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, bom = tmp_path / "README.md", tmp_path / "bom.json"
    given = ["report", str(made.certificate), str(made.model), "--card", str(card)]
    assert run([*given, "--bom", str(bom), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["page"], shown["card"], shown["bom"]) == (None, str(card), str(bom))
    assert card.read_bytes().startswith(b"---\n")
    assert run(given) == 2
    assert "use --force" in capsys.readouterr().err
    assert run(["report", str(made.certificate)]) == 2
    assert "nothing to write" in capsys.readouterr().err
    alone = tmp_path / "alone.md"
    assert run(["report", str(made.certificate), "--card", str(alone)]) == 0
    shown = capsys.readouterr()
    assert "note: no layers in the card: the model was not given (" in shown.err
    assert "samples to explore" not in shown.out and "## Layers" not in alone.read_text()
