"""The linear relaxation of a case, solved by HiGHS: the best prices there are.

Variables are the inputs and, for every staircase that is not constant, its accumulator and its
stored value; the hull of the staircase's corners stands for the staircase. The duals of the rows
``z = W x + b`` are the multipliers of ``bounds.lower_bound``: the solver's optimum is only a hope,
the bound that is computed from the rounded duals in integers is the proof.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.certify.linear.ascent import FloatArray
from cactus_edge.certify.linear.bounds import State, Target
from cactus_edge.certify.linear.network import Network, Staircase, Stairs, Taps
from cactus_edge.errors import MissingExtraError
from cactus_edge.graph import Int64Array

LARGEST = 2_000_000
"""Non-zero weights up to which the relaxation is built at all."""


def highs() -> Any:
    """The solver's module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import highspy
    except ImportError:
        raise MissingExtraError("highspy", "verify", "complete search") from None
    return highspy


@dataclass(frozen=True, eq=False)
class Rows:
    """A linear map as a sparse matrix by rows: int64 arrays."""

    starts: Int64Array
    columns: Int64Array
    weights: Int64Array


def rows_of(taps: Taps, size: int) -> Rows:
    """The matrix [size, inputs] of a linear map."""
    _, width, channels, row_step, column_step = taps.geometry.tolist()
    outputs: list[Int64Array] = []
    inputs: list[Int64Array] = []
    weights: list[Int64Array] = []
    channel = np.repeat(np.arange(channels), np.diff(taps.starts))
    for tap, (offset, top, bottom, left, right) in enumerate(taps.taps.tolist()):
        if bottom <= top or right <= left:
            continue
        row, column = np.meshgrid(np.arange(top, bottom), np.arange(left, right), indexing="ij")
        outputs.append(((row * width + column) * channels + channel[tap]).reshape(-1))
        inputs.append((offset + row * row_step + column * column_step).reshape(-1))
        weights.append(np.full(row.size, taps.weights[tap], np.int64))
    empty = [np.zeros(0, np.int64)]
    place = np.concatenate(outputs or empty)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(size + 1)).astype(np.int64)
    return Rows(
        starts, np.concatenate(inputs or empty)[order], np.concatenate(weights or empty)[order]
    )


def hull(left: Int64Array, right: Int64Array, first: int) -> list[tuple[float, float, bool]]:
    """Facets (slope, offset, is upper) of a staircase with steps [left[k], right[k]] -> first + k.

    The lines are neither rounded outwards nor trusted: they only shape the relaxation.
    """
    levels = np.arange(first, first + left.size)
    facets: list[tuple[float, float, bool]] = []
    above = [(int(x), int(y)) for x, y in zip(left, levels, strict=True)]
    above.append((int(right[-1]), int(levels[-1])))
    below = [(int(left[0]), int(levels[0]))]
    below += [(int(x), int(y)) for x, y in zip(right, levels, strict=True)]
    for points, upper in ((above, True), (below, False)):
        chain: list[tuple[int, int]] = []
        for x, y in points:
            while chain and chain[-1][0] == x:
                keep = max(chain[-1][1], y) if upper else min(chain[-1][1], y)
                y = keep
                chain.pop()
            while len(chain) >= 2:
                (x0, y0), (x1, y1) = chain[-2], chain[-1]
                turn = (y1 - y0) * (x - x1) - (y - y1) * (x1 - x0)
                if (turn > 0) if upper else (turn < 0):
                    break
                chain.pop()
            chain.append((x, y))
        for (x0, y0), (x1, y1) in zip(chain, chain[1:], strict=False):
            slope = (y1 - y0) / (x1 - x0)
            facets.append((slope, y0 - slope * x0, upper))
    return facets


@dataclass(frozen=True, eq=False)
class Solution:
    """What the solver says, all of it hearsay.

    ``prices``: by node index, multipliers [elements]. An infeasible relaxation has the optimum
    infinity; its prices are a direction in which the bound rises for ever, scaled to coefficients
    of about 1. ``point`` is the minimising input; ``reached`` by node index (accumulators, stored
    offset values) of the elements of ``ascent.corners``.
    """

    optimum: float
    prices: dict[int, FloatArray]
    point: FloatArray
    reached: dict[int, tuple[FloatArray, FloatArray]]


@dataclass(eq=False)
class Relaxation:
    """Builds and solves relaxations of one network; matrices are made once."""

    network: Network
    matrices: dict[int, Rows] = field(default_factory=dict)

    @cached_property
    def weights(self) -> int | None:
        """Non-zero entries of all matrices; None where an operator cannot be expressed."""
        total = 0
        for node in self.network.nodes:
            if isinstance(node, Stairs):
                for taps in node.maps:
                    if taps is None:
                        return None
                    spans = (taps.taps[:, 2] - taps.taps[:, 1]) * (
                        taps.taps[:, 4] - taps.taps[:, 3]
                    )
                    total += int(np.maximum(spans, 0).sum())
            elif not hasattr(node, "sources") or node.sources.ndim != 1:
                return None
        return total

    @property
    def fits(self) -> bool:
        """Whether the network is small enough, and all its operators can be expressed."""
        return self.weights is not None and self.weights <= LARGEST

    def rows(self, index: int, node: Stairs) -> Rows:
        """The matrix of a node, made once."""
        if index not in self.matrices:
            assert node.maps[0] is not None
            self.matrices[index] = rows_of(node.maps[0], node.bias.size)
        return self.matrices[index]

    def program(self, state: State, target: Target) -> Program:
        """The relaxation over a whole box, to be solved for its cases."""
        return Program(self, state, target)


class Program:
    """The relaxation of one target over a box; each case starts from the whole box's basis.

    A case changes the bounds of columns, and adds the hulls of the staircases whose ranges it
    narrows. Starting always from the same basis makes an answer independent of what was solved
    before.
    """

    def __init__(self, relaxation: Relaxation, state: State, target: Target) -> None:
        self.relaxation, self.state, self.target = relaxation, state, target
        self.network = relaxation.network
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.cost: list[float] = []
        self.row_lower: list[float] = []
        self.row_upper: list[float] = []
        self.entries: list[tuple[Int64Array, FloatArray]] = []
        self.prices: dict[int, tuple[Int64Array, int]] = {}
        self.columns: dict[int, Int64Array] = {}
        self.pairs: dict[int, tuple[Int64Array, Int64Array]] = {}
        self.constant = 0.0
        self._assemble()
        self._solver: Any = None
        self._basis: Any = None
        self._rows = len(self.row_lower)
        self._hulls: dict[tuple[int, ...], list[tuple[FloatArray, float, float]]] = {}

    def _variables(self, low: Int64Array, high: Int64Array) -> Int64Array:
        first = len(self.lower)
        self.lower += low.tolist()
        self.upper += high.tolist()
        self.cost += [0.0] * low.size
        return np.arange(first, first + low.size)

    def _held(self, tensor: int) -> tuple[Int64Array, Int64Array]:
        """Columns of a tensor's elements (-1: constant) and their low ends."""
        return self.columns[tensor], self.state.values[tensor][0]

    def _assemble(self) -> None:
        entry = self.network.graph.core_input
        low, high = self.state.values[entry]
        columns = np.full(low.size, -1, np.int64)
        loose = np.flatnonzero(low < high)
        columns[loose] = self._variables(low[loose], high[loose])
        self.columns[entry] = columns
        last = min(self.target.node, len(self.network.nodes) - 1)
        for index, node in enumerate(self.network.nodes[: last + 1]):
            if index == self.target.node:
                break
            if not isinstance(node, Stairs):
                held = np.append(self.columns[node.inputs[0]], -1)
                self.columns[node.output] = held[node.sources.reshape(-1)]
                continue
            self._staircases(index, node)
        self._objective()

    def _sum(self, index: int, node: Stairs, element: int) -> tuple[Int64Array, FloatArray, float]:
        """Columns, weights and constant of one accumulator."""
        rows = self.relaxation.rows(index, node)
        part = slice(rows.starts[element], rows.starts[element + 1])
        held, low = self._held(node.inputs[0])
        read, weights = rows.columns[part], rows.weights[part]
        columns = held[read]
        loose = columns >= 0
        constant = int((weights[~loose] * low[read[~loose]]).sum()) + int(node.bias[element])
        return columns[loose], weights[loose].astype(np.float64), float(constant)

    def _staircases(self, index: int, node: Stairs) -> None:
        ranges, steps = self.state.ranges[index], node.staircase
        open_ = np.flatnonzero((ranges[2] < ranges[3]) | (ranges[5] != 0))
        accumulators = self._variables(ranges[0, open_], ranges[1, open_])
        stored = self._variables(ranges[2, open_] + steps.lowest, ranges[3, open_] + steps.lowest)
        columns = np.full(node.bias.size, -1, np.int64)
        columns[open_] = stored
        self.columns[node.output] = columns
        first_row = len(self.row_lower)
        for position, element in enumerate(open_.tolist()):
            read, weights, constant = self._sum(index, node, element)
            self._row(
                np.append(read, accumulators[position]),
                np.append(-weights, 1.0),
                constant,
                constant,
            )
        self.prices[index] = (open_, first_row)
        self.pairs[index] = (accumulators, stored)
        for position, element in enumerate(open_.tolist()):
            pair = np.array([stored[position], accumulators[position]])
            for row, low, high in _facets(steps, element, ranges[:4, element]):
                self._row(pair, row, low, high)

    def _row(self, columns: Int64Array, weights: FloatArray, low: float, high: float) -> None:
        self.entries.append((columns, weights))
        self.row_lower.append(low)
        self.row_upper.append(high)

    def _objective(self) -> None:
        scaled = self.target.multipliers / self.target.scale
        if self.target.node == len(self.network.nodes):
            columns, low = self._held(self.network.graph.logits)
            self.constant += float((scaled * low)[columns < 0].sum())
            for column, weight in zip(columns.tolist(), scaled.tolist(), strict=True):
                if column >= 0:
                    self.cost[column] += weight
            return
        node = self.network.nodes[self.target.node]
        assert isinstance(node, Stairs)
        for element in np.flatnonzero(scaled).tolist():
            columns, weights, constant = self._sum(self.target.node, node, element)
            self.constant += scaled[element] * constant
            for column, weight in zip(columns.tolist(), weights.tolist(), strict=True):
                self.cost[column] += scaled[element] * weight

    def solve(self, state: State, seconds: float) -> Solution | None:
        """The best multipliers within a case; None where the solver failed or had no time."""
        module = highs()
        if self._solver is None:
            self._solver = self._start(module)
        solver = self._solver
        self._narrow(state)
        solver.setOptionValue("time_limit", solver.getRunTime() + max(seconds, 0.1))
        solver.run()
        status = solver.getModelStatus()
        empty = np.zeros(0)
        if status == module.HighsModelStatus.kInfeasible:
            return Solution(np.inf, self._ray(solver), empty, {})
        if status != module.HighsModelStatus.kOptimal:
            return None
        if self._basis is None:
            self._basis = solver.getBasis()
        solution = solver.getSolution()
        values = np.array(solution.col_value)
        prices = self._by_node(np.array(solution.row_dual))
        entry = self.network.graph.core_input
        point = state.values[entry][0].astype(np.float64)
        loose = self.columns[entry] >= 0
        point[loose] = values[self.columns[entry][loose]]
        reached: dict[int, tuple[FloatArray, FloatArray]] = {}
        for index, (accumulators, stored) in self.pairs.items():
            open_, ranges = self.prices[index][0], state.ranges[index]
            here = ((ranges[2] < ranges[3]) | (ranges[5] != 0))[open_]
            reached[index] = values[accumulators[here]], values[stored[here]]
        optimum = solver.getInfo().objective_function_value + self.constant
        return Solution(optimum, prices, point, reached)

    def _start(self, module: Any) -> Any:
        with _stdout_silenced():
            solver = module.Highs()
        for option, value in (("output_flag", False), ("threads", 1), ("presolve", "off")):
            solver.setOptionValue(option, value)
        problem = module.HighsLp()
        problem.num_col_, problem.num_row_ = len(self.lower), len(self.row_lower)
        problem.col_cost_ = np.array(self.cost)
        problem.col_lower_ = np.array(self.lower, np.float64)
        problem.col_upper_ = np.array(self.upper, np.float64)
        problem.row_lower_ = np.array(self.row_lower, np.float64)
        problem.row_upper_ = np.array(self.row_upper, np.float64)
        matrix = problem.a_matrix_
        matrix.format_ = module.MatrixFormat.kRowwise
        lengths = [columns.size for columns, _ in self.entries]
        matrix.start_ = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        empty: npt.NDArray[Any] = np.zeros(0)
        matrix.index_ = np.concatenate([empty, *(c for c, _ in self.entries)]).astype(np.int32)
        matrix.value_ = np.concatenate([empty, *(w for _, w in self.entries)])
        solver.passModel(problem)
        return solver

    def _narrow(self, state: State) -> None:
        """Set the columns' bounds and the extra hulls of a case."""
        solver = self._solver
        lower, upper = np.array(self.lower, np.float64), np.array(self.upper, np.float64)
        entry = self.network.graph.core_input
        loose = self.columns[entry] >= 0
        lower[self.columns[entry][loose]] = state.values[entry][0][loose]
        upper[self.columns[entry][loose]] = state.values[entry][1][loose]
        extra: list[tuple[Int64Array, FloatArray, float, float]] = []
        for index, (accumulators, stored) in self.pairs.items():
            open_ = self.prices[index][0]
            node = self.network.nodes[index]
            assert isinstance(node, Stairs)
            ranges, whole = state.ranges[index][:, open_], self.state.ranges[index][:, open_]
            # The range of an accumulator is used where the exact bound can price it.
            priced = (ranges[2] < ranges[3]) | (ranges[5] != 0)
            lower[accumulators] = np.where(priced, ranges[0], whole[0])
            upper[accumulators] = np.where(priced, ranges[1], whole[1])
            lower[stored] = ranges[2] + node.staircase.lowest
            upper[stored] = ranges[3] + node.staircase.lowest
            changed = (ranges[:4] != whole[:4]).any(axis=0) & (ranges[2] < ranges[3])
            for position in np.flatnonzero(changed).tolist():
                pair = np.array([stored[position], accumulators[position]])
                element = int(open_[position])
                key = index, element, *state.ranges[index][:4, element].tolist()
                if key not in self._hulls:
                    self._hulls[key] = _facets(
                        node.staircase, element, state.ranges[index][:4, element]
                    )
                for row, low, high in self._hulls[key]:
                    extra.append((pair, row, low, high))
        count = solver.getNumRow()
        if count > self._rows:
            gone = np.arange(self._rows, count, dtype=np.int32)
            solver.deleteRows(gone.size, gone)
        every = np.arange(lower.size, dtype=np.int32)
        solver.changeColsBounds(lower.size, every, lower, upper)
        if self._basis is not None:
            solver.setBasis(self._basis)
        if extra:
            starts = np.arange(0, 2 * len(extra), 2, dtype=np.int32)
            solver.addRows(
                len(extra),
                np.array([low for *_, low, _ in extra]),
                np.array([high for *_, high in extra]),
                2 * len(extra),
                starts,
                np.concatenate([pair for pair, *_ in extra]).astype(np.int32),
                np.concatenate([row for _, row, *_ in extra]),
            )

    def _by_node(self, duals: FloatArray) -> dict[int, FloatArray]:
        prices: dict[int, FloatArray] = {}
        for index, (open_, first) in self.prices.items():
            node = self.network.nodes[index]
            assert isinstance(node, Stairs)
            whole = np.zeros(node.bias.size)
            whole[open_] = duals[first : first + open_.size]
            prices[index] = whole
        return prices

    def _ray(self, solver: Any) -> dict[int, FloatArray]:
        """A proof direction of infeasibility; empty where the solver has none."""
        _, found, ray = solver.getDualRay()
        if not found:
            return {}
        prices = self._by_node(np.array(ray))
        stored = [
            np.abs(whole[open_]) / _slopes(self.network, index)[open_]
            for index, whole in prices.items()
            if (open_ := self.prices[index][0]).size
        ]
        largest = max((float(part.max()) for part in stored), default=0.0)
        return {index: whole / largest for index, whole in prices.items()} if largest else {}


def _facets(
    staircase: Staircase, element: int, ranges: Int64Array
) -> list[tuple[FloatArray, float, float]]:
    """Rows (weights of stored value and accumulator, lower, upper) of a staircase's hull."""
    least, most, first, last = ranges.tolist()
    if first == last:
        return []
    inner = staircase.thresholds[staircase.kinds[element], first:last]
    left, right = np.append(least, inner), np.append(inner - 1, most)
    return [
        (np.array([1.0, -slope]), *((-np.inf, offset) if upper else (offset, np.inf)))
        for slope, offset, upper in hull(left, right, first + staircase.lowest)
    ]


@contextmanager
def _stdout_silenced() -> Generator[None]:
    """HiGHS announces itself on the process's stdout, where results are printed."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _slopes(network: Network, index: int) -> FloatArray:
    node = network.nodes[index]
    assert isinstance(node, Stairs)
    significand, shift = node.staircase.factors[node.staircase.kinds].T
    return np.maximum(significand, 1) / np.exp2(shift)
