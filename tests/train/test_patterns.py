"""N of M and blocks, as masks and in the files that ship."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cactus_edge.train.members import (
    Blocks,
    NOfM,
    Pruning,
    layout,
)
from cactus_edge.train.zoo import Network, build
from tests.train.networks import block_sums, blocks_of, deployed, groups, networks, written


# ---------------------------------------------------------------------- the deployed order
@given(network=networks())
@settings(max_examples=20, deadline=None)
def test_rows_are_in_the_order_of_the_file(network: Network) -> None:
    weights = {name: layer.weight.detach() for name, layer in network.weighted()}
    counts = layout.pixels(network)
    for name, expected in deployed(network, weights).items():
        rows = layout.rows(weights[name], counts[name])
        assert np.array_equal(rows.numpy(), expected), name
        assert torch.equal(layout.unrows(rows, weights[name], counts[name]), weights[name])


# ---------------------------------------------------------------------- n of m
@given(network=networks(), numbers=st.tuples(st.integers(1, 8), st.integers(1, 8)))
@settings(max_examples=30, deadline=None)
def test_n_of_m_keeps_the_n_largest_of_each_m(network: Network, numbers: tuple[int, int]) -> None:
    n, m = sorted(numbers)
    weights = {name: layer.weight.detach() for name, layer in network.weighted()}
    found = deployed(network, dict(NOfM(n, m).pattern().masks(network, Pruning())))
    assert list(found) == ([name for name, _ in network.weighted()] if n < m else [])
    sizes = deployed(network, weights)
    for name, mask in found.items():
        for kept, size in zip(groups(mask, m), groups(np.abs(sizes[name]), m), strict=True):
            assert (kept.sum(1) == min(n, kept.shape[1])).all()
            least = np.where(kept, size, np.inf).min(1)
            assert (np.where(kept, -np.inf, size).max(1) <= least).all()


def test_n_of_m_prunes_the_first_of_equal_weights() -> None:
    network = build("mlp", (6,), 3, 0.02)
    with torch.no_grad():
        network.get_parameter("fc1.weight").fill_(0.5)
    mask = NOfM(2, 4).pattern().masks(network, Pruning())["fc1"]
    assert mask[0].tolist() == [False, False, True, True, True, True]
    assert "fc3" not in NOfM(2, 4).pattern().masks(network, Pruning(prune_last=False))


@given(network=networks(), bits=st.sampled_from([2, 3, 4, 8]), m=st.integers(2, 5))
@settings(max_examples=12, deadline=None)
def test_n_of_m_in_the_file(network: Network, bits: int, m: int) -> None:
    for matrix in written(network, NOfM(m // 2, m), bits).values():
        levels = np.unique(np.abs(matrix))
        assert len(levels) <= 2 ** (bits - 1) and levels[-1] <= 2 ** (max(bits, 4) - 1) - 1
        assert all((np.count_nonzero(part, 1) <= m // 2).all() for part in groups(matrix, m))


# ---------------------------------------------------------------------- blocks
@given(
    network=networks(),
    sparsity=st.floats(0.01, 0.99),
    rows=st.integers(1, 5),
    inputs=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_blocks_prune_the_weakest_whole_blocks(
    network: Network, sparsity: float, rows: int, inputs: int
) -> None:
    found = deployed(
        network, dict(Blocks(sparsity, rows, inputs).pattern().masks(network, Pruning()))
    )
    weights = deployed(network, {n: layer.weight.detach() for n, layer in network.weighted()})
    for name, layer in network.weighted():
        fits = layer.weight.shape[0] >= rows
        if isinstance(layer, nn.Conv2d):
            fits = fits and layer.groups == 1 and layer.in_channels >= inputs
        elif name == "fc1":
            last = [made for _, made in network.weighted() if isinstance(made, nn.Conv2d)][-1]
            fits = fits and last.out_channels >= inputs
        else:
            fits = fits and layer.in_features >= inputs
        assert (name in found) == fits
    for name, mask in found.items():
        sizes, kept = (block_sums(m, rows, inputs) for m in (np.ones(mask.shape), mask))
        assert ((kept == 0) | (kept == sizes)).all()
        pruned = int((kept == 0).sum())
        assert pruned == min(round(sparsity * kept.size), kept.size - 1)
        energy = block_sums(weights[name].astype(np.float64) ** 2, rows, inputs) / sizes
        assert energy[kept == 0].max(initial=0.0) <= energy[kept > 0].min() * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_blocks_in_the_file(bits: int) -> None:
    torch.manual_seed(0)
    network = build("cnn-small", (1, 28, 28), 10)
    found = written(network, Blocks(0.75), bits)
    for name, matrix in found.items():
        parts = blocks_of(matrix, 32, 4)
        zero = sum(not part.any() for part in parts)
        expected = {"conv2": round(0.75 * len(parts)), "fc1": round(0.75 * len(parts))}
        assert zero >= expected[name] if name in expected else zero < len(parts) / 4, name
