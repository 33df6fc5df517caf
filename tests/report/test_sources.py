"""Which files make a report and what is refused; results of other verbs are read as written."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import msgspec
import pytest
from report.conftest import Made
from report.html import embedded, parse, rows

from cactus_edge import datasets, files, flatbuffer
from cactus_edge.bench.run import Figures as Measured
from cactus_edge.certificate import Sample
from cactus_edge.certificate_stream import write
from cactus_edge.certify import Request, certify
from cactus_edge.cli import run
from cactus_edge.cli.measuring import BenchOutput
from cactus_edge.inputs import Perturbation
from cactus_edge.report import Page, read, render, sources
from cactus_edge.search.budget import Limits
from cactus_edge.search.report import FORMAT, Candidate, Data, Device, Latency, Report, Row
from cactus_edge.shares import percent
from cactus_edge.validate.compare import PeerResult, Validation


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["report", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def results(made: Made, tmp_path: Path) -> Path:
    """A folder with the certificate, its model and a result of every other verb."""
    sha256 = made.claim.head.models[0].sha256
    (tmp_path / "c.jsonl").write_bytes(made.certificate.read_bytes())
    (tmp_path / "m.tflite").write_bytes(made.model.read_bytes())
    (tmp_path / "notes.txt").write_text("passed over in a folder")
    (tmp_path / "other.json").write_text('{"passed": "over"}')
    model = str(tmp_path / "m.tflite")
    sweep = ["sweep", model, "--data", "digits", "--levels", "0", "--levels", "9", "-n", "30"]
    assert run([*sweep, "-o", str(tmp_path / "sweep.json")]) == 0
    peers = (
        PeerResult("reference", "", "tflite-micro", "equal", "", 100, 0, 500, 0, "ab" * 32),
        PeerResult("absent-runtime", "", "tflite-x86", "absent", "not installed"),
    )
    validation = Validation(True, 10, peers, 1, 0, 0, sha256)
    (tmp_path / "validate.json").write_bytes(msgspec.json.encode(validation))
    one = Candidate("0" * 64, 500, True, 200, 150, 40, 39, 30)
    two = msgspec.structs.replace(one, sha256=sha256, nonzero=50, certified=25)
    found = Report(
        format=FORMAT,
        version=1,
        tool="cactus-edge",
        runs=(),
        data=Data("digits", "validation", "0" * 64, 40),
        epsilon="0.1",
        verifier="intervals",
        device=Device("host", "a processor", "us"),
        limits=Limits(),
        rows=(
            Row("int8, 25 % pruned", "convert", "a.tflite", one, None, 500, 12.5, front=True),
            Row("int4", "convert", "b.tflite", two, Latency(333, 1.5, 1, 2), 400, None),
        ),
        failed={},
        chosen=None,
        nearest=(),
        needed={},
    )
    (tmp_path / "search.json").write_bytes(msgspec.json.encode(found))
    start = {"load_seconds": 0.5, "first_call_us": 9.0, "memory_kib": 2048, "peak_kib": 1}
    figures = {
        "version": "1.2", "median_us": 7.25, "lower_quartile_us": 7.0, "upper_quartile_us": 8.0,
        "ratio": 1.0, "images_per_second": 1e5, "differing": 0, "compared": 160, "start": start,
    }  # fmt: skip
    bench = {
        "model": "m.tflite", "model_sha256": sha256, "machine": "a machine", "threads": 1,
        "batch": 256, "ours": figures, "absent": {"tvm": "not installed"},
        "peers": {"litert": {**figures, "median_us": 14.5, "ratio": 2.0, "start": None}},
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps([bench]))
    return tmp_path


def test_a_folder_of_all_results(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = results / "page.html"
    code, out, err = call(capsys, results, "-o", page, "-n", 3, "--json")
    assert (code, "note" in err) == (0, False)
    shown = json.loads(out)
    assert shown["results"] == {"sweep": 1, "search": 1, "bench": 1, "validate": 1}
    assert (shown["explored"], shown["bytes"]) == (3, page.stat().st_size)
    root = parse(page.read_bytes())
    text = root.text
    for wanted in ("absent-runtime", "14.50", "tvm: not installed", "certified (digits test, 30"):
        assert wanted in text
    curve = json.loads((results / "sweep.json").read_text())
    for point in curve["points"]:
        share = f"{percent(point['certified'] / curve['samples'])} %"
        assert f"certified (digits test, 30 samples): {point['radius']}, {share}" in text
    candidates = root.by_id("curves").every("table")[0]
    assert rows(candidates) == [
        ["int8, 25 % pruned", "500", "150", "500", "12.5", "97.50", "75.00", "front", ""],
        ["int4", "500", "50", "400", "–", "97.50", "62.50", "", "this model"],
    ]
    assert "int4: 75, 62.50 %" in text and "int8: 25, 75.00 %" in text
    sizes, speed = root.by_id("speed").every("table")
    assert rows(sizes)[-1][:2] == ["packed for our kernels on a processor", "333"]
    assert [row[0] for row in rows(speed)] == ["cactus-edge", "litert"]
    assert "No latency" not in text


def test_results_are_read_with_the_names_they_are_written_with() -> None:
    assert set(sources.Bench.__struct_fields__) <= set(BenchOutput.__struct_fields__)
    written = {field.name for field in dataclasses.fields(Measured)}
    assert set(sources.Figures.__struct_fields__) <= written


def test_a_certificate_alone(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    code, _, err = call(capsys, made.certificate, "-o", page)
    assert code == 0 and "the model was not given (model.tflite)" in err
    root = parse(page.read_bytes())
    assert "the model was not given" in root.text
    with pytest.raises(KeyError):
        root.by_id("data")
    code, out, _ = call(capsys, made.certificate, "-o", page, "--force", "--quiet")
    assert (code, out) == (0, "")


def tampered(made: Made, path: Path) -> None:
    path.write_bytes(made.certificate.read_bytes().replace(b'"prediction":', b'"prediction": ', 1))


def shifted(made: Made, path: Path) -> None:
    """A forger's: digest and summary fit, but a bound is not the model's."""

    def moved(line: Sample) -> Sample:
        bounds = line.bounds[0]
        lower = (bounds.lower[0] + 1, *bounds.lower[1:])
        return msgspec.structs.replace(
            line, bounds=(msgspec.structs.replace(bounds, lower=lower), *line.bounds[1:])
        )

    with path.open("wb") as stream:
        write(stream, made.claim.head, [moved(line) for line in made.claim.samples])


def other_model(made: Made, path: Path) -> None:
    curve = {"samples": 1, "correct": 1, "attacked": False, "points": [], "model_sha256": "0" * 64}
    path.write_text(json.dumps(curve))


def nameless(made: Made, path: Path) -> None:
    path.write_text('{"samples": 1, "correct": 1, "attacked": false, "points": []}')


def damaged(made: Made, path: Path) -> None:
    path.write_text('{"samples": "x", "correct": 1, "attacked": false, "points": []}')


def no_result(made: Made, path: Path) -> None:
    path.write_text('{"anything": "else"}')


def untitled(made: Made, path: Path) -> None:
    path.write_text("text")


REFUSED = [
    (tampered, "bad.jsonl", "not in canonical form"),
    (shifted, "bad.jsonl", "are not those of the models"),
    (other_model, "bad.json", "report on one model at a time"),
    (nameless, "bad.json", "does not say which model"),
    (damaged, "bad.json", "not what this version of the tool writes"),
    (no_result, "bad.json", "no result of sweep"),
    (untitled, "bad.txt", "neither a certificate"),
]


@pytest.mark.parametrize(
    ("make", "name", "message"), REFUSED, ids=[m.__name__ for m, _, _ in REFUSED]
)
def test_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], make, name: str, message: str
) -> None:
    bad, page = tmp_path / name, tmp_path / "page.html"
    make(made, bad)
    given = [bad, made.model] if name.endswith(".jsonl") else [made.certificate, bad]
    code, out, err = call(capsys, *given, "-o", page)
    assert (code, out) == (2, "") and message in " ".join(err.split())
    assert not page.exists()


def test_wrong_calls(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, other = tmp_path / "page.html", made.model.parents[1] / "turbofan-0.01" / "model.tflite"
    given = (made.certificate, made.model)
    cases = [
        ((made.model,), "no certificate among the files"),
        ((tmp_path / "none.jsonl",), "no such file"),
        ((*given, "-n", 5000), "from 0 to 1000"),
        ((made.certificate, other), "not the model of"),
        ((*given, "--data", "nothing"), "unknown data set"),
    ]
    for arguments, message in cases:
        code, _, err = call(capsys, *arguments, "-o", page)
        assert code == 2 and message in " ".join(err.split()), message
    page.write_text("mine")
    code, _, err = call(capsys, *given, "-o", page)
    assert code == 2 and "--force" in err and page.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = call(capsys, made.certificate, "-o", page, "--force")
    assert code == 2 and "cactus-edge[report]" in err and page.read_text() == "mine"


def test_another_data_set_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = datasets.load("digits", "train")
    import numpy as np

    path = tmp_path / "other.npz"
    parts = {"x_train": data.images, "y_train": data.labels, "x_test": data.images}
    np.savez(path, **parts, y_test=data.labels)
    page = tmp_path / "page.html"
    code, _, err = call(capsys, made.certificate, made.model, "--data", path, "-o", page)
    assert code == 2 and "give the data set that was certified" in " ".join(err.split())


def test_radii_and_patches(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Certificates of other sets: the slider has their own radii."""
    content, data = files.read(made.model, "model"), datasets.load("digits", "test")
    models = (("model.tflite", content),)
    each, patch = tmp_path / "radius.jsonl", tmp_path / "patch.jsonl"
    request = Request(data, Perturbation.levels(20), count=8, models=models, each_radius=True)
    certify(request, each)
    window = Perturbation.levels(40).patched(2, 2, 2)
    certify(Request(data, window, count=4, models=models, attack=None), patch)
    page = tmp_path / "page.html"
    assert call(capsys, each, made.model, "-o", page, "--quiet")[0] == 0
    root = parse(page.read_bytes())
    shown = embedded(root)
    assert [step["exact"] for step in shown["radii"]] == [
        "0",
        "3",
        "6",
        "9",
        "12",
        "15",
        "18",
        "20",
    ]
    claim = read([each], 8).main
    for sample, line in zip(shown["samples"], claim.samples, strict=True):
        assert sample["certified"] == (-1 if line.radius is None else line.radius)
        for step, letter in zip(shown["radii"], sample["verdicts"], strict=True):
            assert (int(step["exact"]) <= sample["certified"]) == (letter == "c")
    for level in (0, 7, 20):
        share = sum(
            (line.radius or 0) >= level for line in claim.samples if line.radius is not None
        )
        assert f"certified radius (radius.jsonl): {level}, {100 * share / 8:.2f} %" in root.text
    code, _, err = call(capsys, patch, made.model, "-o", page, "--force")
    assert code == 0 and "no layers: a patch" in err
    shown = embedded(parse(page.read_bytes()))
    assert [step["exact"] for step in shown["radii"]] == ["0", "40"]


def test_a_claim_about_a_query(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summary and claim alone, without samples to explore, and without accuracies."""
    graph = flatbuffer.load(made.model)[0]
    query = tmp_path / "q.vnnlib"
    names = [f"(declare-const X_{i} Real)" for i in range(graph.tensors[graph.core_input].size)]
    outputs = [f"(declare-const Y_{i} Real)" for i in range(10)]
    boxes = [f"(assert (<= X_{i} -128)) (assert (>= X_{i} -128))" for i in range(64)]
    query.write_text("\n".join([*names, *outputs, *boxes, "(assert (>= Y_0 1000))"]))
    certificate = tmp_path / "query.jsonl"
    arguments = ["verify", made.model, query, "--stored", "-o", certificate]
    assert run([str(argument) for argument in arguments]) == 0
    sources = read([certificate, made.model], 10)
    page = parse(render(Page("a query", sources, None, None)))
    assert "query q.vnnlib" in page.text and "certified 1" in " ".join(page.text.split())
    assert "accuracy" not in page.text
    capsys.readouterr()
    checked = ["check", certificate, made.model, "--query", query]
    assert run([str(argument) for argument in checked]) == 0
    shown = capsys.readouterr().out
    assert "boxes of the query re-derived" in shown and "accuracy" not in shown
