from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.train import compress, views
from cactus_edge.train.bounds import View
from cactus_edge.train.members import Perturbed, PrunedQuantized
from cactus_edge.train.recipe import Compression
from cactus_edge.train.zoo import Network, build


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build("cnn-tiny", (1, 8, 8), 10, 0.3)


@given(
    sparsity=st.floats(0.0, 0.99),
    scope=st.sampled_from(["layer", "global"]),
    prune_last=st.booleans(),
    levels=st.sampled_from([2, 7, 10**6]),
)
@settings(max_examples=30)
def test_masks_prune_exactly_the_smallest(
    sparsity: float, scope: Literal["layer", "global"], prune_last: bool, levels: int
) -> None:
    made = network()
    with torch.no_grad():
        for _, layer in made.weighted():  # few levels: many ties
            layer.weight.copy_((layer.weight * levels).round() / levels)
    masks = compress.magnitude_masks(made, sparsity, scope, prune_last=prune_last)
    layers = made.weighted() if prune_last else made.weighted()[:-1]
    assert list(masks) == [name for name, _ in layers]
    sizes = {name: layer.weight.detach().abs() for name, layer in layers}
    groups = [[name] for name in masks] if scope == "layer" else [list(masks)]
    for names in groups:
        kept = torch.cat([masks[name].flatten() for name in names])
        size = torch.cat([sizes[name].flatten() for name in names])
        assert int((~kept).sum()) == round(sparsity * kept.numel())
        if kept.any() and (~kept).any():
            assert float(size[kept].min()) >= float(size[~kept].max())


@given(bits=st.integers(2, 8), seed=st.integers(0, 50), rows=st.integers(1, 5))
@settings(max_examples=40)
def test_rounding_errs_by_half_a_step_and_never_clips(bits: int, seed: int, rows: int) -> None:
    weight = torch.randn(rows, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    weight[0] *= 100
    step = compress.quantization_step(weight, bits)
    rounded = compress.fake_quantize(weight, bits)
    assert bool(((rounded - weight).abs() <= step / 2 * (1 + 1e-5)).all())
    levels = rounded / step
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert int(levels.abs().max().round()) == 2 ** (bits - 1) - 1


@given(bits=st.integers(2, 8), seed=st.integers(0, 50))
def test_rounding_passes_the_gradient_through(bits: int, seed: int) -> None:
    """And the largest weight of a channel gets what it does to the others, as its step grows."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=source, dtype=torch.float64).requires_grad_()
    direction = torch.randn(3, 4, generator=source, dtype=torch.float64)
    rounded = compress.fake_quantize(weight, bits)
    (gradient,) = torch.autograd.grad((rounded * direction).sum(), weight)
    step = compress.quantization_step(weight, bits).detach()
    errors = (rounded.detach() - weight.detach()) / step
    largest = torch.nn.functional.one_hot(weight.detach().abs().argmax(1), 4)
    through_step = (direction * errors).sum(1, keepdim=True) / (2 ** (bits - 1) - 1)
    expected = direction + largest * weight.detach().sign() * through_step
    torch.testing.assert_close(gradient, expected)


@given(bits=st.integers(2, 8), seed=st.integers(0, 50), shared=st.booleans())
@settings(max_examples=40)
def test_clipping_errs_least_in_the_mean(bits: int, seed: int, shared: bool) -> None:
    """Not more than at any fraction of the largest weight that is tried, clipping nothing too."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=source) ** 3  # few large ones
    weight[1] *= 7
    limit = compress.clipping_limit(weight, bits, shared=shared)
    largest = compress.quantization_step(weight, bits, shared=shared) * (2 ** (bits - 1) - 1)
    assert bool((limit <= largest).all()) and bool((limit > 0).all())
    assert limit.shape == (3, 1) and (len(limit.unique()) == 1) == shared

    def error(step: torch.Tensor) -> torch.Tensor:
        levels = 2 ** (bits - 1) - 1
        errors = ((weight / step).round().clamp(-levels, levels) * step - weight) ** 2
        return errors.sum(() if shared else 1)

    least = error(limit / (2 ** (bits - 1) - 1))
    for numerator in range(1, compress.LIMITS + 1):
        tried = error(largest * (numerator / compress.LIMITS) / (2 ** (bits - 1) - 1))
        assert bool((least <= tried * (1 + 1e-5)).all())
    rounded = compress.fake_quantize(weight, bits, "mse", shared=shared)
    step = limit / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(error(step), ((rounded - weight) ** 2).sum(() if shared else 1))


def test_weights_rounded_to_zero_are_pulled_to_it() -> None:
    """The width of a bound grows with the magnitude of every weight that is not pruned."""
    weight = torch.tensor([[4.0, 0.9, -0.9, 0.0]], requires_grad=True)
    rounded = compress.beside_zero(compress.fake_quantize(weight, 2), weight)
    (gradient,) = torch.autograd.grad(rounded.abs().sum(), weight)
    assert gradient[0, 1:].tolist() == [1.0, -1.0, 0.0]


def test_clipped_weights_get_no_gradient() -> None:
    weight = torch.tensor([[1.0] * 60 + [4.0]], requires_grad=True)
    assert bool((weight.abs() > compress.clipping_limit(weight, 3))[0, -1])
    rounded = compress.fake_quantize(weight, 3, "mse")
    (gradient,) = torch.autograd.grad(rounded.sum(), weight)
    assert float(gradient[0, -1]) == 0.0 and bool((gradient[0, :-1] == 1.0).all())


def test_the_logits_share_one_step() -> None:
    made = network()
    for clipping in ("none", "mse"):
        choice = Compression(clipping=clipping)
        view = views.deployed_view(made, PrunedQuantized(0.0, 3), choice, {})
        *hidden, last = view.weights.values()
        for weight in hidden:
            assert len(weight.abs().flatten(1).amax(1).unique()) > 1
        levels = last / (last.abs().amax() / 3)
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("clipping", ["none", "mse"])
def test_quantization_commutes_with_folding_a_scale_per_channel(
    clipping: compress.Clipping,
) -> None:
    weight, scale = torch.randn(4, 9), torch.tensor([[0.5], [-2.0], [4.0], [-0.25]])
    torch.testing.assert_close(
        compress.fake_quantize(weight * scale, 4, clipping),
        compress.fake_quantize(weight, 4, clipping) * scale,
    )


@given(bits=st.integers(2, 8), steps=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_perturbations_stay_within_half_a_step(bits: int, steps: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(3, 5, generator=source), "b": torch.randn(2, 3, generator=source)}
    weights["a"][0, :3] = 0.0
    direction = torch.randn(2, 5, generator=source)

    def loss(moved: compress.Weights) -> torch.Tensor:
        return ((moved["b"] @ moved["a"]) * direction).sum()

    offsets = compress.perturbation(weights, bits, steps, loss)
    for name, weight in weights.items():
        radius = compress.quantization_step(weight, bits, shared=name == "b") / 2
        assert bool((offsets[name].abs() <= radius).all())
        assert bool((offsets[name][weight == 0] == 0).all())
    if steps == 1:
        moved = {name: weight + offsets[name] for name, weight in weights.items()}
        assert float(loss(moved)) != float(loss(weights))


def test_pruned_weights_get_no_gradient_from_the_pruned_copy() -> None:
    made = network()
    masks = compress.magnitude_masks(made, 0.5)
    choice, member = Compression(), PrunedQuantized(0.5, 4)
    view = views.training_view(made, member, choice, masks, {}, lambda _: torch.zeros(()))
    torch.stack([weight.sum() for weight in view.weights.values()]).sum().backward()
    for name, layer in made.weighted():
        assert layer.weight.grad is not None
        assert bool(((layer.weight.grad != 0) == masks[name]).all())
        assert bool((view.weights[name][~masks[name]] == 0).all())


@pytest.mark.parametrize("quantizer", get_args(compress.Quantizer))
def test_quantizer_decides_how_members_are_realised(
    quantizer: compress.Quantizer,
) -> None:
    made = network()
    calls: list[View] = []

    def loss(view: View) -> torch.Tensor:
        calls.append(view)
        return torch.stack([(weight**2).sum() for weight in view.weights.values()]).sum()

    choice = Compression(quantizer=quantizer)
    view = views.training_view(made, PrunedQuantized(0.0, 4), choice, {}, {}, loss)
    assert len(calls) == (quantizer == "weight-perturbation")
    zeros = any(bool((weight == 0).any()) for weight in view.weights.values())
    assert zeros == (quantizer == "plain-straight-through")
    perturbed = views.training_view(made, Perturbed(4, steps=3), choice, {}, {}, loss)
    assert len(calls) == 3 + (quantizer == "weight-perturbation")
    for name, layer in made.weighted():
        last = name == made.weighted()[-1][0]
        radius = compress.quantization_step(layer.weight, 4, shared=last) / 2
        for moved in (view, perturbed):
            assert bool(((moved.weights[name] - layer.weight).abs() <= radius * 1.0001).all())
            assert bool((moved.weights[name] != layer.weight).any())


def test_prune_copies() -> None:
    made = network()
    pruned = compress.prune(made, 0.75)
    for (_, before), (_, after) in zip(made.weighted(), pruned.weighted(), strict=True):
        assert int((after.weight == 0).sum()) == round(0.75 * after.weight.numel())
        assert not bool((before.weight == 0).any())
