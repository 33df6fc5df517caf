from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from cactus_edge.errors import DataError
from cactus_edge.train.bounds import Bounds, Box, forward, input_box, propagate
from cactus_edge.train.members import Dense
from cactus_edge.train.objective import (
    cactus_loss,
    drawn_members,
    instability,
    regulariser,
    schedule,
    smooth_ramp,
)
from cactus_edge.train.recipe import Compression, Recipe, parse_recipe
from cactus_edge.train.views import deployed_view, masks_of
from cactus_edge.train.zoo import Network, build, convolve, initialise_for_bounds


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_smooth_ramp_grows_from_0_to_1(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert 0.0 <= smooth_ramp(low) <= smooth_ramp(high) <= 1.0 + 1e-12
    assert smooth_ramp(0.0) == 0.0 and smooth_ramp(1.0) == pytest.approx(1.0)


def test_smooth_ramp_has_no_kink() -> None:
    step = 1e-6
    before = (smooth_ramp(0.25) - smooth_ramp(0.25 - step)) / step
    after = (smooth_ramp(0.25 + step) - smooth_ramp(0.25)) / step
    assert before == pytest.approx(after, rel=1e-3)


def test_schedule_follows_the_recipe(tiny: Recipe) -> None:
    first, middle, last = (schedule(tiny, step, 10) for step in (0, 5, 19))
    assert (first.epsilon, first.certified_weight) == (0.0, 0.0)
    assert first.regulariser_weight == tiny.objective.shi_regulariser
    assert 0 < middle.epsilon < 0.05
    assert middle.certified_weight == pytest.approx(0.375)
    assert (last.epsilon, last.certified_weight) == (pytest.approx(0.05), 0.75)
    assert last.regulariser_weight == pytest.approx(0.0)
    assert last.learning_rate == pytest.approx(2e-3 * 0.2**2)


def test_loss_is_the_mean_over_members(tiny_text: str) -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.2)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    start = tiny_text.index("members = [")
    end = tiny_text.index("]\n", start) + 2

    def loss(members: str) -> float:
        recipe = parse_recipe(tiny_text[:start] + f"members = {members}\n" + tiny_text[end:])
        now = schedule(recipe, 15, 10)
        return float(cactus_loss(network, images, labels, recipe, 15, now, {}, {})[0].detach())

    dense, rounded = '{ kind = "dense" }', '{ kind = "quantized", bits = 2 }'
    one, other = loss(f"[{dense}]"), loss(f"[{rounded}]")
    assert one != other
    assert loss(f"[{dense}, {rounded}]") == pytest.approx((one + other) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", ["ibp", "sabr"])
@pytest.mark.parametrize("network_name", ["cnn-tiny", "cnn-small-bn"])
def test_every_parameter_gets_a_finite_gradient(
    tiny_text: str, loss: str, network_name: str
) -> None:
    text = tiny_text.replace("l1 = 1e-6", f'l1 = 1e-6\nloss = "{loss}"\nattack_steps = 2')
    recipe = parse_recipe(text)
    torch.manual_seed(0)
    network = build(network_name, (1, 8, 8), 10, 0.3)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    value, ranges = cactus_loss(network, images, labels, recipe, 5, schedule(recipe, 5, 10), {}, {})
    value.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert sorted(ranges) == ["relu1", "relu2", "relu3"]


@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
def test_regulariser_is_finite_for_dead_and_saturated_layers(offset: float) -> None:
    centre = (torch.randn(4, 6) + offset).requires_grad_()
    value = regulariser({"relu1": Box(centre, torch.full((4, 6), 0.1))}, input_box(centre, 0.1))
    value.backward()
    assert bool(torch.isfinite(value)) and centre.grad is not None
    assert bool(torch.isfinite(centre.grad).all())


@pytest.mark.parametrize("architecture", ["mlp", "cnn-small-bn"])
def test_instability_is_normalised_by_the_scale(architecture: str) -> None:
    """By hand, unit by unit: only normalizations that a ReLU reads count."""
    torch.manual_seed(0)
    network = build(architecture, (1, 8, 8), 10, 0.1)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    normalized = {f"relu{name[-1]}": layer for name, layer in network.layers() if "norm" in name}
    for layer in normalized.values():
        torch.nn.init.uniform_(layer.get_parameter("weight"), -0.5, 0.5)
    _, statistics = forward(network, images)
    box = input_box(images, 0.05)
    hidden = propagate(network, box, labels, statistics=statistics).hidden
    terms: list[float] = []
    for name, box in hidden.items():
        gammas = normalized[name].get_parameter("weight") if name in normalized else torch.ones(1)
        shape = [1, -1, *[1] * (box.centre.dim() - 2)]
        scales = gammas.detach().reshape(shape).expand_as(box.centre).flatten().tolist()
        ends = zip(
            box.lower.detach().flatten().tolist(),
            box.upper.detach().flatten().tolist(),
            strict=True,
        )
        terms += [
            -math.tanh(1 + lower * upper / max(scale**2, 1e-8))
            for (lower, upper), scale in zip(ends, scales, strict=True)
        ]
    value = instability(network, hidden)
    assert float(value.detach()) == pytest.approx(sum(terms) / len(terms), abs=1e-4)
    assert -1 < float(value.detach()) < 1


def test_instability_enters_the_loss(tiny_text: str) -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.2)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    values: list[float] = []
    for weight in (0.0, 0.5, 1.0):
        recipe = parse_recipe(tiny_text.replace("l1 = 1e-6", f"nrs = {weight}"))
        now = schedule(recipe, 15, 10)
        values.append(
            float(cactus_loss(network, images, labels, recipe, 15, now, {}, {})[0].detach())
        )
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-3)
    assert values[0] != values[1]


@pytest.mark.parametrize(("activations", "passes"), [("float", 0), ("int8", 1)])
def test_a_clean_loss_bounds_nothing(
    tiny_text: str, monkeypatch: pytest.MonkeyPatch, activations: str, passes: int
) -> None:
    """Without a certified loss int8 ranges are those of the clean activations."""
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10, 0.2)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    start, end = tiny_text.index("members = ["), tiny_text.index("activations =")
    text = tiny_text[:start] + 'members = [{ kind = "quantized", bits = 8 }]\n' + tiny_text[end:]
    text = text.replace('"int8"', f'"{activations}"').replace("epsilon_ramp = 1", "lambda_max = 0")
    recipe = parse_recipe(text.replace("lambda_ramp = 1", "").replace("l1 = 1e-6", ""))
    widths: list[float] = []

    def counted(network: Network, box: Box, *rest: Any) -> Bounds:
        widths.append(float(box.radius.max()))
        return propagate(network, box, *rest)

    monkeypatch.setattr("cactus_edge.train.objective.propagate", counted)
    monkeypatch.setattr("cactus_edge.train.losses.base.propagate", counted)
    now = schedule(recipe, 15, 10)
    loss, ranges = cactus_loss(network, images, labels, recipe, 15, now, {}, {})
    assert widths == [0.0] * passes
    member = recipe.compression.members[0]
    view = deployed_view(network, member, recipe.compression, {})
    logits, _ = forward(network, images, view)
    assert float(loss.detach()) == float(functional.cross_entropy(logits, labels).detach())
    if passes:
        layer = network.get_submodule("conv1")
        assert isinstance(layer, torch.nn.Conv2d)
        seen = convolve(layer, images, view.weights["conv1"], layer.bias).max()
        assert float(ranges["relu1"]) == pytest.approx(float(seen.detach()), rel=1e-5)


def test_initialisation_for_bounds_keeps_their_width() -> None:
    torch.manual_seed(0)
    network = build("cnn-small", (1, 28, 28), 10)
    initialise_for_bounds(network)
    images = torch.rand(8, 1, 28, 28)
    hidden = propagate(network, input_box(images, 0.01), torch.zeros(8, dtype=torch.long)).hidden
    ratio = float((hidden["relu3"].radius.mean() / hidden["relu1"].radius.mean()).detach())
    assert 0.2 < ratio < 5


def test_members_come_after_their_warmup(tiny_text: str) -> None:
    """Until then the loss is that of the network without a compression set."""
    warm = parse_recipe(tiny_text.replace("[compression]", "[compression]\nwarmup = 1"))
    plain = msgspec.structs.replace(warm, compression=Compression())
    assert [schedule(warm, step, 4).compressed for step in range(6)] == [False] * 4 + [True] * 2
    assert schedule(plain, 0, 4).compressed
    torch.manual_seed(0)
    network = build("cnn-tiny", (1, 8, 8), 10)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    masks = masks_of(network, warm.compression.members, warm.compression)
    now = schedule(warm, 3, 4)
    losses = [
        cactus_loss(network, images, labels, recipe, 3, at, masks, {})[0].item()
        for recipe, at in ((warm, now), (plain, now), (warm, replace(now, compressed=True)))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('mask_refresh = "epoch"', 'mask_refresh = "once"\nwarmup = 1'),
        ("activations", "warmup = 3\nactivations"),
    ],
)
def test_a_warmup_that_cannot_be(tiny_text: str, old: str, new: str) -> None:
    with pytest.raises(DataError, match=r"\[compression\] warmup"):
        parse_recipe(tiny_text.replace(old, new))


def test_one_member_is_drawn_repeatably(tiny_text: str, tiny: Recipe) -> None:
    one = parse_recipe(tiny_text.replace("[compression]", '[compression]\ndraw = "one"'))
    drawn = [drawn_members(one, step) for step in range(60)]
    assert drawn == [drawn_members(one, step) for step in range(60)]
    assert {len(members) for members in drawn} == {1}
    assert {members[0] for members in drawn} == set(tiny.compression.members)
    assert drawn_members(tiny, 0) == tiny.compression.members
    assert Dense() in tiny.compression.members
