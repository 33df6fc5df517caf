"""Every rival's recipe trains, in the order in which its phases follow one another."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cactus_edge.train import load_model, load_recipe, train
from cactus_edge.train.recipe import Data, NetworkChoice, Start

RIVALS = Path(__file__).parents[2] / "recipes" / "rivals"
EPOCHS = 20
RADIUS = 0.1


def test_rivals_train_from_start_to_end(tmp_path: Path) -> None:
    """On the digits, a few steps each."""
    recipes = {path.stem: load_recipe(path) for path in RIVALS.glob("*.toml")}
    assert {"ibp", "ibp-large", "sabr", "prune-finetune", "qat", "nrs", "qa-ibp"} < set(recipes)
    done: set[str] = set()
    while len(done) < len(recipes):
        ready = [
            (name, recipe)
            for name, recipe in recipes.items()
            if name not in done and (recipe.start is None or Path(recipe.start.source).name in done)
        ]
        assert ready, "a recipe starts from a run that no recipe makes"
        for name, recipe in ready:
            start = recipe.start and Start(str(tmp_path / Path(recipe.start.source).name))
            ramps = {
                key: min(getattr(recipe.objective, key), 0.5)
                for key in ("epsilon_ramp", "lambda_ramp", "warmup")
            }
            short = msgspec.structs.replace(
                recipe,
                data=Data("digits", validation=0.1),
                network=NetworkChoice("cnn-tiny", 0.25),
                objective=msgspec.structs.replace(recipe.objective, **ramps),
                optimizer=msgspec.structs.replace(recipe.optimizer, epochs=1),
                start=start,
            )
            (result,) = train(short, tmp_path / name, device="cpu").members
            assert 0 <= result.test.certified <= result.test.standard <= 1
            if short.compression.mask_refresh == "once" or "scores" in name:
                assert list(load_model(tmp_path / name).masks) == ["0.95"]
            done.add(name)


def test_rivals_have_the_same_budget() -> None:
    """Network, data, seed, optimizer, and 20 epochs, counted over phases."""
    recipes = {path.stem: load_recipe(path) for path in RIVALS.glob("*.toml")}
    phases = {Path(recipe.start.source).name for recipe in recipes.values() if recipe.start}
    same = {
        (recipe.data, recipe.network, recipe.seed, recipe.objective.reported_epsilon)
        + (msgspec.structs.replace(recipe.optimizer, epochs=1),)
        for recipe in recipes.values()
    }
    assert len(same) == 1 and next(iter(same))[3] == RADIUS

    def total(name: str) -> int:
        recipe = recipes[name]
        before = total(Path(recipe.start.source).name) if recipe.start else 0
        return before + recipe.optimizer.epochs

    assert {name: total(name) for name in recipes if name not in phases} == dict.fromkeys(
        set(recipes) - phases, EPOCHS
    )
    assert phases == {"pretrain", "hydra-scores"}
