"""Exit codes, one clear line on stderr, nothing half written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, flatbuffer, manual
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.cli import run
from cactus_edge.cli.proving import judge
from cactus_edge.errors import PropertyNotMetError
from cactus_edge.graph import (
    Conv2D,
    FullyConnected,
    Graph,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.inputs import METADATA
from firmware_sim import BOARDS

ROOT = Path(__file__).resolve().parent.parent


def digits_graph(seed: int = 0) -> Graph:
    """An untrained two-layer network on 8x8 pixels."""
    rng = np.random.default_rng(seed)
    tensors = (
        Tensor("input", (1, 8, 8, 1), quantization=Quantization.of(1 / 255, -128)),
        Tensor("hidden", (1, 4, 4, 6), quantization=Quantization.of(0.03, -128)),
        Tensor("flat", (1, 96), quantization=Quantization.of(0.03, -128)),
        Tensor("logits", (1, 10), quantization=Quantization.of(0.05, 0)),
    )
    conv = Conv2D(
        name="conv",
        inputs=(0,),
        output=1,
        weights=Weights(
            rng.integers(-100, 101, (6, 3, 3, 1)), 8, np.full(6, 0.01, np.float32).view(np.uint32)
        ),
        bias=rng.integers(-500, 500, 6),
        stride=(2, 2),
        padding=Padding.SAME,
    )
    last = FullyConnected(
        name="last",
        inputs=(2,),
        output=3,
        weights=Weights(
            rng.integers(-7, 8, (10, 96)), 4, np.array([0.02], np.float32).view(np.uint32)
        ),
        bias=rng.integers(-50, 50, 10),
    )
    pixel = json.dumps({"kind": "pixel", "levels_per_unit": 255, "offset": -128}).encode()
    reshape = Reshape(name="flatten", inputs=(1,), output=2)
    return Graph(tensors, (conv, reshape, last), 0, 3, ((METADATA, pixel),))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    flatbuffer.save(digits_graph(), path)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def certify(model: Path, *more: object) -> list[object]:
    output = model.with_suffix(".json")
    return ["certify", model, "--data", "digits", "-o", output, *more]


def test_certify_and_check(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *certify(model, "--levels", 1, "--samples", 50, "--json"))
    assert code == 0
    result = json.loads(out)
    assert sum(result["verdicts"].values()) == result["samples"] == 50
    assert result["attack_accuracy"] is None
    assert {"standard_accuracy", "certified_accuracy", "verdicts"} <= set(result)
    claim = model.with_suffix(".json")
    published = json.loads((ROOT / "docs" / "certificate.schema.json").read_text())
    lines = claim.read_text().splitlines()
    assert len(lines) == 52
    for line in lines:
        jsonschema.validate(json.loads(line), published)
    code, out, _ = call(capsys, "check", claim, model, "--data", "digits", "--json")
    assert (code, json.loads(out)["agrees"]) == (0, True)
    other = model.with_name("other.tflite")
    flatbuffer.save(digits_graph(1), other)
    code, _, err = call(capsys, "check", claim, other, "--data", "digits")
    assert code == 1
    assert "sha256" in err


def test_attack_accuracy_lies_between(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--eps", "8/255", "--samples", 40, "--attack", "--json")
    code, out, _ = call(capsys, *certify(model, *more))
    result = json.loads(out)
    assert code == 0
    assert result["certified_accuracy"] <= result["attack_accuracy"] <= result["standard_accuracy"]
    found = model.with_name("attack.json")
    arguments = ("attack", model, "--data", "digits", "--eps", "8/255", "-n", 40, "-o", found)
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(out)["verdicts"]["refuted"] == result["verdicts"]["refuted"]
    assert len(json.loads(found.read_text())) == 40


def test_analyze(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "analyze", model, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["macs"] == 16 * 6 * 9 + 960
    assert [layer["bits"] for layer in result["layers"]] == [8, 0, 4]
    code, out, _ = call(capsys, "analyze", model)
    assert (code, "CONV_2D" in out) == (0, True)


def test_require_makes_the_exit_code(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--levels", 200, "--samples", 5, "--require", "0.9")
    code, _, err = call(capsys, *certify(model, *more))
    assert code == 1
    assert "required" in err


@pytest.mark.parametrize(
    ("more", "expected", "message"),
    [
        ((), 2, "--eps or --levels"),
        (("--eps", "0.1", "--levels", "3"), 2, "--eps or --levels"),
        (("--eps", "2"), 2, "outside [0, 1]"),
        (("--eps", "much"), 2, "'--eps': 'much' is not a number"),
        (("--eps", "nan"), 2, "'--eps': 'nan' is not a number"),
        (("--eps", "1e-999999999"), 2, "not a number"),
        (("--eps", "0.1", "--require", "nan"), 2, "fraction"),
        (("--eps", "0.1", "--attack", "--steps", "0"), 2, "needs a step"),
        (("--eps", "0.1", "--steps", "5"), 2, "give --attack, too"),
        (("--eps", "0.1", "--attack", "--restarts", "-1"), 2, "no negative"),
        (("--eps", "0.1", "--samples", "99999"), 2, "which has"),
        (("--eps", "0.1", "--first", "-1"), 2, "samples 0 to 449 are in 'digits' test"),
        (("--eps", "0.1", "--first", "450"), 2, "samples 0 to 449 are in 'digits' test"),
        (("--eps", "0.1", "--samples", "0"), 2, "--samples 0: at least one"),
        (("--eps", "0.1", "--split", "holdout"), 2, "no split"),
        (("--eps", "0.1", "--profile", "nobody"), 2, "known:"),
    ],
)
def test_usage_errors(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    expected: int,
    message: str,
) -> None:
    code, out, err = call(capsys, *certify(model, *more))
    assert code == expected
    assert message in err
    assert "Traceback" not in err + out
    assert not model.with_suffix(".json").exists()


def test_check_wants_the_certificate_first(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "check", model, "claim.jsonl", "--data", "digits")
    assert (code, "the certificate comes first" in err) == (2, True)


def test_a_share_that_falls_short_is_no_hundred() -> None:
    """Of many thousand samples, one that is not certified shows."""
    verdicts = {"certified": 99_999, "refuted": 0, "unknown": 1, "error": 0}
    summary = certificate.Summary(1.0, 0.99999, None, verdicts)
    with pytest.raises(PropertyNotMetError, match=r"^99.99 % certified, 100 % required$"):
        judge(summary, None, 1.0)


def test_the_manual_replaces_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "operators.md"
    written.write_text("precious")
    code, _, err = call(capsys, "supported-ops", "--write", written)
    assert (code, "--force" in err, written.read_text()) == (2, True, "precious")
    assert call(capsys, "supported-ops", "--write", written, "--force")[0] == 0
    written.write_text(manual.markdown()[:100])  # of an earlier version
    assert call(capsys, "supported-ops", "--write", written)[0] == 0
    assert written.read_text(encoding="utf-8") == manual.markdown()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "a.onnx", "--data", "digits", "-n", "-5"], "--samples -5: give 0 or more"),
        (["-o", "a.onnx", "--index", "0"], "--eps and --index belong to the query"),
        (["-o", "a.onnx", "--float", "--uint8"], "--uint8 is about integers"),
        (["-o", "a.vnnlib", "--float", "--data", "digits", "--eps", "0.1"], "ends in .onnx"),
    ],
)
def test_exports_that_would_ignore_an_option(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(model.parent)
    code, _, err = call(capsys, "export-onnx", model, *more)
    assert (code, message in err) == (2, True)
    assert not Path("a.onnx").exists() and not Path("a.vnnlib").exists()


def test_drawings_are_svg(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["sweep", model, "--data", "digits", "--levels", 1, "-n", 1]
    code, _, err = call(capsys, *sweep, "--svg", model.with_suffix(".png"))
    assert (code, "drawings are SVG" in err) == (2, True)
    assert call(capsys, "bench", model, "--plot", model.with_suffix(".pdf"))[0] == 2


def test_a_strong_attack_is_shown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["sweep", model, "--data", "digits", "--levels", 1, "-n", 2, "--strong", "--steps", 1]
    code, out, _ = call(capsys, *sweep, "--restarts", 0)
    assert code == 0 and re.search(r"│ +1 │ +\d+\.\d\d │ +\d+\.\d\d │", out)


def test_data_of_another_shape(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.with_name("data.npz")
    images, labels = np.zeros((4, 5, 5, 1), np.uint8), np.arange(4)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    arguments = ["certify", model, "--data", path, "--eps", "0.1", "-o", model.with_suffix(".json")]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "the model takes [8, 8, 1]" in err


def test_existing_output_needs_force(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = model.with_suffix(".json")
    output.write_text("precious")
    arguments = certify(model, "--levels", 1, "--samples", 3)
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "--force" in err
    assert output.read_text() == "precious"
    assert call(capsys, *arguments, "--force")[0] == 0
    assert output.read_text() != "precious"


def test_output_that_cannot_be_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocker = model.with_name("file")
    blocker.write_text("")
    arguments = ["certify", model, "--data", "digits", "--levels", 1, "-o", blocker / "c.json"]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "cannot write" in err
    arguments[-1] = model.with_name("n" * 300)
    code, _, err = call(capsys, *arguments)
    assert (code, "cannot write" in err) == (2, True)


def test_a_defect_is_one_line_too(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen [bracket]")

    monkeypatch.setattr(flatbuffer, "load", broken)
    code, out, err = call(capsys, "analyze", model)
    assert code == 5
    assert "RuntimeError: unforeseen [bracket]" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .tflite"),
        (b"TFL3" * 40, ""),
        (bytes(range(256)) * 4, "not a .tflite"),
    ],
)
def test_models_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "bad.tflite"
    path.write_bytes(content)
    code, out, err = call(capsys, "analyze", path)
    assert code == 3
    assert message in err
    assert err.startswith("error:")
    assert "Traceback" not in err + out


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "analyze", "nowhere.tflite")
    assert code == 2
    assert "no such model" in err


def test_overflow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with a bias near 2^31 is refused by layer and channel."""
    graph = digits_graph()
    conv = graph.operators[0]
    assert isinstance(conv, Conv2D)
    good = flatbuffer.write_tflite(graph)
    marker = conv.bias.tobytes()
    bias = conv.bias.copy()
    bias[4] = 2**31 - 1
    assert good.count(marker) == 1
    path = tmp_path / "overflow.tflite"
    path.write_bytes(good.replace(marker, bias.tobytes()))
    code, _, err = call(capsys, "analyze", path)
    assert code == 3
    assert "'conv'" in err
    assert "channel 4" in err
    assert "2^27" in err


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -0.01])
def test_bad_scales_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    good = flatbuffer.write_tflite(digits_graph())
    marker = np.float32(0.05).tobytes()
    path = tmp_path / "scale.tflite"
    path.write_bytes(good.replace(marker, np.float32(bad).tobytes()))
    code, _, err = call(capsys, "analyze", path)
    assert code == 3
    assert "scale" in err
    assert "logits" in err


def test_simulate_counts_layer_by_layer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate = ["simulate", model, "--data", "digits", "--samples", 2, "--board", "RP2040"]
    simulate += ["--cpu", "cortex-m0plus", "--by-layer"]
    code, out, _ = call(capsys, *simulate, "--json")
    shown = json.loads(out)
    assert code == 0
    assert [layer["name"] for layer in shown["layers"]] == ["conv", "flatten", "last"]
    counts = [layer["instructions"] for layer in shown["layers"]]
    assert counts[0] > counts[2] > counts[1] == 0
    assert 0 < shown["instructions_median"] - sum(counts) < 50
    code, out, _ = call(capsys, *simulate)
    assert code == 0 and "FULLY_CONNECTED" in out
    assert re.search(r"cycles estimate +│ [\d,]+ to [\d,]+ ", out)
    assert max(map(len, out.splitlines())) < 100
    energy = ["--microamp-per-mhz", 100, "--volts", 2]
    code, out, _ = call(capsys, *simulate, *energy, "--json")
    result = json.loads(out)
    low, high = result["cycles_estimate"]
    assert code == 0
    assert result["instructions_median"] < low < high
    assert "DDI 0484" in result["cycles_source"]
    assert result["microjoules_estimate"] == pytest.approx([low * 2e-4, high * 2e-4])
    assert call(capsys, *simulate, "--volts", 0)[0] == 2
    unknown = [*simulate[:6], "--cpu", "cortex-m7", *energy]
    code, _, err = call(capsys, *unknown)
    assert code == 2
    assert "the cycles of a cortex-m7 are not known" in err


def test_export_c(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "firmware"
    export = ["export-c", model, "-o", folder, "--json"]
    code, out, _ = call(capsys, *export, "--prefix", "digits", "--layout", "int8", "--certified")
    shown = json.loads(out)
    assert code == 0
    assert shown["files"] == sorted(path.name for path in folder.iterdir())
    assert {layer["layout"] for layer in shown["layers"]} == {"int8", ""}
    assert shown["arena_lower_bound"] <= shown["arena_bytes"]
    assert f"0x{shown['crc32']}u" in (folder / "digits.h").read_text(encoding="utf-8")
    assert "digits_predict_certified(" in (folder / "digits.h").read_text(encoding="utf-8")
    code, _, err = call(capsys, *export, "--prefix", "digits")
    assert code == 2 and "--force" in err
    code, out, _ = call(capsys, *export, "--board", "RP2040", "--force")
    shown = json.loads(out)
    assert code == 0
    assert shown["table_bytes"] < shown["flash_bytes"] and shown["arena_bytes"] < shown["ram_bytes"]


def test_export_c_refuses_what_does_not_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(BOARDS["RP2040"], name="tiny", flash_bytes=1024)
    monkeypatch.setitem(BOARDS, "tiny", small)
    folder = tmp_path / "firmware"
    code, _, err = call(capsys, "export-c", model, "-o", folder, "--board", "tiny")
    assert code == 3
    assert "does not fit tiny" in err and "layer 2 (FULLY_CONNECTED 'last')" in err
    assert not folder.exists()


def test_help_has_an_example_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    making = ["train", "convert", "export-onnx"]
    proving = ["analyze", "certify", "merge", "check", "attack", "supported-ops", "twin"]
    verbs = [*making, *proving, "validate", "bench", "simulate", "export-c", "universalize", "demo"]
    for verb in verbs:
        code, out, _ = call(capsys, verb, "--help")
        assert code == 0, verb
        assert f"cactus-edge {verb}" in " ".join(out.split()).replace("│", ""), verb
        assert "--json" in out, verb


def test_samples_say_what_is_skipped(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verbs that time kernels take samples, and not noise."""
    limits = Ceilings("test", 100.0, {}, {})
    monkeypatch.setattr("cactus_edge.bench.ceilings.measure", lambda: limits)
    forced = ("explain", model, "--layout", "skipping")
    code, out, _ = call(capsys, *forced, "--data", "digits", "--json")
    assert code == 0
    conv, last = json.loads(out)["layers"]
    assert conv["live"] is None
    if json.loads(out)["tier"].startswith("av"):
        assert last["kernel"].startswith("skipping stream, int4") and 0 < last["live"] <= 1
        assert json.loads(call(capsys, *forced, "--json")[1])["layers"][1]["live"] is None
        assert "live %" in " ".join(call(capsys, *forced, "--data", "digits")[1].split())
    assert call(capsys, *forced, "--data", "nothing")[0] == 2
    code, out, _ = call(
        capsys, "bench", model, "--data", "digits", "--rounds", 1, "--batch", 1, "--no-starts",
        "--peer", "litert-builtin", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["ours"]["median_us"] > 0


def test_published_documents_are_generated() -> None:
    schema = json.loads((ROOT / "docs" / "certificate.schema.json").read_text())
    assert schema == json.loads(msgspec.json.encode(certificate.schema()))
    assert (ROOT / "docs" / "operators.md").read_text() == manual.markdown()


def test_labels_beyond_the_logits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = digits_graph()
    last = graph.operators[2]
    assert isinstance(last, FullyConnected)
    tensors = (*graph.tensors[:3], replace(graph.tensors[3], shape=(1, 4)))
    narrow = replace(
        last, weights=replace(last.weights, values=last.weights.values[:4]), bias=last.bias[:4]
    )
    path = model.with_name("four.tflite")
    flatbuffer.save(replace(graph, tensors=tensors, operators=(*graph.operators[:2], narrow)), path)
    code, _, err = call(
        capsys, "certify", path, "--data", "digits", "--levels", 1, "-o", path.with_suffix(".json")
    )
    assert code == 2
    assert "the model has 4 logits" in err


def test_a_profile_named_twice_counts_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("--profile", "tflite-micro")
    code, out, _ = call(capsys, *certify(model, "--levels", 1, "-n", 3, *name, *name, "--json"))
    assert (code, json.loads(out)["profiles"]) == (0, ["tflite-micro"])
    claim = model.with_suffix(".json")
    assert call(capsys, "check", claim, model, "--data", "digits")[0] == 0
