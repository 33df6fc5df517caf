"""Several processes compute what one does, and stop together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cactus_edge.errors import DataError, MissingExtraError, UsageError
from cactus_edge.train import train
from cactus_edge.train.checkpoint import HISTORY_FILE, MODEL_FILE
from cactus_edge.train.recipe import Recipe, parse_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

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
lambda_ramp = 1
loss = "sabr"
attack_steps = 1
[compression]
members = [
    { kind = "pruned", sparsity = 0.5 },
    { kind = "quantized", bits = 4 },
    { kind = "perturbed", bits = 4 },
]
activations = "int8"
[optimizer]
epochs = 2
batch_size = 256
learning_rate = 1e-3
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, HERE / "two_processes.py", path, tmp_path / "two"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert max(result["differences"]) < 1e-9  # double precision: only the order of sums differs
    assert result["interrupted"] and result["epochs"] == [[], [1, 2]]
    assert result["summary"]["cost"]["devices"] == 2

    one = train(parse_recipe(RECIPE), tmp_path / "one", device="cpu")
    ours, alone = (
        [
            [float(cell) for cell in line.split(",")]
            for line in (tmp_path / name / HISTORY_FILE).read_text().splitlines()[1:]
        ]
        for name in ("two", "one")
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(alone), rtol=1e-3, atol=2e-3)
    weights, expected = (load_file(tmp_path / name / MODEL_FILE) for name in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert [m["member"] for m in result["summary"]["members"]] == [m.member for m in one.members]


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
