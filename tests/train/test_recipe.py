from __future__ import annotations

from pathlib import Path

import pytest

from cactus_edge.errors import DataError
from cactus_edge.train.members import (
    Blocks,
    Dense,
    NOfM,
    Perturbed,
    Pruned,
    PrunedQuantized,
    Quantized,
    Structured,
)
from cactus_edge.train.recipe import (
    Recipe,
    format_recipe,
    load_recipe,
    parse_recipe,
)
from cactus_edge.train.zoo import NETWORKS

RECIPES = Path(__file__).parents[2] / "recipes"


def test_resolved_recipe_reads_back_equal(tiny: Recipe) -> None:
    assert parse_recipe(format_recipe(tiny)) == tiny


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.network.name in NETWORKS
    assert parse_recipe(format_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "seed = 3",
            "sead = 3",
            r"r.toml: top level: unknown key 'sead'; did you mean 'seed'\? known keys: .*\bseed\b",
        ),
        ("seed = 3", "seed = -3", r"r.toml: \[seed\]: .*at least 0"),
        ('name = "digits"', "name = 3", r"\[data\] name: Expected `str`, got `int`"),
        ("epsilon = 0.05", "epsilon = 1.5", r"\[objective\] epsilon: .*above 0 and at most 1"),
        ("epsilon = 0.05", "epsilon = nan", r"\[objective\] epsilon: .*above 0 and at most 1"),
        ("l1 = 1e-6", "l1 = inf", r"\[objective\] l1: .*at most 1e\+06"),
        ("epsilon = 0.05", "", r"\[objective\]: Object missing required field `epsilon`"),
        ("l1 = 1e-6", 'loss = "crown"', r"\[objective\] loss: .*use one of 'ibp', 'sabr'"),
        ("sparsity = 0.5", "sparsity = 1.0", r"members\[1\]\.sparsity: .*below 1"),
        (
            "sparsity = 0.5",
            "sparsty = 0.5",
            r"members\[1\]: unknown key 'sparsty'.*'pruned' \(sparsity\)",
        ),
        (
            'kind = "pruned",',
            'kind = "prined",',
            r"members\[1\].*'prined'; did you mean 'pruned'\? kind is one of 'dense' ",
        ),
        (
            "bits = 4 },\n    {",
            "bits = 9 },\n    {",
            r"members\[2\]\.bits: .*at least 2 and at most 8",
        ),
        (
            "epochs = 2",
            "epochs = 2.5",
            r"\[optimizer\] epochs: .*write a number \(int\) at least 1",
        ),
        (
            "[compression]",
            "[compression]\ndraw = 5",
            r"\[compression\]: draw = 5, but there are 4 members; write 'all' or a smaller",
        ),
        (
            "[compression]",
            "[compression]\ndraw = 0",
            r"\[compression\] draw: .*'all', 'one', or write a number \(int\) at least 1",
        ),
        (
            "[compression]",
            '[compression]\ndraw = "two"',
            r"\[compression\] draw: .*'all', 'one', or write a number \(int\) at least 1",
        ),
        (
            'kind = "dense"',
            'kind = "n-of-m", n = 5, m = 4',
            r"members\[0\].*: n = 5 of m = 4: n must not exceed m",
        ),
        (
            'kind = "dense"',
            'kind = "structured", sparsity = 0.5, bits = 1',
            r"members\[0\]\.bits: .*at least 2 and at most 8",
        ),
        (
            'kind = "dense"',
            'kind = "blocks", sparsity = 0.5, rows = 0',
            r"members\[0\]\.rows: .*at least 1",
        ),
        (
            'mask_refresh = "epoch"',
            'mask_refresh = "epoch"\nimportance = "scores"',
            r"importance = 'scores' with mask_refresh = 'epoch': .*write mask_refresh = 'step'",
        ),
        (
            'mask_refresh = "epoch"',
            'importance = "scores"',
            r"trains the choice of weights alone, but 'dense' keeps them all; write members that",
        ),
        (
            'mask_refresh = "epoch"',
            'clipping = "mse"\nquantizer = "weight-perturbation"',
            r"\[compression\] clipping moves weights by more than half a step.*straight-through",
        ),
        ("epochs = 2", "epochs = 2\nmilestones = [0.5, 2.0]", r"milestones\[1\]: .*at most 1"),
        ("epsilon_ramp = 1", "epsilon_ramp = 5", r"must not exceed \[optimizer\] epochs = 2"),
        ("[optimizer]", "[optimizer", r"not a TOML file"),
    ],
)
def test_mistakes_are_named(tiny_text: str, old: str, new: str, expected: str) -> None:
    assert old in tiny_text
    with pytest.raises(DataError, match=expected):
        parse_recipe(tiny_text.replace(old, new, 1), "r.toml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.toml: no such recipe"):
        load_recipe(tmp_path / "nothing.toml")


def test_members_have_distinct_names() -> None:
    members = (
        Dense(),
        Pruned(0.5),
        Quantized(4),
        PrunedQuantized(0.5, 4),
        Perturbed(4),
        Perturbed(4, sparsity=0.5),
        NOfM(2, 4),
        NOfM(2, 4, bits=4),
        Blocks(0.5),
        Blocks(0.5, rows=16),
        Blocks(0.5, bits=3),
        Structured(0.5),
        Structured(0.5, bits=2),
    )
    assert len({member.label() for member in members}) == len(members)
