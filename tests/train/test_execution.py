"""How runs are carried out: killed, interrupted, logged, in mixed precision, and what they cost."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cactus_edge.cli import run
from cactus_edge.errors import DataError
from cactus_edge.train import checkpoint, loop, tensorboard, train
from cactus_edge.train.checkpoint import COSTS_FILE, HISTORY_FILE, MODEL_FILE, STATE_FILE
from cactus_edge.train.cost import read_costs
from cactus_edge.train.data import Samples
from cactus_edge.train.evaluate import accuracy, precise_statistics
from cactus_edge.train.logs import DIRECTORY
from cactus_edge.train.losses import LOSSES
from cactus_edge.train.objective import cactus_loss, schedule
from cactus_edge.train.recipe import Recipe, parse_recipe
from cactus_edge.train.reports import EpochRow, StepReport
from cactus_edge.train.views import masks_of
from cactus_edge.train.zoo import build
from tests.train.killed import RECIPE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@pytest.fixture
def quick(tiny_text: str) -> Recipe:
    return parse_recipe(tiny_text.replace("cnn-tiny", "mlp"))


class Patient:
    """Shows nothing."""

    def step(self, report: StepReport) -> None:
        pass

    def epoch(self, row: EpochRow) -> None:
        pass


class InterruptAfterEpoch(Patient):
    """Presses Ctrl-C when the first epoch is over."""

    def epoch(self, row: EpochRow) -> None:
        signal.raise_signal(signal.SIGINT)


def test_a_served_run_writes_what_is_shown(
    tiny_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorBoard itself is started in tests/test_live.py."""
    asked: list[tuple[Path, int]] = []

    @contextmanager
    def serving(output: Path, port: int) -> Generator[str]:
        asked.append((output, port))
        yield "http://127.0.0.1:1/"

    monkeypatch.setattr(tensorboard, "serving", serving)
    recipe, output = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(tiny_text.replace("cnn-tiny", "mlp"))
    command = ["train", str(recipe), "-o", str(output), "--device", "cpu"]
    assert run([*command, "--serve", "--port", "1"]) == 0
    assert "live view: http://127.0.0.1:1/" in capsys.readouterr().err
    assert asked == [(output, 1)]
    assert [*(output / DIRECTORY).glob("events.out.tfevents.*")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", path, tmp_path, "7"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) == 3 and steps == sorted(steps) and steps[-1] > 6
    assert any(step % 12 for step in steps)  # killed within an epoch: little is lost
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for name in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert sorted(p.name for p in parts.iterdir()) == sorted(checkpoint.FILES)  # nothing left over


def test_interruption_in_the_last_step_of_an_epoch_loses_no_row(
    quick: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.cactus_loss

    def interrupting(*rest: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        if rest[4] == 8:  # the step, of nine per epoch
            signal.raise_signal(signal.SIGINT)
        return honest(*rest)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(quick, whole, device="cpu")
    monkeypatch.setattr(loop, "cactus_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(quick, parts, device="cpu")
    monkeypatch.undo()
    train(quick, parts, resume=True, device="cpu")
    for name in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_logs_hold_every_epoch_once(quick: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick, tmp_path, progress=InterruptAfterEpoch(), device="cpu", tensorboard=True)
    train(quick, tmp_path, resume=True, device="cpu", tensorboard=True)
    seen = scalars(tmp_path / DIRECTORY)
    with (tmp_path / HISTORY_FILE).open() as stream:
        rows = list(csv.DictReader(stream))
    names = {
        "loss": "loss",
        "validation/standard": "validation_standard",
        "validation/certified": "validation_certified",
        "schedule/epsilon": "epsilon",
        "schedule/lambda": "certified_weight",
        "schedule/learning_rate": "learning_rate",
    }
    assert sorted(seen) == sorted([*names, "cost/samples_per_second"])
    for name, values in seen.items():
        assert [step for step, _ in values] == [1, 2], name
        if name in names:
            assert [value for _, value in values] == pytest.approx(
                [float(row[names[name]]) for row in rows]
            )
    train(quick, tmp_path, force=True, device="cpu")
    assert not (tmp_path / DIRECTORY).exists()  # those of the run that was replaced


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_costs_survive_a_resumption(quick: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick, tmp_path, progress=InterruptAfterEpoch(), device="cpu")
    summary = train(quick, tmp_path, resume=True, device="cpu")
    first, second = read_costs(tmp_path, 2)
    assert (first.epoch, second.epoch) == (1, 2)
    assert (first.samples, second.samples) == (9 * 128, 8 * 128)  # the step before Ctrl-C is lost
    assert (first.evaluations, second.evaluations) == (4 * first.samples, 4 * second.samples)
    assert read_costs(tmp_path, 1) == [first]
    cost = summary.cost
    assert cost is not None and (cost.networks_per_step, cost.devices) == (4, 1)
    rate = (first.samples + second.samples) / (first.seconds + second.seconds)
    assert cost.samples_per_second == pytest.approx(rate, rel=1e-3)
    assert cost.microseconds_per_network == pytest.approx(1e6 / rate / 4, rel=1e-3)
    assert cost.seconds_per_epoch == pytest.approx(9 * 128 / rate, rel=1e-2)
    assert 2**26 < cost.memory_bytes < 2**36 and cost.gpu_memory_bytes == 0
    costs = {m.member: m.microseconds_per_sample for m in summary.members}
    assert all(costs.values())
    assert costs["perturbed 4 bit"] > costs["dense"]  # it ascends first
    (tmp_path / COSTS_FILE).write_text("epoch,samples\n1,many\n")
    (tmp_path / checkpoint.METRICS_FILE).unlink()
    with pytest.raises(DataError, match=r"costs.csv: damaged: .*; remove the file"):
        train(quick, tmp_path, resume=True, device="cpu")


def test_mixed_precision_trains_and_stores_float32(quick: Recipe, tmp_path: Path) -> None:
    summary = train(quick, tmp_path, device="cpu", precision="bf16-mixed")
    assert summary.cost is not None and summary.cost.precision == "bf16-mixed"
    stored = load_file(tmp_path / STATE_FILE)
    assert {v.dtype for k, v in stored.items() if not k.startswith("mask/")} == {torch.float32}
    with pytest.raises(DataError, match="made with another --precision"):
        train(quick, tmp_path, resume=True, device="cpu")
    train(quick, tmp_path / "full", device="cpu")
    full = load_file(tmp_path / "full" / MODEL_FILE)
    mixed = load_file(tmp_path / MODEL_FILE)
    assert any(not torch.equal(full[name], mixed[name]) for name in full)  # it had an effect


@pytest.mark.parametrize("network", ["cnn-small-bn", "resnet-8"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_works_in_mixed_precision(tiny_text: str, loss: str, network: str) -> None:
    text = tiny_text.replace("l1 = 1e-6", f'loss = "{loss}"\nattack_steps = 1')
    recipe = parse_recipe(text)
    torch.manual_seed(0)
    model = build(network, (1, 8, 8), 10, 0.25)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    masks = masks_of(model, recipe.compression.members, recipe.compression)
    now = schedule(recipe, 4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        value, ranges = cactus_loss(model, images, labels, recipe, 4, now, masks, {})
    value.backward()
    exact, _ = cactus_loss(model, images, labels, recipe, 4, now, masks, {})
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=0.05)
    assert {v.dtype for v in ranges.values()} == {torch.float32}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_evaluation_is_float32_whatever_surrounds_it() -> None:
    torch.manual_seed(1)
    model = build("cnn-small-bn", (1, 8, 8), 10, 0.25)
    samples = Samples(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)
    expected = precise_statistics(model, samples)
    with torch.autocast("cpu", torch.bfloat16):
        found = precise_statistics(model, samples)
        inside = accuracy(model, samples, 0.001)
    assert inside == accuracy(model, samples, 0.001)
    for name, moments in expected.items():
        assert all(map(torch.equal, moments, found[name]))
