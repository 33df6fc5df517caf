"""Members of the compression set in training, in conversion and in the manual."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from cactus_edge import datasets
from cactus_edge.cli import main
from cactus_edge.errors import UsageError
from cactus_edge.train import checkpoint, loop, train, views
from cactus_edge.train.lower import chosen_member, convert
from cactus_edge.train.members import (
    Blocks,
    Dense,
    Member,
    MemberKind,
    NOfM,
    Perturbed,
    Pruned,
    PrunedQuantized,
    Quantized,
    Structured,
)
from cactus_edge.train.objective import cactus_loss, drawn_members, schedule
from cactus_edge.train.recipe import Compression, Recipe, format_recipe, load_recipe, parse_recipe
from cactus_edge.train.zoo import build
from tests.train.interrupting import InterruptAfter
from tests.train.networks import ROOT, deployed, groups


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "member", [NOfM(1, 4, 3), Blocks(0.5, 2, 2, 4), Structured(0.5, 2), PrunedQuantized(0.5, 2)]
)
def test_survivors_get_the_gradient_straight_through(member: MemberKind) -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.3)
    choice = Compression((member,))  # pyright: ignore[reportArgumentType]
    masks = views.masks_of(network, choice.members, choice)[member.pattern().key()]
    view = views.training_view(network, member, choice, masks, {}, lambda _: torch.zeros(()))
    factors = {name: torch.randn(weight.shape) for name, weight in view.weights.items()}
    torch.stack(
        [(view.weights[n] * factor).sum() for n, factor in factors.items()]
    ).sum().backward()
    for name, layer in network.weighted():
        mask = masks.get(name, torch.ones_like(layer.weight, dtype=torch.bool)).expand(
            layer.weight.shape
        )
        assert layer.weight.grad is not None
        weight = (layer.weight * mask).detach()  # the largest of a channel moves its step as well
        others = mask & (
            weight.abs() < weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1))
        )
        torch.testing.assert_close(layer.weight.grad[others], factors[name][others])
        assert not layer.weight.grad[~mask].any()
        bits = member.weight_bits()
        assert bits is not None
        levels = len(torch.unique(view.weights[name][0].abs().clamp(min=1e-12)))
        assert levels <= 2 ** (bits - 1)
        assert not view.weights[name][~mask].any()


def test_deployed_weights_are_pruned_and_rounded() -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.3)
    member = NOfM(2, 4, bits=3)
    view = views.deployed_view(network, member, Compression((member,)), {})
    for matrix in deployed(network, dict(view.weights)).values():
        assert all((np.count_nonzero(part, 1) <= 2).all() for part in groups(matrix, 4))
        for row in matrix:
            assert len(np.unique(np.abs(row))) <= 4


def test_equal_patterns_share_masks() -> None:
    network = build("cnn-tiny", (1, 8, 8), 10, 0.3)
    members = (
        Dense(),
        Pruned(0.5),
        Quantized(4),
        PrunedQuantized(0.5, 4),
        Perturbed(4, sparsity=0.5),
        NOfM(2, 4, bits=4),
        NOfM(2, 4),
        NOfM(4, 4),
        Structured(0.0),
        Blocks(0.0),
    )
    made = views.masks_of(network, members, Compression(members))
    assert sorted(made) == ["0.5", "2:4"]
    assert all("/" not in member.pattern().key() for member in members)


FIVE = """[
    { kind = "n-of-m", n = 2, m = 4, bits = 4 },
    { kind = "structured", sparsity = 0.25 },
    { kind = "structured", sparsity = 0.5, bits = 3 },
    { kind = "blocks", sparsity = 0.5, rows = 8, inputs = 4, bits = 2 },
    { kind = "pruned-quantized", sparsity = 0.8, bits = 8 },
]
"""


def five(text: str, refresh: str, draw: str) -> str:
    start = text.index("members = [")
    end = text.index("]\n", start) + 2
    text = text[:start] + f"members = {FIVE}draw = {draw}\n" + text[end:]
    return text.replace('mask_refresh = "epoch"', f'mask_refresh = "{refresh}"')


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_five_members_drawn_in_twos_resume_to_the_bit(
    few_text: str, tmp_path: Path, refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "REPORT_INTERVAL", -1.0)
    recipe = parse_recipe(five(few_text, refresh, "2"))
    assert parse_recipe(format_recipe(recipe)) == recipe
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = train(recipe, whole, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, parts, progress=InterruptAfter(5), device="cpu")
    train(recipe, parts, resume=True, device="cpu")
    for name in (checkpoint.MODEL_FILE, checkpoint.STATE_FILE, checkpoint.HISTORY_FILE):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert [member.member for member in summary.members] == [
        "2:4, quantized 4 bit",
        "structured 0.25",
        "structured 0.5, quantized 3 bit",
        "blocks 8x4 0.5, quantized 2 bit",
        "pruned 0.8, quantized 8 bit",
    ]
    if refresh == "step":
        return
    # Each member that was trained is deployed by its number.
    sizes: list[int] = []
    for number, width in enumerate((4, 8, 3, 2, 8), 1):
        file = tmp_path / f"{number}.tflite"
        report = convert(whole, file, member=str(number))
        assert (report.bits, report.bytes) == (width, file.stat().st_size)
        assert report.pattern == recipe.compression.members[number - 1].pattern().key()
        sizes.append(report.bytes)
    assert sizes[1] < sizes[4]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_draw_of_several_visits_all(tiny_text: str, count: int) -> None:
    recipe = parse_recipe(five(tiny_text, "step", str(count)))
    members = recipe.compression.members
    drawn = [drawn_members(recipe, step) for step in range(300)]
    assert drawn == [drawn_members(recipe, step) for step in range(300)]
    visits = Counter(member for chosen in drawn for member in chosen)
    assert all(len(set(chosen)) == count for chosen in drawn)
    assert all([m for m in members if m in chosen] == list(chosen) for chosen in drawn)
    # Binomial with a standard deviation of at most 8.7.
    assert all(abs(visits[member] - 60 * count) < 45 for member in members)


def test_the_mean_over_draws_is_the_mean_over_members(tiny_text: str) -> None:
    """Of all pairs of five members, each member is in the same number."""
    everything = parse_recipe(five(tiny_text, "step", '"all"'))
    pairs = parse_recipe(five(tiny_text, "step", "2"))
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.3)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    masks = views.masks_of(network, everything.compression.members, everything.compression)

    def loss(recipe: Recipe, step: int) -> float:
        now = schedule(everything, 15, 10)
        return float(cactus_loss(network, images, labels, recipe, step, now, masks, {})[0].detach())

    values: dict[tuple[str, ...], float] = {}
    for step in range(200):
        chosen = tuple(member.label() for member in drawn_members(pairs, step))
        if chosen not in values:
            values[chosen] = loss(pairs, step)
    assert len(values) == 10
    assert sum(values.values()) / 10 == pytest.approx(loss(everything, 0), rel=1e-4)


# ---------------------------------------------------------------------- conversion
def test_members_to_ship_are_numbers_or_tables(tiny_text: str) -> None:
    recipe = parse_recipe(five(tiny_text, "step", "1"))
    assert chosen_member(recipe, "3") == recipe.compression.members[2] == Structured(0.5, 3)
    assert chosen_member(recipe, '{ kind = "n-of-m", n = 1, m = 4 }') == NOfM(1, 4)
    for text, expected in (
        ("0", r"--member 0: the recipe has these members: 1 2:4, quantized 4 bit; 2 struc"),
        ("6", r"--member 6: the recipe has"),
        ("half", r"--member half: not a table of TOML: .*; write a number from 1 to 5, or a"),
        ('{ kind = "n-of-n" }', r"Invalid value 'n-of-n'; kind is one of 'dense' .*write a num"),
        ('{ kind = "blocks", sparsity = 1.0 }', r"Expected `float` < 1.0"),
    ):
        with pytest.raises(UsageError, match=expected):
            chosen_member(recipe, text)


def test_a_width_or_sparsity_besides_the_member_is_refused(tmp_path: Path) -> None:
    network = build("mlp", (64,), 10, 0.1)
    data = datasets.load("digits", "train")
    recipe = load_recipe(ROOT / "recipes" / "digits.toml")
    checkpoint.save_model(tmp_path, network, recipe, {}, data.sha256)
    member = '{ kind = "quantized", bits = 4 }'
    with pytest.raises(UsageError, match=r"--bits 8: the member 'quantized 4 bit' has 4 bits"):
        convert(tmp_path, tmp_path / "a.tflite", bits=8, member=member)
    with pytest.raises(UsageError, match="give --sparsity or --member, not both"):
        convert(tmp_path, tmp_path / "a.tflite", sparsity=0.5, member=member)


def test_the_command_ships_a_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10)
    data = datasets.load("digits", "train")
    recipe = load_recipe(ROOT / "recipes" / "digits.toml")
    checkpoint.save_model(tmp_path, network, recipe, {}, data.sha256)
    for text in ('{ kind = "n-of-m", n = 2, m = 4 }', '{ kind = "structured", sparsity = 0.5 }'):
        arguments = ["convert", str(tmp_path), "-o", str(tmp_path / "a.tflite"), "--force"]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--bits", "4", "--member", text, "--json"])
        assert stopped.value.code == 0
        report = json.loads(capsys.readouterr().out)
        assert report["bits"] == 4
        assert report["pattern"] in ("2:4", "structured 0.5")
        assert report["channels_removed"] == (56 if "structured" in text else 0)


# ---------------------------------------------------------------------- the manual
def manual() -> str:
    return (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_kind_stands_in_the_manual() -> None:
    kinds: Sequence[type[MemberKind]] = get_args(Member)
    for kind in kinds:
        row = f'| `{{ kind = "{kind.__struct_config__.tag}"'
        assert row in manual(), row
    assert len({kind.__struct_config__.tag for kind in kinds}) == len(kinds)


def test_a_member_is_one_file_and_one_line(tmp_path: Path, few_text: str) -> None:
    """What the manual says about a member of one's own, done to a copy of the package."""
    section = manual().split("### A member of your own")[1].split("\n## ")[0]
    module = section.split("```python\n")[1].split("```")[0]
    imported, registered = re.findall(r"`(from [\w.]+members[\w.]+ import \w+|\| \w+)`", section)
    package = tmp_path / "cactus_edge"
    shutil.copytree(ROOT / "cactus_edge", package)
    members = package / "train" / "members"
    (members / "fewer_inputs.py").write_text(module, encoding="utf-8")
    registry = members / "__init__.py"
    text = registry.read_text(encoding="utf-8")
    assert text.count("    | Structured\n") == 1
    text = text.replace("    | Structured\n", f"    | Structured\n    {registered}\n")
    registry.write_text(text.replace("\nMember = (", f"{imported}\n\nMember = ("), "utf-8")
    recipe = few_text.replace('kind = "dense"', 'kind = "fewer-inputs", sparsity = 0.5')
    (tmp_path / "r.toml").write_text(recipe.replace("epochs = 2", "epochs = 1"), encoding="utf-8")
    program = """
import sys
from pathlib import Path
from cactus_edge import flatbuffer
from cactus_edge.train import load_recipe, lower, train
here = Path(sys.argv[1])
train(load_recipe(here / "r.toml"), here / "run", device="cpu")
report = lower.convert(here / "run", here / "a.tflite", member="1")
graph = flatbuffer.read_tflite((here / "a.tflite").read_bytes())
values = graph.core[0].weights.values
print(report.pattern, (values.any(axis=(0, 3))).sum(), values[0].size)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "fewer inputs 0.5 5 9"
