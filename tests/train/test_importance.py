"""Learned scores: gradients, frozen weights, resumption, and the mask that ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import flatbuffer
from cactus_edge.graph import Linear
from cactus_edge.train import checkpoint, importance, load_model, loop, train, views
from cactus_edge.train.lower import convert
from cactus_edge.train.members import Blocks, MemberKind, NOfM, Pruned, Pruning, Structured
from cactus_edge.train.recipe import Compression, parse_recipe
from cactus_edge.train.zoo import build
from tests.train.interrupting import InterruptAfter

RECIPE = """
seed = 3
threads = 1
[data]
name = "digits"
[network]
name = "cnn-small-bn"
width = 0.25
[objective]
epsilon = 0.02
[compression]
members = [{ kind = "pruned", sparsity = 0.9 }]
[optimizer]
epochs = 2
batch_size = 128
learning_rate = 1e-2
"""
SCORES = RECIPE.replace("[optimizer]", 'importance = "scores"\n[optimizer]')
FILES = (checkpoint.MODEL_FILE, checkpoint.STATE_FILE, checkpoint.HISTORY_FILE)


@settings(max_examples=20)
@given(st.floats(0.01, 0.99), st.integers(0, 100))
def test_scores_begin_as_magnitudes(sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.1)
    scores = importance.learned(network)
    masks = [Pruned(sparsity).pattern().masks(ranked, Pruning()) for ranked in (network, scores)]
    for name, layer in network.weighted():
        # Scaling may make neighbours in rank equal, no more.
        assert int((masks[0][name] != masks[1][name]).sum()) <= 2
        largest = dict(scores.weighted())[name].weight.detach().abs().amax()
        assert float(largest**2) == pytest.approx(6 / layer.weight[0].numel(), rel=1e-4)


@pytest.mark.parametrize("member", [Pruned(0.5), NOfM(1, 4), Blocks(0.5, 2, 2), Structured(0.5)])
def test_the_gradient_reaches_the_scores_alone(member: MemberKind) -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.3)
    scores = importance.learned(network)
    choice = Compression((member,))  # pyright: ignore[reportArgumentType]
    masks = views.masks_of(scores, choice.members, choice)
    through = importance.straight_through(masks, scores)[member.pattern().key()]
    view = views.training_view(network, member, choice, through, {}, lambda _: torch.zeros(()))
    factors = {name: torch.randn(weight.shape) for name, weight in view.weights.items()}
    torch.stack([(view.weights[n] * f).sum() for n, f in factors.items()]).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    (named,) = masks.values()
    assert len(named) > 1
    for name, layer in network.weighted():
        score = dict(scores.weighted())[name].weight
        if name not in named:  # too small for a block, so that there is nothing to choose
            assert score.grad is None
            continue
        assert torch.equal(view.weights[name], layer.weight * named[name])
        assert score.grad is not None  # of pruned weights too, so that they can come back
        torch.testing.assert_close(score.grad, factors[name] * layer.weight * score.sign())
    moved = {name for name, parameter in scores.named_parameters() if parameter.requires_grad}
    assert moved == set(importance.trained(network, scores))


def test_scores_resume_and_ship_the_learned_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three phases: weights, scores, weights again; the second is interrupted."""
    monkeypatch.setattr(loop, "REPORT_INTERVAL", -1.0)
    first = tmp_path / "first"
    train(parse_recipe(RECIPE.replace("epochs = 2", "epochs = 1")), first, device="cpu")
    text = SCORES.replace("[optimizer]", "prune_last = false\n[optimizer]")
    recipe = parse_recipe(f'{text}[start]\nfrom = "{first}"\n')
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, parts, progress=InterruptAfter(13), device="cpu")
    train(recipe, parts, resume=True, device="cpu")
    for name in FILES:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name

    before, after = load_model(first), load_model(whole)
    kept = after.masks["0.9"]
    for name, parameter in before.network.named_parameters():  # batch statistics do change
        assert torch.equal(after.network.get_parameter(name), parameter), name
    magnitude = Pruned(0.9).pattern().masks(before.network, Pruning(prune_last=False))
    assert sorted(kept) == sorted(magnitude) and "fc2" not in kept
    for name, mask in kept.items():
        assert int(mask.sum()) == int(magnitude[name].sum()) > 0
    assert any(not torch.equal(kept[name], mask) for name, mask in magnitude.items())

    convert(whole, tmp_path / "a.tflite", member="1", universal=False)
    graph = flatbuffer.read_tflite((tmp_path / "a.tflite").read_bytes())
    (conv,) = (op for op in graph.core if isinstance(op, Linear) and op.name == "conv1")
    shipped = torch.from_numpy(np.moveaxis(conv.weights.values, -1, 1) != 0)
    assert shipped.any() and not shipped[~kept["conv1"]].any()

    text = RECIPE.replace("[optimizer]", 'mask_refresh = "once"\nprune_last = false\n[optimizer]')
    text = text.replace("epochs = 2", "epochs = 1") + f'[start]\nfrom = "{whole}"\n'
    train(parse_recipe(text), tmp_path / "third", device="cpu")
    third = load_model(tmp_path / "third")
    assert all(torch.equal(third.masks["0.9"][name], mask) for name, mask in kept.items())
    assert not torch.equal(
        third.network.get_parameter("conv1.weight"), after.network.get_parameter("conv1.weight")
    )
