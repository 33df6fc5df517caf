"""Each network the whole way: an epoch of training, integers, LiteRT, bounds of the integers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.certify import Certifier
from cactus_edge.execute import execute
from cactus_edge.inputs import Perturbation
from cactus_edge.train import lower, parse_recipe, train, zoo
from cactus_edge.train.checkpoint import save_model
from cactus_edge.train.zoo import Add, build
from cactus_edge.validate import peers, validate_model

WIDTHS = {"cnn-5": 0.125, "cnn-7": 0.05, "resnet-8": 0.25, "ds-cnn": 0.25}
STOCK = ("LiteRT default", "TFLite Micro")


@pytest.mark.parametrize("name", WIDTHS)
def test_the_whole_way(name: str, few_text: str, tmp_path: Path) -> None:
    text = few_text
    for old, new in (
        ("epochs = 2", "epochs = 1"),
        ("batch_size = 16", "batch_size = 48"),
        ("[compression]", '[compression]\ndraw = "one"'),
        ('"cnn-tiny"', f'"{name}"'),
        ("width = 0.25", f"width = {WIDTHS[name]}"),
    ):
        text = text.replace(old, new)
    recipe = parse_recipe(text)
    summary = train(recipe, tmp_path / "run", device="cpu")
    assert all(0 <= m.test.certified <= m.test.standard <= 1 for m in summary.members)
    path = tmp_path / "model.tflite"
    report = lower.convert(tmp_path / "run", path, bits=8, sparsity=0.5, epsilon=0.02)
    assert report.universal
    graph, data = flatbuffer.load(path)
    images = datasets.load(recipe.data.name, "test").images[:16]
    stored = inputs.stored(graph, images)
    candidates = [peer for peer in peers() if peer.name in STOCK]
    result = validate_model(graph, stored, data=data, candidates=candidates, layer_samples=2)
    assert {peer.status for peer in result.peers} <= {"equal", "absent"}
    low, high = inputs.box(graph, images, Perturbation.epsilon("0.02"))
    lower_logits, upper_logits = Certifier(graph).bounds(low, high)[0]
    rng = np.random.default_rng(0)
    points = rng.integers(low, high + 1, (20, *low.shape))
    logits = execute(graph, points.reshape(-1, *low.shape[1:])).reshape(20, len(low), -1)
    assert (lower_logits <= logits).all() and (logits <= upper_logits).all()
    assert (lower_logits < upper_logits).any()


def test_widths_scale_every_branch() -> None:
    network = build("resnet-8", (3, 32, 32), 10, 0.5).eval()
    widths = [layer.weight.shape[0] for _, layer in network.weighted()]
    assert widths == [8, 8, 8, 16, 16, 16, 32, 32, 32, 10]
    assert sum(isinstance(layer, Add) for _, layer in network.layers()) == 3
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_the_documented_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file and the registry line of the documentation, executed."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = text[text.index("## Networks") : text.index("## Data")]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (line,) = re.findall(r"The line in `NETWORKS` is `(.*?)`", section)
    names: dict[str, object] = {}
    exec(compile(program, "cnn_skip.py", "exec", dont_inherit=True), names)
    added = eval("{" + line + "}", names)
    monkeypatch.setattr(zoo, "NETWORKS", zoo.NETWORKS | added)
    network = build("cnn-skip", (1, 8, 8), 10)
    torch.manual_seed(0)
    save_model(tmp_path, network, parse_recipe(RECIPE), {}, "11" * 32)
    report = lower.convert(tmp_path, tmp_path / "skip.tflite", epsilon=0.02)
    assert report.universal
    graph, _ = flatbuffer.load(tmp_path / "skip.tflite")
    assert [op.kind for op in graph.core].count("ADD") == 1
    missing = [name for name in zoo.NETWORKS if f"`{name}`" not in section and name != "cnn-skip"]
    assert missing == []


RECIPE = """
[data]
name = "digits"
[network]
name = "cnn-skip"
[objective]
epsilon = 0.02
[optimizer]
epochs = 1
"""
