"""Whole runs on the digits: files, resumption to the bit, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from cactus_edge.errors import DataError, OutputError, UsageError
from cactus_edge.train import checkpoint, load_model, load_network, loop, train
from cactus_edge.train.checkpoint import HISTORY_FILE, METRICS_FILE, MODEL_FILE, STATE_FILE
from cactus_edge.train.recipe import Recipe, format_recipe, load_recipe, parse_recipe
from cactus_edge.train.reports import Summary
from cactus_edge.train.zoo import Network
from tests.train.interrupting import InterruptAfter


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORT_INTERVAL", -1.0)


@pytest.fixture(scope="module")
def finished(few_text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A run of one epoch in a folder that holds a file of somebody else's."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    summary = train(parse_recipe(one_epoch(few_text)), run, device="cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    return run, summary


@pytest.fixture
def copied(finished: tuple[Path, Summary], tmp_path: Path) -> Path:
    """The same run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "copied")


def one_epoch(text: str) -> str:
    return text.replace("epochs = 2", "epochs = 1")


def test_run_leaves_readable_files(few_text: str, finished: tuple[Path, Summary]) -> None:
    recipe, (run, summary) = parse_recipe(one_epoch(few_text)), finished
    assert files(run) == sorted([*checkpoint.FILES, "notes.txt"])
    assert load_recipe(run / "recipe.toml") == recipe
    stored = json.loads((run / METRICS_FILE).read_text())
    assert stored == json.loads(msgspec.json.encode(summary))
    assert [m.member for m in summary.members] == [
        "dense",
        "pruned 0.5",
        "pruned 0.7, quantized 4 bit",
        "perturbed 4 bit",
    ]
    assert all(0 <= m.test.certified <= m.test.standard <= 1 for m in summary.members)
    assert (summary.domain, summary.epsilon) == ("interval", 0.05)
    assert (run / HISTORY_FILE).read_text().startswith("epoch,epsilon,")
    model = load_model(run)
    assert sorted(model.ranges) == ["relu1", "relu2", "relu3"]
    assert model.recipe == recipe and model.metadata.data_sha256 == summary.data_sha256
    network, _ = load_network(run / MODEL_FILE)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(
    ("network", "draw"), [("cnn-tiny", '"all"'), ("cnn-small-bn", '"all"'), ("resnet-8", '"one"')]
)
def test_resumed_run_equals_uninterrupted_run(
    few_text: str, tmp_path: Path, network: str, draw: str
) -> None:
    """Interrupted within an epoch, at its end and in the next one; an epoch has nine steps."""
    text = few_text.replace("cnn-tiny", network).replace("[data]", '[data]\naugment = "flip-crop"')
    text = text.replace("l1 = 1e-6", 'loss = "sabr"\nattack_steps = 1')
    recipe = parse_recipe(text.replace("[compression]", f"[compression]\ndraw = {draw}"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, device="cpu")
    for step, epochs in ((4, 0), (9, 1), (13, 0)):
        follower = InterruptAfter(step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, parts, resume=step > 4, progress=follower, device="cpu")
        assert METRICS_FILE not in files(parts)
        assert len(follower.rows) == epochs
    follower = InterruptAfter(-1)
    train(recipe, parts, resume=True, progress=follower, device="cpu")
    assert len(follower.rows) == 1
    for name in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_complete_run_is_not_repeated(few_text: str, finished: tuple[Path, Summary]) -> None:
    run, first = finished
    before = (run / MODEL_FILE).stat().st_mtime_ns
    assert train(parse_recipe(one_epoch(few_text)), run, resume=True, device="cpu") == first
    assert (run / MODEL_FILE).stat().st_mtime_ns == before


def test_members_take_turns(few_text: str, tmp_path: Path) -> None:
    text = few_text.replace("[compression]", '[compression]\ndraw = "one"')
    train(parse_recipe(one_epoch(text)), tmp_path, device="cpu")
    assert METRICS_FILE in files(tmp_path)


def test_existing_run_is_neither_lost_nor_mixed(few_text: str, copied: Path) -> None:
    recipe = parse_recipe(one_epoch(few_text))
    with pytest.raises(OutputError, match=r"holds a run already .*--resume .*--force"):
        train(recipe, copied, device="cpu")
    with pytest.raises(UsageError, match="not both"):
        train(recipe, copied, resume=True, force=True)
    other = parse_recipe(format_recipe(recipe).replace("seed = 3", "seed = 4"))
    with pytest.raises(DataError, match="made with another recipe"):
        train(other, copied, resume=True, device="cpu")
    assert load_network(copied)[1] == recipe
    train(other, copied, force=True, device="cpu")
    assert load_network(copied)[1] == other
    assert (copied / "notes.txt").read_text() == "mine"


def test_other_mistakes_are_named(tiny: Recipe, tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used as a folder"):
        train(tiny, tmp_path / "file", device="cpu")
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        train(tiny, tmp_path / "run", device="tpu")
    huge = parse_recipe(tiny_text.replace("batch_size = 128", "batch_size = 5000"))
    with pytest.raises(DataError, match="5000 is more than the 1212 training samples"):
        train(huge, tmp_path / "run", device="cpu")


def test_divergence_stops_and_keeps_the_last_checkpoint(
    few_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, honest = parse_recipe(few_text), loop.cactus_loss

    def diverging(network: Network, *rest: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        loss, ranges = honest(network, *rest)
        return loss * (torch.nan if rest[3] == 12 else 1.0), ranges  # rest[3] is the step

    monkeypatch.setattr(loop, "cactus_loss", diverging)
    with pytest.raises(DataError, match="the loss is nan after step 13; use a smaller"):
        train(recipe, tmp_path, device="cpu")
    monkeypatch.undo()
    assert train(recipe, tmp_path, resume=True, device="cpu").epochs == 2


def test_damaged_files_are_named(few_text: str, copied: Path, tmp_path: Path) -> None:
    recipe, run = parse_recipe(one_epoch(few_text)), copied
    with pytest.raises(DataError, match="no such file"):
        load_network(tmp_path / "nothing")
    with pytest.raises(DataError, match="expected a 'cactus_edge model 1' file"):
        load_network(run / STATE_FILE)
    model = run / MODEL_FILE
    content = model.read_bytes()
    model.write_bytes(content[:200])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_network(run)
    model.write_bytes(content)
    tensors, metadata = checkpoint.read_tensors(model, "cactus_edge model 1")
    checkpoint.write_tensors(model, tensors, metadata | {"model": '{"width": 1.0}'})
    with pytest.raises(DataError, match="damaged: Object missing required field"):
        load_network(run)
    checkpoint.write_tensors(model, {"fc1.weight": torch.zeros(2, 2)}, metadata)
    with pytest.raises(DataError, match=r"damaged: .* is missing, in the described network"):
        load_network(run)
    tensors["fc1.bias"].fill_(torch.nan)
    checkpoint.write_tensors(model, tensors, metadata)
    with pytest.raises(DataError, match="not finite"):
        load_network(run)
    state = load_file(run / STATE_FILE)
    (run / STATE_FILE).write_bytes(b"{}")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        train(recipe, run, resume=True, device="cpu")
    assert state
