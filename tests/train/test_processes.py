"""Several processes compute what one does, and stop together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cactus_edge.errors import DataError, MissingExtraError, ToolError, UsageError
from cactus_edge.train import processes, train
from cactus_edge.train.checkpoint import HISTORY_FILE, MODEL_FILE
from cactus_edge.train.execution import Execution, Flag, fabric_for
from cactus_edge.train.prepare import Job
from cactus_edge.train.recipe import Recipe, parse_recipe
from cactus_edge.train.reports import EpochRow, Progress
from tests.train.two_processes import Interrupting, Nothing, die, work

RECIPE = """
seed = 3
threads = 1
[data]
name = "digits"
augment = "crop"
[network]
name = "cnn-small-bn"
width = 0.25
[objective]
epsilon = 0.05
epsilon_ramp = 2
nrs = 0.01
lambda_ramp = 1
loss = "sabr"
attack_steps = 1
[compression]
members = [
    { kind = "pruned", sparsity = 0.5 },
    { kind = "quantized", bits = 4 },
]
activations = "int8"
[optimizer]
epochs = 2
batch_size = 256
learning_rate = 1e-3
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    recipe, directory = parse_recipe(RECIPE), tmp_path / "two"
    execution = Execution(device="cpu", devices=2)
    directory.mkdir()
    progress = Interrupting(step=4)  # four steps per epoch
    watchdog = threading.Timer(300.0, kill_children)
    watchdog.start()
    try:
        worst, step, summary = processes.launch(
            fabric_for(execution), work, Job(recipe, directory, False, execution), progress
        )
    finally:
        watchdog.cancel()
    assert worst < 1e-13  # double precision, and sums in another order
    assert 4 <= step < 8  # both stopped at the same one, or they would wait for each other
    assert progress.epochs == [1, 2]
    assert summary.cost is not None and summary.cost.devices == 2
    assert "MASTER_PORT" not in os.environ

    one = train(recipe, tmp_path / "one", device="cpu")
    assert [m.member for m in summary.members] == [m.member for m in one.members]
    ours, alone = (rows(path / HISTORY_FILE) for path in (directory, tmp_path / "one"))
    torch.testing.assert_close(ours, alone, rtol=1e-3, atol=2e-3)
    weights, expected = (weights_of(path / MODEL_FILE) for path in (directory, tmp_path / "one"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.evidence
def test_a_killed_process_ends_the_run_and_says_how_to_go_on() -> None:
    watchdog = threading.Timer(300.0, kill_children)
    watchdog.start()
    fabric = fabric_for(Execution(device="cpu", devices=2))
    try:
        with pytest.raises(ToolError, match="a training process failed: .*SIGKILL.*--resume"):
            processes.launch(fabric, die, Nothing(), Interrupting(0))
    finally:
        watchdog.cancel()
    assert multiprocessing.active_children() == []


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    """A stored model; of biases that normalization takes away again, what it leaves of them.

    Their gradient is 0 up to rounding, which Adam turns into steps of the full learning rate.
    """
    tensors = load_file(model)
    for number in (1, 2):
        tensors[f"norm{number}.running_mean"] -= tensors.pop(f"conv{number}.bias")
    return tensors


def rows(history: Path) -> torch.Tensor:
    lines = history.read_text().splitlines()[1:]
    return torch.tensor([[float(cell) for cell in line.split(",")] for line in lines])


def kill_children() -> None:
    for process in multiprocessing.active_children():
        process.kill()


class InThisProcess:
    """Fabric whose first process is the caller."""

    global_rank = 0

    def launch(self, function: Callable[..., object], *arguments: object) -> object:
        return function(self, *arguments)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (DataError("no such digits"), DataError, "^no such digits$"),
        (MissingExtraError("pillow", "images", "reading"), MissingExtraError, "reading needs the"),
        (ValueError("odd"), ToolError, "a training process failed: odd"),
        (None, None, ""),
    ],
)
def test_what_a_process_tells_and_raises_arrives(
    raised: BaseException | None,
    expected: type[BaseException] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes.os, "getppid", os.getpid)
    row = EpochRow(1, 0.1, 0.5, 1e-3, 2.0, 0.5, 0.25)
    told: list[object] = []

    class Listening(Interrupting):
        def epoch(self, row: EpochRow) -> None:
            told.append(row)

    def telling(_fabric: object, _job: Nothing, progress: Progress | None, stop: Flag) -> int:
        assert progress is not None and not stop.is_set()
        progress.epoch(row)
        if raised is not None:
            raise raised
        return 7

    fabric: Any = InThisProcess()
    before = signal.getsignal(signal.SIGINT)
    if expected is None:
        assert processes.launch(fabric, telling, Nothing(), Listening(0)) == 7
    else:
        with pytest.raises(expected, match=message):
            processes.launch(fabric, telling, Nothing(), Listening(0))
    assert told == [row]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_cannot_be_done_is_refused_at_once(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError, match="128 samples cannot be shared equally by 3 processes"):
        train(tiny, run, device="cpu", devices=3)
    with pytest.raises(UsageError, match="--devices 0: use a number from 1"):
        train(tiny, run, device="cpu", devices=0)
    with pytest.raises(UsageError, match="unknown precision 'fp8'; use one of 32-true"):
        train(tiny, run, device="cpu", precision="fp8")
    with pytest.raises(UsageError, match="use seconds from 0"):
        train(tiny, run, device="cpu", checkpoint_seconds=float("nan"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"--tensorboard needs .*cactus-edge\[train\]"):
        train(tiny, run, device="cpu", tensorboard=True)
    assert not run.exists()
