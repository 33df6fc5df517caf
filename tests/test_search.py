"""The search for a model to deploy: its front, its budgets, its files, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import certificate_stream, check, datasets
from cactus_edge.certify.sweep import sweep
from cactus_edge.cli import run
from cactus_edge.errors import DataError, DoesNotFitError, UnsupportedModelError, UsageError
from cactus_edge.search import Limits, dominates, front, read
from cactus_edge.search import measure as measuring
from cactus_edge.search.budget import choose, meets, nearest, needed, objectives
from cactus_edge.search.drawing import apart
from cactus_edge.search.space import Space
from cactus_edge.shares import percent
from cactus_edge.train import parse_recipe, train
from cactus_edge.train.lower import convert

RECIPE = """
seed = 3
threads = 1
data = { name = "digits" }
network = { name = "mlp", width = 0.25 }
objective = { epsilon = 0.02, certify_epsilon = 0.02, lambda_ramp = 1 }
optimizer = { epochs = 3, batch_size = 64, learning_rate = 5e-3 }

[compression]
members = [
    { kind = "dense" },
    { kind = "pruned-quantized", sparsity = 0.5, bits = 4 },
    { kind = "structured", sparsity = 0.5 },
    { kind = "quantized", bits = 6 },
]
"""

Points = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12)


@dataclass(frozen=True)
class Row:
    """A candidate's figures."""

    size: int
    cost: float | None
    certified_accuracy: float
    name: str = "row"


Rows = st.lists(
    st.builds(
        Row,
        size=st.integers(1, 6).map(lambda n: 512 * n),
        cost=st.none() | st.integers(1, 6).map(float),
        certified_accuracy=st.integers(0, 8).map(lambda n: n / 8),
    ),
    max_size=8,
)
Bounds = st.builds(
    Limits,
    max_size=st.none() | st.sampled_from([0.4, 1, 2, 2.5]),
    max_latency=st.none() | st.sampled_from([0.5, 1, 3, 6]),
    min_certified=st.none() | st.sampled_from([0, 12.5, 50, 99]),
)


@given(Points)
def test_front(points: list[tuple[int, ...]]) -> None:
    kept = front(points)
    assert kept == sorted(set(kept))
    for index, point in enumerate(points):
        beaten = any(dominates(points[other], point) for other in kept)
        assert beaten is (index not in kept)


@given(Rows, Bounds)
def test_choice_keeps_the_limits_and_is_on_the_front(rows: list[Row], limits: Limits) -> None:
    chosen = choose(rows, limits)
    able = [row for row in rows if meets(row, limits)]
    assert (chosen is None) is (not able)
    if chosen is None:
        return
    row = rows[chosen]
    assert row in able
    assert chosen in front([objectives(row) for row in rows])
    if limits.min_certified is None:
        assert row.certified_accuracy == max(other.certified_accuracy for other in able)
    else:
        assert row.cost == min(other.cost for other in able)


@given(Rows, Bounds)
def test_what_is_needed_suffices_and_less_does_not(rows: list[Row], limits: Limits) -> None:
    if choose(rows, limits) is not None:
        return
    able = [row for row in rows if row.cost is not None]
    close = nearest(rows, limits)
    assert len(close) == min(3, len(able))
    assert all(entry.misses for entry in close)
    for option, value in needed(rows, limits).items():
        field = option.removeprefix("--").replace("-", "_")

        def with_limit(number: float, field: str = field) -> Limits:
            return msgspec.structs.replace(limits, **{field: number})

        if value is None:
            assert choose(rows, with_limit(0 if field == "min_certified" else 1e9)) is None
            continue
        assert choose(rows, with_limit(value)) is not None
        tighter = value + 1e-6 if field == "min_certified" else value - 1e-6
        assert choose(rows, with_limit(tighter)) is None


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=12))
def test_labels_do_not_cover_each_other(places: list[tuple[float, float]]) -> None:
    spots = apart(places, 2, 0.5)
    for index, (place, spot) in enumerate(zip(places, spots, strict=True)):
        assert spot[0] == place[0]
        assert spot[1] <= place[1]
        for other in spots[:index]:
            assert abs(other[0] - spot[0]) >= 2 or abs(other[1] - spot[1]) >= 0.5 - 1e-9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some seconds."""
    path = tmp_path_factory.mktemp("search") / "run"
    train(parse_recipe(RECIPE), path, device="cpu")
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["search", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def options(path: Path, output: Path, *more: object) -> list[object]:
    return [path, "--data", "digits", "--eps", "0.02", "-o", output, "--samples", 60, *more]


def test_search_of_this_machine(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "_MOST_ROUNDS", 5)
    output = tmp_path / "found"
    more = ("--sparsity", "0,0.5", "--bits", "4", "--member", 2, "--member", 3)
    code, _, err = call(capsys, *options(trained, output, *more))
    assert code == 0, err
    report = read(output / "search.json")
    names = {row.name for row in report.rows}
    assert names == {"int4", "int4, 50 % pruned", "int4, structured 0.5"}
    assert report.data.split == "validation"
    assert report.data.sha256 == datasets.load("digits", "validation").sha256
    assert [row.name for row in report.rows if row.front] == [
        report.rows[index].name for index in front([objectives(row) for row in report.rows])
    ]
    assert all(row.latency is not None and row.cost == row.latency.median for row in report.rows)
    chosen = report.chosen
    assert chosen is not None
    row = next(row for row in report.rows if row.name == chosen.name)
    assert row.certified_accuracy == max(other.certified_accuracy for other in report.rows)

    content = (output / "chosen.tflite").read_bytes()
    assert content == (output / row.file).read_bytes()
    test = datasets.load("digits", "test")
    with certificate_stream.reading(output / "chosen.certificate.jsonl") as claim:
        assert check.check(claim, [content], test).agrees
    assert len(test.labels) == chosen.data.samples
    drawn = xml.parse(output / "front.svg").getroot()
    assert drawn.tag.endswith("svg")

    pruned = next(row for row in report.rows if row.name == "int4, 50 % pruned")
    same = tmp_path / "same.tflite"
    convert(trained, same, bits=4, sparsity=0.5)
    assert same.read_bytes() == (output / pruned.file).read_bytes()
    assert pruned.model.nonzero <= pruned.model.weights / 2 + 10

    # Nothing that is there is measured again: damaged candidates are, and nothing else.
    measured: list[int] = []
    monkeypatch.setattr(measuring, "sweep", lambda *a, **k: (measured.append(1), sweep(*a, **k))[1])
    code, _, err = call(capsys, *options(trained, output, *more))
    assert (code, "--force" in err) == (2, True)
    (output / pruned.file).write_bytes(b"damaged")
    code, out, _ = call(capsys, *options(trained, output, *more, "--force", "--json"))
    assert (code, len(measured)) == (0, 1)
    again = json.loads(out)["rows"]
    assert [row["model"] for row in again] == [
        msgspec.to_builtins(row.model) for row in report.rows
    ]


def test_stopped_search_goes_on(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "_MOST_ROUNDS", 5)
    output = tmp_path / "found"
    more = ("--sparsity", "0,0.5", "--bits", "8", "--max-size", "0.1")
    calls: list[int] = []

    def stop(*arguments: object, **keywords: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "sweep", stop)
    code, _, err = call(capsys, *options(trained, output, *more))
    assert (code, "goes on" in err) == (130, True)
    assert not (output / "search.json").exists()
    code, _, err = call(capsys, *options(trained, output, *more))
    assert len(calls) == 3, "a finished candidate was measured again"
    assert code == 1
    assert "nearest: int8" in err
    assert "--max-size" in err
    report = read(output / "search.json")
    assert report.chosen is None
    least = min(row.size for row in report.rows) / 1024
    assert report.needed == {"--max-size": least}
    for row in report.rows:
        assert f"{row.name}: {percent(row.certified_accuracy)} % certified" in err
    assert not (output / "chosen.tflite").exists()


def test_search_of_a_microcontroller(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--device", "cortex-m4", "--bits", "4", "--sparsity", "0,0.9", "--min-certified", "1")
    code, _, err = call(capsys, *options(trained, tmp_path / "found", *more))
    assert code == 0, err
    report = read(tmp_path / "found" / "search.json")
    assert (report.device.processor, report.device.unit) == ("cortex-m4", "instructions")
    dense, pruned = report.rows
    assert dense.model.firmware is not None
    assert pruned.model.firmware is not None
    assert (dense.size, dense.cost) == (
        dense.model.firmware.flash_bytes,
        dense.model.firmware.instructions,
    )
    assert pruned.cost is not None and dense.cost is not None
    assert pruned.cost < dense.cost
    assert report.chosen is not None
    assert report.chosen.name == pruned.name, "the cheapest that is certified enough"


def test_models_that_the_board_cannot_hold(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise DoesNotFitError("the model does not fit")

    monkeypatch.setattr(measuring, "simulate", full)
    more = ("--device", "STM32L073", "--bits", "8", "--sparsity", "0")
    code, out, err = call(capsys, *options(trained, tmp_path / "found", *more))
    assert (code, "no candidate fits STM32L073 (cortex-m0plus)" in err) == (1, True), err
    assert "int8: the model does not fit" in err
    (row,) = read(tmp_path / "found" / "search.json").rows
    assert (row.cost, row.front, row.meets) == (None, False, False)


def test_models_without_a_deployed_form(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> None:
        raise UnsupportedModelError("layer 'x': no deployed form")

    monkeypatch.setattr(measuring, "deployed", refuse)
    code, _, err = call(capsys, *options(trained, tmp_path / "found"))
    assert (code, "error: layer 'x'" in err) == (3, True)
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "5"), "weights are deployed at"),
        (("--bits", "eight"), "give numbers with commas"),
        (("--sparsity", "1"), "from 0 to below 1"),
        (("--member", "9"), "the recipe has these members"),
        (("--member", "4"), "--bits 6"),
        (("--max-instructions", "5"), "name one with --device"),
        (("--device", "cortex-m4", "--max-latency", "5"), "is emulated"),
        (("--device", "abacus"), "known: host, cortex-m0plus"),
        (("--max-size", "0"), "above 0"),
        (("--min-certified", "101"), "from 0 to 100"),
        (("--samples", "0"), "has 135 samples"),
        (("--eps", "2"), "outside [0, 1]"),
        (("--eps", "much"), "is not a number"),
        (("--data", "no-such-data"), "unknown data set"),
    ],
)
def test_bad_input(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    code, _, err = call(capsys, *options(trained, tmp_path / "found", *more))
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "found").exists()


def test_runs_that_cannot_be_compared(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, trained, *options(trained, tmp_path / "found"))
    assert (code, "give each run once" in err) == (2, True)
    code, _, err = call(capsys, *options(tmp_path, tmp_path / "found"))
    assert (code, "no such file" in err) == (2, True)


def test_space() -> None:
    recipe = parse_recipe(RECIPE)
    every = [option.name for option in Space().candidates(recipe)]
    assert len(every) == len(set(every)) == 4 * 4 + 4, "the members 1, 2 and 4 add nothing"
    assert every[-1] == "int2, structured 0.5"
    with pytest.raises(UsageError, match="nothing to search"):
        Space(bits=()).candidates(parse_recipe(RECIPE.split("[compression]")[0]))


def test_reports_of_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="not a result of a search"):
        read(path)
